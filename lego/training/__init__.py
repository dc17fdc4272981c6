"""Any training loop: its set-up, optimizer steps, epochs, stopping, search of the rate, training for a budget."""

"""Any training loop: optimizer steps, epochs, stopping, search of the rate, training for a budget."""

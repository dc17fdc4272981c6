"""The decoder, how its exits are read, what it costs, and its files."""

"""The decoder, its states and how exits read them, what it costs, and its files."""

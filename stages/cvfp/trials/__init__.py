"""Changes to the profile `sound` that were tried, one at a time."""

"""From a store of hard tokens to a trained block 2."""

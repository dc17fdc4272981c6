"""From hard tokens to a trained block 2: which tokens it learns from, batches of them, training."""

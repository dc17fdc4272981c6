"""From block 1 to a store of hard tokens: thresholds, hard tokens, their hidden states."""

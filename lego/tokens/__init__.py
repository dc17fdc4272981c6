"""What models read: packed blocks of token ids, and batches of them."""

"""Answers at routed depth: the decoder with its cache, text from it, and its command line."""

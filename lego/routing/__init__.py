"""Answers at routed depth: the decoder with its cache, and text from it."""

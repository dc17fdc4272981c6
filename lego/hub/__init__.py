"""The routed model for Hugging Face transformers."""

"""Prompts: read, rendered, tokenized, and packed into batches."""

"""Architectures that map features to logits, one per file."""

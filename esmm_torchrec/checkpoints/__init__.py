"""Checkpoints of a run and their manager."""

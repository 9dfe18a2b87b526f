"""Training runs: their folders, and their trained models."""

"""Training runs: run folders and their trained models."""

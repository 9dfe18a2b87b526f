"""State of a run on disk."""

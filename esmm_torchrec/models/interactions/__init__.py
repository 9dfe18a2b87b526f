"""Interactions of features, applied before the towers of any architecture, one per file."""

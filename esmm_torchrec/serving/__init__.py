"""Scoring and serving with a trained model: prepared splits, files, DataFrames and requests."""

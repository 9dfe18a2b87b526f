"""Selections of the impressions that a method trains on, one family per file."""

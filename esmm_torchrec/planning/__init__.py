"""Estimates sharding plans for hardware you do not have; training never imports this package."""

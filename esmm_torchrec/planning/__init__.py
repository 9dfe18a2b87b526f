"""Sharding plans estimated for hardware you do not have: a laboratory that training never loads."""

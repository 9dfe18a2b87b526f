"""Metrics of scores, and the spaces over which they are computed; `report` lists every figure."""

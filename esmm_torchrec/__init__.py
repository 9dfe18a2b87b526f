"""Conversion models over the entire space of impressions, on TorchRec."""

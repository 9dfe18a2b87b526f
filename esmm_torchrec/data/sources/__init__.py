"""Preparation of raw logs: Ali-CCP's text, and any table of impressions."""

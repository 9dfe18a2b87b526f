"""Training objectives of methods, one per file.

Notation in this package: y click, z conversion (z ≤ y), D all impressions, O the clicked ones.
Means are over the impressions of the global batch, with their weights.
"""

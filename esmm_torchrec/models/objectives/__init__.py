"""What a method is trained for: one part per file.

Notation in this package: y click, z conversion (z ≤ y), D all impressions, O the clicked ones. A
mean is over the impressions of the global batch, weighted as they are.
"""

"""Which impressions a method trains on: one part per file."""

"""What features become before the towers of any architecture see them: one part per file."""

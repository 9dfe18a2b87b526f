"""How features become logits: one part per file."""

"""Commands of the planning laboratory, one module each."""

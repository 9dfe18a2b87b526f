"""Commands of this laboratory, one module each."""

"""The commands of this laboratory, one module each."""

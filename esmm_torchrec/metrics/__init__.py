"""What is reported of scores, and over which space: `report` lists every figure by name."""

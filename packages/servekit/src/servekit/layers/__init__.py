"""Building blocks of models; each takes its rank and world size from the start."""

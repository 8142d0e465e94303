"""A point of a study as a diffusers scheduler folder, checked against Solvus's own samples."""

"""Features: one vector per sample, for distances between distributions. ``dim(shape)`` is its length."""

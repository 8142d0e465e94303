"""Searches that need no sampler. ``start(context)`` makes the running search that a study asks and tells."""

"""Guidance: a model that wraps a model, so no solver knows about it."""

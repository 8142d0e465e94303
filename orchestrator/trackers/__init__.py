"""Trackers that need no service."""

"""Benchmarks: scripts that print a table. ``python -m benchmarks.NAME [--quick] [--json]``."""

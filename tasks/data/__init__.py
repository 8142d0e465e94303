"""Data that ships inside a dependency: nothing is downloaded."""

"""Families of diffusers pipelines, one file each; a file that defines ``FAMILY`` is found by itself."""

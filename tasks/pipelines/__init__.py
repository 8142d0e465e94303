"""Saved diffusers pipelines as models: the folder, one adapter a family, encoded prompts, and the denoiser."""

"""Studies and the root configuration, as YAML that Hydra composes. No logic."""

"""Searches that are Optuna studies: ask, tell, resume; Optuna's own samplers and ours. One spec a file."""

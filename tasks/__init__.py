"""The science of Solvus: models, solvers, times, strategies, rewards, metrics. Knows nothing of clusters or files."""

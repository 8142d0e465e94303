"""The plumbing of Solvus: studies, plans, the store, executors, searches and trackers around ``tasks``."""

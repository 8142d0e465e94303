"""The registries of the plumbing: searches, executors and trackers. The science has its own in ``tasks.registry``."""

from __future__ import annotations

from tasks.registry import ALL, Registry

searches = Registry("search", "orchestrator.searches", "orchestrator.adapters.optuna_search")
executors = Registry("executor", "orchestrator.executors", "orchestrator.adapters.ray_executor")
trackers = Registry("tracker", "orchestrator.trackers", "orchestrator.adapters.mlflow_tracker")

EVERY: dict[str, Registry] = {**ALL, "search": searches, "executor": executors, "tracker": trackers}

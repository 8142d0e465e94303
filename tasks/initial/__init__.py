"""Initial states: where a trajectory begins, in front of any solver.

An initial plug-in says at which time the run begins (``start(process)``; the grid is laid from there), what a start
costs (``evaluations``), whether it draws noise of its own beyond the prior's, and makes the states (``__call__(sampler,
noise)``, (B, *shape)).
"""

"""Solvers: one step from ``t`` to ``s < t``.

Beside ``step`` a solver says its ``process`` kind, its ``order`` of accuracy, whether it is ``stochastic``,
``nfe(num_steps)``, the network evaluations of a run that ends at t=0, and ``fit(nfe)``: field overrides and the number
of steps with which a run costs exactly ``nfe`` evaluations.
"""

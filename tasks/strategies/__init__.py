"""Strategies: how many trajectories a sample gets and which survive.

A strategy declares ``particles`` (K trajectories per sample), whether it ``uses_reward`` and whether it ``branches``
(copies particles in mid-run, which only a stochastic solver lets diverge).
"""

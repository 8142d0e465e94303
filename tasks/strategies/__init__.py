"""Strategies: how many trajectories a sample gets and which survive.

A strategy declares ``particles`` (K trajectories per sample), whether it ``uses_reward`` and whether it ``branches``
(copies particles in mid-run, which only a stochastic solver lets diverge). Its ``semantics`` is "sample" where its rows
are draws of a law (the model's, or a tilted one) and "best" where it optimises; the two are never compared as if they
were the same. ``intermediate`` says that it asks the reward about unfinished samples. ``account(evaluations)`` is what
one sample costs, given the network evaluations of every step of one trajectory; ``budget`` caps it. Adaptive strategies
give the rows' own cost in the columns ``nfe`` and ``reward_calls``.
"""

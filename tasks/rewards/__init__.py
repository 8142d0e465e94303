"""Rewards: one number per sample, larger is better.

A reward that passes gradients to its samples says ``differentiable = True``. One that makes no sense of the blurred
clean predictions of an unfinished trajectory says ``scores_predictions = False``, and strategies that ask for these
refuse it. One that costs less than to look its value up says ``cheap = True``; all others are remembered by content.
"""

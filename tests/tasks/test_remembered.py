"""Scores remembered by content are the scorer's own, and cost nothing again."""

import torch

from tasks.registry import rewards
from tasks.remembered import Remembered


def test_a_batch_that_was_scored_costs_nothing_again_and_has_the_same_bits():
    plain = rewards.build("class_log_prob")
    kept = Remembered(plain)
    samples, cond = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(6)
    first = kept(samples, cond)
    assert torch.equal(first, plain(samples, cond)) and torch.equal(kept(samples, cond), first)
    assert (kept.scored, kept.reused) == (6, 6) and kept.seconds > 0
    assert torch.equal(kept(samples.flip(0), cond.flip(0)), first.flip(0))  # by content, not by place
    kept(samples, cond + 1)  # another label is another question
    assert (kept.scored, kept.reused) == (12, 12)


def test_one_row_that_is_new_has_the_whole_batch_scored_and_the_oldest_are_forgotten():
    asked = []

    def scorer(samples, cond):
        asked.append(len(samples))
        return samples.flatten(1).sum(1)

    kept = Remembered(scorer, size=3)
    samples = torch.arange(8.0).reshape(4, 2)
    assert kept(samples[:3], None).tolist() == [1, 5, 9]
    assert kept(samples[1:], None).tolist() == [5, 9, 13]
    assert kept(samples[:3], None).tolist() == [1, 5, 9]
    assert asked == [3, 3, 3]  # the first row had been pushed out

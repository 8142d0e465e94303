"""Blocks that take turns give the same results in the same order, and only one computes at a time."""

import threading
import time

import numpy as np
import pytest
import torch

from tasks import run
from tasks.recipe import Recipe
from tasks.registry import rewards
from tasks.turns import IN_FLIGHT, Elsewhere, Turn, in_turns


@pytest.mark.parametrize("overlap", [False, True])
def test_results_come_in_order_and_one_block_computes_at_a_time(overlap):
    computing, together, waited = [0], [0], threading.Event()

    def slow(samples, cond):
        waited.wait(0.01)
        return samples

    def work(item, lock):
        with Turn(lock) as turn:
            for _ in range(3):
                computing[0] += 1
                together[0] = max(together[0], computing[0])
                time.sleep(0.001)
                computing[0] -= 1
                Elsewhere(slow, turn)(item, None)
        assert turn.seconds > 0.002
        return item

    assert list(in_turns(work, range(7), overlap)) == list(range(7)) and together[0] == 1


def test_while_one_block_waits_for_its_reward_the_next_one_computes():
    begun = [threading.Event() for _ in range(IN_FLIGHT)]

    def work(item, lock):
        with Turn(lock) as turn:
            begun[item].set()
            # Each waits until the other has computed too: without turns this would never end.
            Elsewhere(lambda samples, cond: begun[1 - item].wait(20), turn)(None, None)
        return begun[1 - item].is_set()

    assert list(in_turns(work, range(IN_FLIGHT), True)) == [True] * IN_FLIGHT


def test_an_error_in_a_block_is_the_callers():
    def work(item, lock):
        with Turn(lock):
            if item == 2:
                raise ValueError(f"block {item}")
            return item

    with pytest.raises(ValueError, match="block 2"):
        list(in_turns(work, range(5), True))


class Far:
    """A reward that says what it took, as one in another process does."""

    def __init__(self, spec, texts=()):
        self._reward, self.seconds, self.reused = rewards.build(spec), 0.0, 0

    def __call__(self, samples, cond):
        self.seconds, self.reused = self.seconds + 1.0, self.reused + 1
        return self._reward(samples, cond)


MADE = Recipe(
    "gmm", {"name": "ddim", "eta": 1.0}, {"name": "uniform", "num_steps": 3}, "none",
    {"name": "fk_steering", "particles": 4, "first": 1, "every": 1}, "quadratic", batch_size=16,
).completed()  # fmt: skip


def test_rows_are_the_same_bit_for_bit_where_their_reward_is_scored_elsewhere_and_its_seconds_are_the_actors():
    here, there = {}, {}
    plain = run.generate(MADE, 0, 14, tally=here)
    served = run.generate(MADE, 0, 14, served=Far, tally=there)
    for name in plain.keys() - {"seconds"}:
        np.testing.assert_array_equal(plain[name], served[name], err_msg=name)
    calls = 4 * 3  # blocks of 4 rows, and two nodes and the end of each
    assert there["reward_s"] == calls and served["seconds"].sum() > calls * 14 / 16 - 0.1
    assert 0 < here["reward_s"] < 5 and here["reward_reused"] == 0


def test_a_process_remembers_a_reward_that_is_not_cheap_and_never_one_whose_gradient_is_wanted():
    assert run.remembered({"name": "ink"}) == rewards.build("ink")  # cheaper than to look it up
    made = Recipe(
        "digits", "euler", {"name": "uniform", "num_steps": 2}, "none", {"name": "best_of_n", "n": 2}, "class_log_prob",
        batch_size=8, seed=91,
    ).completed()  # fmt: skip
    first, again = {}, {}
    a, b = run.generate(made, 0, 6, tally=first), run.generate(made, 0, 6, tally=again)
    assert first["reward_reused"] == 0 and again["reward_reused"] == 12 and again["reward_s"] == 0
    assert first["reward_s"] > 0
    for name in a.keys() - {"seconds"}:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)
    kept = run.remembered(made.reward)
    reused = kept.reused
    x, cond = torch.zeros(2, 1, 8, 8, requires_grad=True), torch.tensor([3, 4])
    with torch.no_grad():
        kept(x, cond)
    value = kept(x, cond).sum()
    assert torch.autograd.grad(value, x)[0].abs().sum() > 0 and kept.reused == reused


def test_metrics_may_have_their_rewards_scored_elsewhere_but_not_their_features():
    samples, labels = np.zeros((5, 1, 8, 8), dtype=np.float32), np.zeros(5, dtype=np.int64)
    asked = []

    def far(spec, texts):
        asked.append(spec["name"])
        return Far(spec)

    for name in ("ink", "classifier"):
        spec = {"name": name}
        np.testing.assert_array_equal(
            run.score(spec, samples, labels, 0, 8, "cpu", served=far), run.score(spec, samples, labels, 0, 8, "cpu")
        )
    assert asked == ["ink"]

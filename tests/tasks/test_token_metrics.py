"""Metrics of tokens against closed forms and enumeration, and what they refuse."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest

from tasks import registry
from tasks.data import digits
from tasks.run import score

BINARY = {"name": "table", "vocabulary": 2, "length": 2, "probabilities": [0.5, 0.25, 0.125, 0.125]}


def value_of(spec, rows, model=None):
    metric = registry.metrics.build(spec)
    return metric.compute(metric.summarize(rows), metric.reference(model, None))


def test_perplexity_of_exact_samples_is_the_exponential_of_the_entropy_a_token():
    model = registry.models.build(BINARY)
    strings = np.repeat(model.strings, (4, 2, 1, 1), axis=0)  # eight samples in the very proportions of the table
    spec = {"name": "perplexity", "model": BINARY}
    metric = registry.metrics.build(spec)
    metric.check(model, 8)
    column = score(metric.needs()[0], strings, np.zeros(8, dtype=np.int64), 0, 8, "cpu")
    entropy = -(model.joint * np.log(model.joint)).sum()
    found = value_of(spec, {"token_log_prob": column}, model)["quality/perplexity"]
    assert found == pytest.approx(math.exp(entropy / 2), rel=1e-6)


def test_the_perplexity_of_digits_is_lower_than_that_of_noise_and_of_other_labels():
    rows = np.flatnonzero(digits.held_out())[:32]
    images, labels = digits.images()[rows], digits.labels()[rows]
    noise = np.random.default_rng(0).permuted(images.reshape(32, 64), axis=1).reshape(images.shape)
    spec = {"name": "perplexity"}
    need = registry.metrics.build(spec).needs()[0]
    model = registry.models.build("digits_tokens")
    found = [
        value_of(spec, {"token_log_prob": score(need, x, c, 0, 16, "cpu")}, model)["quality/perplexity"]
        for x, c in ((images, labels), (images, (labels + 1) % 10), (noise, labels))
    ]
    assert found[0] < found[1] < found[2]


def test_a_string_of_probability_zero_is_refused_with_the_string():
    spec = {"name": "token_log_prob", "model": {**BINARY, "probabilities": [0.5, 0.5, 0.0, 0.0]}}
    with pytest.raises(ValueError, match=r"string \[1, 0\] has probability 0 under model table"):
        score(spec, np.array([[0, 1], [1, 0]]), np.zeros(2, dtype=np.int64), 0, 2, "cpu")


def test_entropies_are_those_of_the_shares():
    same = {"tokens": np.array([[1, 1, 1, 1], [0, 0, 0, 0]], dtype=np.float32)}
    assert value_of({"name": "token_entropy"}, same) == {
        "quality/token_entropy": 0.0,
        "quality/corpus_entropy": pytest.approx(math.log(2)),
    }
    mixed = {"tokens": np.array([[0, 1, 2, 3], [3, 3, 0, 0]], dtype=np.float32)}
    pooled = np.array([3, 1, 1, 3]) / 8
    assert value_of({"name": "token_entropy"}, mixed) == {
        "quality/token_entropy": pytest.approx((math.log(4) + math.log(2)) / 2),
        "quality/corpus_entropy": pytest.approx(-(pooled * np.log(pooled)).sum()),
    }


def test_distinct_grams_are_counted_once():
    rows = {"tokens": np.array([[0, 1, 0, 1], [0, 1, 2, 2], [5, 5, 5, 5]], dtype=np.float32)}
    for n in (1, 2, 3, 4):
        grams = Counter(tuple(row[i : i + n]) for row in rows["tokens"].tolist() for i in range(5 - n))
        found = value_of({"name": "distinct_n", "n": n}, rows)
        assert found == {f"quality/distinct_{n}": pytest.approx(len(grams) / sum(grams.values()))}


@pytest.mark.parametrize("k", [1, 2, 3])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(k):
    right = {0: [1, 0, 0, 0, 0], 1: [0, 0, 0, 0], 2: [1, 1, 1, 0]}
    rows = {
        "label": np.concatenate([np.full(len(r), c) for c, r in right.items()]),
        "class_correct": np.concatenate(list(right.values())).astype(np.float32),
    }
    shares = [np.mean([any(s) for s in itertools.combinations(r, k)]) for r in right.values()]
    found = value_of({"name": "pass_at_k", "k": k}, rows)
    assert found == {f"quality/pass_at_{k}": pytest.approx(np.mean(shares))}


def test_pass_at_one_is_the_accuracy_with_its_interval():
    rng = np.random.default_rng(0)
    rows = {"label": np.arange(200) % 10, "class_correct": (rng.random(200) < 0.7).astype(np.float32)}
    rows["position"] = np.arange(200)
    one, accuracy = registry.metrics.build({"name": "pass_at_k", "k": 1}), registry.metrics.build("class_accuracy")
    assert one.compute(one.summarize(rows), None)["quality/pass_at_1"] == pytest.approx(rows["class_correct"].mean())
    spreads = [
        next(iter(m.influence(m.summarize(rows), None, rows).values())).std() for m in (one, accuracy)
    ]  # labels are given in the first, drawn in the second: it can only be narrower, but for 199 / 190
    assert spreads[0] <= spreads[1] * 1.1


def test_pass_at_k_refuses_rewards_that_are_no_verdicts():
    rows = {"label": np.zeros(6), "ink": np.array([0, 1, 0.5, 0, 0, 0], dtype=np.float32)}
    with pytest.raises(ValueError, match="needs a reward of 0 and 1, but ink gave 0.5"):
        value_of({"name": "pass_at_k", "reward": "ink"}, rows)


@pytest.mark.parametrize(
    ("metric", "model", "message"),
    [
        (
            {"name": "perplexity"},
            {"name": "table"},
            "knows 64 tokens of 17 values, but the samples of model table are 4",
        ),
        ({"name": "perplexity"}, {"name": "gmm", "dim": 64}, "model gmm are vectors of numbers, not tokens"),
        ({"name": "perplexity", "model": BINARY}, {"name": "digits_tokens"}, "knows 2 tokens of 2 values"),
        ({"name": "token_entropy"}, {"name": "gmm"}, "vectors of numbers, not tokens"),
        ({"name": "distinct_n", "n": 5}, {"name": "table"}, "between 1 and the 4 tokens of a sample, got 5"),
        ({"name": "pass_at_k", "k": 9}, {"name": "digits_tokens"}, "must be 100 at least, got 99"),
    ],
    ids=lambda value: value.get("name") if isinstance(value, dict) else None,
)
def test_metrics_refuse_models_whose_samples_they_cannot_read(metric, model, message):
    with pytest.raises(ValueError, match=message):
        registry.metrics.build(metric).check(registry.models.build(model), 99)


def test_a_law_that_cannot_be_written_down_judges_nothing():
    with pytest.raises(ValueError, match="must have a law that can be written down, but gmm has none"):
        registry.rewards.build({"name": "token_log_prob", "model": {"name": "gmm"}})
    with pytest.raises(ValueError, match="conditional needs a model with labels"):
        registry.rewards.build({"name": "token_log_prob", "model": BINARY, "conditional": True})
    with pytest.raises(ValueError, match="metric.k must be at least 1, got 0"):
        registry.metrics.build({"name": "pass_at_k", "k": 0})


def test_pixels_and_tokens_are_judged_alike():
    registry.metrics.build("perplexity").check(registry.models.build("digits"), 10)
    images = digits.images()[:4]
    read = score({"name": "tokens"}, images + 0.05, np.zeros(4, dtype=np.int64), 0, 4, "cpu")
    np.testing.assert_array_equal(read, digits.tokens()[:4])

"""Intervals: textbook formulas, coverage over repetitions, and corrections for many comparisons."""

import math

import numpy as np
import pytest
from scipy import stats

from tasks.intervals import Z95, holm, standard_error, two_sided


def test_the_standard_error_of_independent_rows_is_the_textbook_one():
    x = np.random.default_rng(0).exponential(size=50)
    assert standard_error(x - x.mean()) == pytest.approx(stats.sem(x), rel=1e-12)


def test_rows_that_are_their_own_clusters_are_independent():
    x = np.random.default_rng(0).exponential(size=50)
    assert standard_error(x, np.arange(50)) == pytest.approx(standard_error(x), rel=1e-12)


def test_copies_of_a_row_say_nothing_new():
    x = np.random.default_rng(0).normal(size=20)
    copies, clusters = np.repeat(x, 6), np.repeat(np.arange(20), 6)
    assert standard_error(copies, clusters) == pytest.approx(standard_error(x), rel=1e-12)
    assert standard_error(copies) < 0.5 * standard_error(x)


def test_clustered_intervals_hold_for_new_clusters_and_plain_ones_do_not():
    rng, values, clustered, plain = np.random.default_rng(0), [], [], []
    clusters = np.repeat(np.array([f"prompt {i}" for i in range(30)], dtype=object), 8)
    for _ in range(400):
        x = np.repeat(rng.normal(size=30), 8) + rng.normal(size=240)
        values.append(x.mean())
        clustered.append(standard_error(x - x.mean(), clusters))
        plain.append(standard_error(x - x.mean()))
    spread = np.std(values, ddof=1)  # known to 3.5 %
    assert np.mean(clustered) == pytest.approx(spread, rel=0.18)
    assert np.mean(plain) < 0.6 * spread


def test_rows_that_are_not_used_count_neither_as_rows_nor_as_clusters():
    x = np.array([1.0, np.nan, 3.0, 2.0, np.nan])
    assert standard_error(x) == pytest.approx(stats.sem([1.0, 3.0, 2.0]))
    assert standard_error(x, np.array([0, 9, 1, 2, 9])) == pytest.approx(stats.sem([1.0, 3.0, 2.0]))


def test_one_row_or_one_cluster_has_no_standard_error():
    assert math.isnan(standard_error(np.array([1.0])))
    assert math.isnan(standard_error(np.array([])))
    assert math.isnan(standard_error(np.arange(4.0), np.zeros(4)))


def test_a_value_lies_outside_of_its_interval_once_in_twenty():
    assert pytest.approx(stats.norm.ppf(0.975), rel=1e-15) == Z95
    assert two_sided(Z95, 1.0) == pytest.approx(0.05, rel=1e-12)


def test_p_values_are_those_of_the_normal_law():
    assert two_sided(1.96, 1.0) == pytest.approx(2 * stats.norm.sf(1.96), rel=1e-12)
    assert two_sided(-3.0, 2.0) == two_sided(3.0, 2.0)
    assert (two_sided(0.0, 0.0), two_sided(1.0, 0.0)) == (1.0, 0.0)


def test_holm_is_the_textbook_example():
    # Holm 1979: multiply by 4, 3, 2, 1 in order, and never fall.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.4, 0.9]) == pytest.approx([0.8, 0.9])
    assert holm([]) == []


def test_holm_finds_what_bonferroni_finds_and_keeps_the_error_of_any_false_finding():
    rng, false = np.random.default_rng(0), 0
    for _ in range(2000):
        p = stats.norm.sf(rng.normal(size=6) + np.array([4, 4, 0, 0, 0, 0]))
        adjusted = np.array(holm(list(p)))
        assert (adjusted <= np.minimum(1, 6 * p) + 1e-15).all()
        false += (adjusted[2:] < 0.05).any()
    assert false / 2000 < 0.05 + 5 * math.sqrt(0.05 * 0.95 / 2000)

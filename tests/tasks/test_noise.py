"""Keyed random streams: the generator, its keys and the laws of its draws."""

import hashlib
import math

import numpy as np
import pytest
import torch
from scipy import stats

from tasks import noise as noise_module
from tasks.noise import RowNoise, philox


def rows(*indices, seed=0, **fields):
    return RowNoise(seed, torch.tensor(indices), **fields)


def words(*hexadecimal):
    return tuple(torch.tensor([int(word, 16)]) for word in hexadecimal)


# Known answers: Random123, tests/kat_vectors, lines "philox4x32 10".
KNOWN = [
    (("0",) * 4, (0, 0), ("6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8")),
    (("ffffffff",) * 4, (0xFFFFFFFF, 0xFFFFFFFF), ("408f276d", "41c83b0e", "a20bc7c6", "6d5451fd")),
    (
        ("243f6a88", "85a308d3", "13198a2e", "03707344"),
        (0xA4093822, 0x299F31D0),
        ("d16cfe09", "94fdcceb", "5001e420", "24126ea1"),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN, ids=["zeros", "ones", "pi"])
def test_philox_gives_the_published_answers(counter, key, expected):
    out = philox(words(*counter), key)
    assert [f"{int(word):08x}" for word in out] == list(expected)


def test_philox_is_vectorised_without_cross_talk():
    counters = [words(*counter) for counter, key, _ in KNOWN]
    together = tuple(torch.cat(column) for column in zip(*counters, strict=True))
    out = torch.stack(philox(together, (0, 0)), dim=1)
    alone = torch.cat([torch.stack(philox(counter, (0, 0)), dim=1) for counter in counters])
    assert torch.equal(out, alone)
    assert out[0].tolist() == [int(word, 16) for word in KNOWN[0][2]]


@pytest.mark.parametrize("kind", ["normal", "uniform"])
def test_a_row_does_not_depend_on_its_batch(kind):
    whole = getattr(rows(*range(50)), kind)((3, 5), "x")
    alone = getattr(rows(17), kind)((3, 5), "x")
    mixed = getattr(rows(40, 17, 3), kind)((3, 5), "x")
    assert torch.equal(whole[17], alone[0])
    assert torch.equal(whole[torch.tensor([40, 17, 3])], mixed)


@pytest.mark.parametrize("kind", ["normal", "uniform"])
def test_the_same_key_gives_the_same_numbers(kind):
    assert torch.equal(getattr(rows(1, 2), kind)((4,), "x"), getattr(rows(1, 2), kind)((4,), "x"))


def test_everything_in_the_key_changes_the_numbers():
    base = rows(5)
    draws = {
        "base": base.normal((4,), "x"),
        "purpose": base.normal((4,), "y"),
        "step": base.at(1).normal((4,), "x"),
        "prior": base.at(-1).normal((4,), "x"),
        "slot": base.slot(1).normal((4,), "x"),
        "index": rows(6).normal((4,), "x"),
        "seed": rows(5, seed=1).normal((4,), "x"),
        "large seed": rows(5, seed=2**40).normal((4,), "x"),
        "large index": rows(2**32 - 1).normal((4,), "x"),
    }
    numbers = torch.cat(list(draws.values())).flatten()
    assert len(numbers.unique()) == 4 * len(draws)


def test_steps_slots_and_indices_do_not_stand_in_for_one_another():
    swapped = [rows(1).at(2).slot(3), rows(1).at(3).slot(2), rows(2).at(1).slot(3), rows(3).at(2).slot(1)]
    numbers = torch.stack([noise.normal((4,), "x")[0] for noise in swapped])
    assert len(numbers.flatten().unique()) == 16


def test_repeat_is_one_slot_per_particle_with_rows_outermost():
    base = rows(3, 8)
    wide = base.repeat(3)
    assert wide.num_rows == 6
    assert wide.indices.tolist() == [3, 3, 3, 8, 8, 8]
    draws = wide.normal((2,), "x").view(2, 3, 2)
    for slot in range(3):
        assert torch.equal(draws[:, slot], base.slot(slot).normal((2,), "x"))


def test_a_shorter_draw_is_the_beginning_of_a_longer_one():
    assert torch.equal(rows(4).normal((10,), "x")[:, :3], rows(4).normal((3,), "x"))
    assert torch.equal(rows(4).uniform((10,), "x")[:, :3], rows(4).uniform((3,), "x"))


def test_shape_is_only_a_view_of_the_stream():
    assert torch.equal(rows(4).normal((2, 6), "x").view(1, 12), rows(4).normal((12,), "x"))
    assert rows(4, 5).normal((), "x").shape == (2,)
    assert rows(4, 5).uniform((), "x").shape == (2,)


def test_normal_draws_come_in_the_dtype_of_the_states():
    half = rows(1).normal((8,), "x")
    double = rows(1, dtype=torch.float64).normal((8,), "x")
    assert half.dtype == torch.float32
    assert double.dtype == torch.float64
    assert torch.equal(double.float(), half)
    assert rows(1).uniform((2,), "x").dtype == torch.float64


def test_normal_draws_are_standard_normal():
    n = 200_000
    x = rows(*range(1000), dtype=torch.float64).normal((n // 1000,), "x").flatten().numpy()
    # Standard errors of the first four moments of n normals: 1, sqrt 2, sqrt 15, sqrt 96, each over sqrt n.
    for power, expected, spread in ((1, 0, 1), (2, 1, math.sqrt(2)), (3, 0, math.sqrt(15)), (4, 3, math.sqrt(96))):
        assert abs((x**power).mean() - expected) < 5 * spread / math.sqrt(n)
    # 5 sigma, two-sided, is a p-value of 6e-7.
    assert stats.kstest(x, "norm").pvalue > 6e-7


@pytest.mark.parametrize("axis", ["element", "row", "step", "slot", "purpose"])
def test_neighbouring_streams_are_uncorrelated(axis):
    base, n = rows(*range(2000), dtype=torch.float64), 2000 * 8
    first = base.normal((8,), "x")
    second = {
        "element": first.roll(1, dims=1),
        "row": first.roll(1, dims=0),
        "step": base.at(1).normal((8,), "x"),
        "slot": base.slot(1).normal((8,), "x"),
        "purpose": base.normal((8,), "y"),
    }[axis]
    # The mean product of n pairs of independent standard normals has standard error 1 / sqrt n; so has that of squares
    # once divided by their spread, 2.
    assert abs((first * second).mean()) < 5 / math.sqrt(n)
    assert abs(((first**2 - 1) * (second**2 - 1) / 2).mean()) < 5 / math.sqrt(n)


def test_uniform_draws_are_uniform():
    n = 200_000
    u = rows(*range(1000)).uniform((n // 1000,), "x").flatten().numpy()
    assert u.min() > 0
    assert u.max() < 1
    assert abs(u.mean() - 0.5) < 5 * math.sqrt(1 / 12 / n)
    assert stats.kstest(u, "uniform").pvalue > 6e-7


def test_uniform_draws_have_more_bits_than_a_float32():
    u = rows(*range(1000)).uniform((100,), "x").flatten()
    fraction = (u * 2.0**24) % 1.0
    # A 24-bit uniform would leave no fraction; the low bits must be uniform themselves.
    assert stats.kstest(fraction.numpy(), "uniform").pvalue > 6e-7
    assert ((u * 2.0**50) % 1.0 != 0).double().mean() > 0.4


@pytest.mark.parametrize(("word", "side"), [(0xFFFFFFFF, "below one"), (0, "above zero")])
def test_uniform_stays_inside_the_open_interval_at_its_extremes(monkeypatch, word, side):
    # "reveal if u < 1" must reveal always, and log(u) must be finite.
    extreme = torch.full((1, 1), word)
    monkeypatch.setattr(noise_module, "philox", lambda counter, key: (extreme,) * 4)
    u = rows(0).uniform((2,), "x")
    assert (u < 1).all()
    assert (u > 0).all()


def test_normal_is_finite_at_its_extremes(monkeypatch):
    for word in (0, 0xFFFFFFFF):
        extreme = torch.full((1, 1), word)
        monkeypatch.setattr(noise_module, "philox", lambda counter, key, extreme=extreme: (extreme,) * 4)
        assert torch.isfinite(rows(0, dtype=torch.float64).normal((4,), "x")).all()


def test_integers_seed_library_generators():
    seeds = rows(*range(1000)).integers("scheduler")
    assert len(set(seeds)) == 1000
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert seeds[7:9] == rows(7, 8).integers("scheduler")
    assert max(seeds) > 2**62  # all 63 bits are in use
    torch.Generator().manual_seed(max(seeds))


def test_a_key_is_made_once_per_seed_and_purpose():
    pairs = {noise_module._key(seed, purpose) for seed in range(50) for purpose in ("prior", "step", "1/step")}
    assert len(pairs) == 150
    assert all(0 <= k < 2**32 for pair in pairs for k in pair)


def test_draws_follow_the_documented_key_and_counter():
    # Stored rows depend on these numbers: changing them orphans every study. The definition once more, in plain Python:
    # key = 64 bits of SHA-256(seed, purpose); counter = (block, index, step + 1, slot); then Box-Muller.
    noise = RowNoise(123, torch.tensor([456]), slots=2, step=7, dtype=torch.float64)
    digest = hashlib.sha256(b"123/step").digest()
    k0, k1 = int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")
    c = [0, 456, 8, 2]
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k0, p1 & 0xFFFFFFFF, (p0 >> 32) ^ c[3] ^ k1, p0 & 0xFFFFFFFF]
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    u = (np.array(c) + 0.5) / 2**32
    radius, angle = np.sqrt(-2 * np.log(u[[0, 2]])), 2 * np.pi * u[[1, 3]]
    expected = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(4)
    np.testing.assert_allclose(noise.normal((4,), "step")[0].numpy(), expected, rtol=1e-12)

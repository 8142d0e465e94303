"""What every strategy with weighted particles keeps to, whatever it weighs by."""

import dataclasses
from dataclasses import replace

import numpy as np
import pytest
import torch

from tasks import registry, room
from tasks.noise import RowNoise
from tasks.recipe import Recipe
from tasks.run import generate
from tasks.sampler import CountedModel
from tasks.smc import ParticleState

K, ROWS = 5, 3
MIXTURE = {
    "name": "gmm", "weights": [0.5, 0.3, 0.2], "means": [[-2.0], [0.5], [2.5]],
    "covariances": [[[0.25]], [[0.09]], [[0.36]]],
}  # fmt: skip
QUADRATIC = {"name": "quadratic"}
WORDS, TWELVE = {"name": "table", "seed": 5, "concentration": 0.25}, {"name": "uniform", "num_steps": 12}
MEASURED = {"name": "measurement", "operator": "all", "sigma_y": 0.7, "model": MIXTURE, "y": [1.2]}
CASES = [
    *({"name": "fk_steering", "particles": K, "strength": 2.0, "first": 1, "every": 1, "potential": p,
       "potential_scale": 0.3, "lag": lag}
      for p in ("difference", "max", "sum", "immediate") for lag in (True, False)),
    *({"name": "das", "particles": K, "tempering": t, "gamma": 0.3, "trigger": "always"}
      for t in ("power", "linear", "adaptive")),
    {"name": "minority", "n": K, "interval": 1, "threshold": 1.0},
    {"name": "fkc", "particles": K, "strength": 1.0},
    {"name": "fkc", "particles": K, "exponents": [2.0]},
    {"name": "afdps", "n": K, "threshold": 1.0},
]  # fmt: skip
EVERY = pytest.mark.parametrize("strategy", CASES, ids=lambda s: "-".join(str(v) for v in s.values()))


def recipe(strategy, **fields):
    reward = MEASURED if strategy["name"] == "afdps" else None if "exponents" in strategy else QUADRATIC
    base = {
        "model": MIXTURE, "solver": {"name": "ddim", "eta": 1.0}, "times": {"name": "uniform", "num_steps": 6},
        "guidance": "none", "strategy": strategy, "reward": reward, "dtype": "float64", "batch_size": K * ROWS,
    }  # fmt: skip
    made = Recipe(**base | fields).completed()
    made.check()
    return made


def particles_of(made, monkeypatch, move):
    """Sorted log-weights and log Z, with equal noise for all particles of a group once they differ (after the prior, or
    after the first step of tokens, which all begin alike) and a resampling of our own."""
    tokens = made.parts.model.noising.kind == "masked"

    def shared(draw):
        def same(self, shape, purpose):
            drawn = draw(self, shape, purpose)
            if purpose == "prior" or self.num_rows != K * ROWS or (tokens and self.step == 0):
                return drawn
            return drawn.view(ROWS, K, *shape)[:, :1].expand(ROWS, K, *shape).reshape(-1, *shape)

        return same

    with monkeypatch.context() as patch:
        patch.setattr(RowNoise, "normal", shared(RowNoise.normal))
        patch.setattr(RowNoise, "uniform", shared(RowNoise.uniform))
        patch.setattr(ParticleState, "resample", move)
        rows = generate(made, 0, ROWS)
    return np.sort(rows["log_weights"], axis=1), rows["log_z"]


@EVERY
def test_everything_that_belongs_to_a_particle_follows_it(strategy, monkeypatch):
    """Particles that trade places, all that is theirs with them, weigh the same in the end: a tensor that stayed behind
    (a prediction, a running reward, a twist, a gradient, a reward that was already paid for) would show."""
    assert_follows(recipe(strategy), monkeypatch)


STEER = {"name": "fk_steering", "particles": K, "strength": 2.0, "first": 1, "every": 1}
MEMORIES = [
    {"solver": {"name": "unified", "preset": "dpmpp_2m_sde"}},  # the predictions of earlier steps
    {"model": WORDS, "solver": {"name": "remasking", "confident": True, "eta": 0.5}, "times": TWELVE},  # confidences
]


@pytest.mark.parametrize("fields", MEMORIES, ids=str)
def test_what_a_solver_remembers_of_a_particle_follows_it(fields, monkeypatch):
    reward = {"name": "linear"} if "model" in fields else QUADRATIC
    assert_follows(recipe(STEER, reward=reward, **fields), monkeypatch)


def assert_follows(made, monkeypatch):
    turned = torch.cat([r * K + torch.roll(torch.arange(K), 2) for r in range(ROWS)])
    still = particles_of(made, monkeypatch, lambda self, how, noise: self)
    moved = particles_of(made, monkeypatch, lambda self, how, noise: self.reindex(turned))
    assert np.ptp(still[0], axis=1).max() > 1e-3
    for a, b in zip(still, moved, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)


@EVERY
def test_the_weights_of_a_group_that_is_not_resampled_are_carried_to_its_log_z(strategy, monkeypatch):
    """log Z and the last weights do not depend on when equal weights are divided out."""

    def settle(self, how, noise):
        gain = torch.logsumexp(self.grouped, 1) - np.log(K)
        return replace(self, log_w=(self.grouped - gain[:, None]).flatten(), log_z=self.log_z + gain)

    carried = particles_of(recipe(strategy), monkeypatch, lambda self, how, noise: self)
    settled = particles_of(recipe(strategy), monkeypatch, settle)
    for a, b in zip(carried, settled, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)


# Weights that vary so little that 4,000 rows tell. A temper that particles choose is only consistent: it is left out.
MILD = {"das": {"strength": 2.0}, "minority": {"strength": 0.3}, "fkc": {}, "afdps": {}, "fk_steering": {}}
FIXED = [s | MILD[s["name"]] for s in CASES if s.get("tempering") != "adaptive" and "exponents" not in s]
FIXED.append({"name": "fkc", "exponents": [1.2]})


@pytest.mark.parametrize("strategy", FIXED, ids=lambda s: "-".join(str(v) for v in s.values()))
def test_two_particles_estimate_the_same_z_whether_they_are_resampled_or_not(strategy):
    """Z is unbiased for any K. Without resampling it is a mean of weights, unbiased whatever the steps leave."""
    rows, few, z = 4000, strategy | {"n" if "n" in strategy else "particles": 2}, {}
    for how in ("never", "ess"):
        threshold = {"threshold": 0.9 if how == "ess" else 0.0} if "n" in few else {"trigger": how, "threshold": 0.9}
        found = generate(recipe(few | threshold, batch_size=2 * rows), 0, rows)
        z[how] = np.exp(found["log_z"])
        assert (found["unique_ancestors"] < 2).any() == (how == "ess")
    error = np.hypot(*(v.std() / np.sqrt(rows) for v in z.values()))
    assert abs(z["ess"].mean() - z["never"].mean()) < 4 * error < 0.25 * z["never"].mean()


@EVERY
def test_rows_weights_and_costs_are_the_same_however_the_range_is_cut(strategy):
    made = recipe(strategy, batch_size=2 * K)
    whole, pieces = generate(made, 1, 8), [generate(made, a, b) for a, b in ((1, 2), (2, 5), (5, 8))]
    for name in whole.keys() - {"seconds"}:
        np.testing.assert_array_equal(np.concatenate([p[name] for p in pieces]), whole[name], err_msg=name)


# --- bad input -------------------------------------------------------------------------------------------------------

COUNTS = {"n", "particles", "children", "width", "chains", "max_n", "max_nfe", "candidates", "rollouts", "predictions"}
FREE = {("path_search", "children")}  # none: best of n


def fields_of(name, kind):
    return {f.name for f in dataclasses.fields(registry.strategies.get(name)) if isinstance(f.default, kind)}


@pytest.mark.parametrize("name", [n for n in registry.strategies.names() if COUNTS & fields_of(n, int)])
def test_less_than_one_of_anything_is_refused(name):
    for field in COUNTS & fields_of(name, int):
        if (name, field) not in FREE:
            with pytest.raises(ValueError, match="at least 1|>= 1|must be positive|<= max_n|at least 2"):
                registry.strategies.build({"name": name, field: 0})
        with pytest.raises(ValueError, match="-1"):
            registry.strategies.build({"name": name, field: -1})


@pytest.mark.parametrize("name", [n for n in registry.strategies.names() if "strength" in fields_of(n, float)])
def test_a_temperature_that_is_not_positive_is_refused(name):
    for strength in (0.0, -1.0):
        with pytest.raises(ValueError, match=f"strategy.strength.*must be (positive|above 0).*{strength}"):
            registry.strategies.build({"name": name, "strength": strength})


# --- room ------------------------------------------------------------------------------------------------------------


def test_more_particles_than_a_batch_are_split_into_calls_that_fit(monkeypatch):
    sizes, plain = [], CountedModel._call

    def watched(self, function, x, times, cond):
        return plain(self, lambda part, *rest: (sizes.append(len(part)), function(part, *rest))[1], x, times, cond)

    monkeypatch.setattr(CountedModel, "_call", watched)
    made = recipe({"name": "fk_steering", "particles": 40, "first": 2, "every": 2}, batch_size=16)
    rows = generate(made, 0, 1)
    assert max(sizes) == 16 and (rows["nfe"] == 6 * 40).all()


def test_more_particles_than_memory_has_room_for_are_refused_with_the_number_that_fits(monkeypatch):
    each = room.COPIES * 1 * 8
    monkeypatch.setattr(room, "free_bytes", lambda device: 20 * each)
    made = recipe({"name": "best_of_n", "n": 21}, batch_size=16)
    with pytest.raises(ValueError, match=r"best_of_n holds 21 particles .* 20 particles fit: use fewer of them"):
        generate(made, 0, 1)
    assert len(generate(made.override({"strategy.n": 20}), 0, 1)["x0"]) == 1
    with pytest.raises(ValueError, match=r"batch_size=32 is so many states .* Set batch_size to at most 20"):
        generate(recipe({"name": "single"}, batch_size=32), 0, 1)
    with pytest.raises(ValueError, match="or a smaller batch_size"):
        generate(made.override({"strategy.n": 4}).override({"batch_size": 64}), 0, 1)

"""Feynman-Kac correctors against densities on a grid."""

import math

import numpy as np
import pytest
import torch
from oracles import (
    FLOW,
    GM1D,
    GRID,
    VP,
    Denoiser,
    Mixture,
    log_density,
    log_mean,
    quadrature,
    uniform,
    weighted_moments,
)

from tasks import processes
from tasks.noise import RowNoise
from tasks.recipe import Recipe
from tasks.registry import models, rewards, solvers, strategies
from tasks.run import generate
from tasks.sampler import CountedModel, Sampler

PROCESS = {VP: processes.VP(), FLOW: processes.Flow()}
OTHER = Mixture((0.6, 0.4), (-1.0, 1.5), (0.5, 0.4), c=1.5, q=1.0, lam=2.0)
PAIR = Mixture((0.5, 0.5), (-1.0, 1.0), (1.0, 0.6), c=1.5, q=1.0, lam=2.0)


def run(process, rows=12, count=1000, steps=200, law=GM1D, reward=None, labels=False, model=None, **fields):
    """Mean over runs of the weighted mean and variance, the mean's error, log Z and its error."""
    strategy = strategies.build({"name": "fkc", "particles": count, "output": "all"} | fields)
    cond = None if model is None else torch.zeros(rows, dtype=torch.int64)
    model = model or Denoiser(law, PROCESS[process])
    if labels:
        model, cond = (
            models.build(law.spec(process) | {"labels": True}).load("cpu"),
            torch.ones(rows, dtype=torch.int64),
        )
    sampler = Sampler(model, solvers.build({"name": "ddim", "eta": 1.0}), uniform(steps), cond)
    with torch.no_grad():
        result = strategy(sampler, reward, RowNoise(0, torch.arange(rows), dtype=torch.float64))
    x = result.columns["candidates"].view(rows, count)
    mean, variance = weighted_moments(x, result.columns["log_weights"])
    found = {"mean": float(mean.mean()), "error": float(mean.std()) / math.sqrt(rows)}
    found |= {"variance": float(variance.mean()), "columns": result.columns}
    found["log_z"], found["log_z_error"] = log_mean(result.columns["log_z"])
    return found


def assert_close(found, exact, variance=0.06, log_z=0.08):
    """Within what steps of a two hundredth leave, and the standard errors."""
    assert abs(found["mean"] - exact[0]) < 0.02 + 4 * found["error"]
    assert abs(found["variance"] / exact[1] - 1) < variance
    assert abs(found["log_z"] - exact[2]) < log_z + 3 * found["log_z_error"]


@pytest.mark.parametrize("process", [VP, FLOW])
@pytest.mark.parametrize("exponent", [2.0, 0.5])
def test_annealing_reaches_the_power_of_the_density(process, exponent):
    exact = quadrature(exponent * log_density(GM1D))
    if exponent == 2.0:
        assert exact[:2] == pytest.approx((-0.7827, 2.3565), abs=2e-3)
    assert_close(run(process, exponents=[exponent]), exact)


@pytest.mark.parametrize("process", [VP, FLOW])
def test_a_product_of_two_models_reaches_the_product_of_their_densities(process):
    exact = quadrature(log_density(GM1D) + log_density(OTHER))
    assert exact[:2] == pytest.approx((-0.4604, 2.1676), abs=1e-3)
    fields = {"models": [OTHER.spec(process)]}
    found = run(process, rows=16, **fields)
    assert_close(found, exact, variance=0.09)
    naive = run(process, window=[0.0, 1e-9], **fields)
    assert abs(naive["variance"] / exact[1] - 1) > 0.15
    assert (found["columns"]["nfe"] == 1000 * 200 * 2).all()


@pytest.mark.parametrize("process", [VP, FLOW])
def test_guidance_reaches_the_density_that_it_names_and_without_weights_does_not(process):
    conditional = -0.5 * (GRID - 1.0) ** 2 / 0.6 - 0.5 * math.log(2 * math.pi * 0.6)
    exact = quadrature(2 * conditional - log_density(PAIR))
    assert_close(run(process, law=PAIR, labels=True, scale=2.0), exact, variance=0.1)
    plain = run(process, law=PAIR, labels=True, scale=2.0, window=[0.0, 1e-9])
    assert plain["mean"] - exact[0] > 0.1 > 5 * plain["error"]


@pytest.mark.parametrize(
    ("rows", "count", "steps"), [(6, 1000, 200), pytest.param(3, 4000, 400, marks=pytest.mark.slow)]
)
def test_guidance_of_two_mixtures_has_the_published_moments_and_without_weights_the_published_error(rows, count, steps):
    class Both(Denoiser):
        """GM-1D without a label, the other law with one."""

        num_classes = 1

        def denoise(self, x, t, cond=None):
            return super().denoise(x, t) if (cond == 1).all() else Denoiser(OTHER, self.process).denoise(x, t)

    exact = quadrature(2 * log_density(OTHER) - log_density(GM1D))
    assert exact[:2] == pytest.approx((-0.2231, 0.7710), abs=1e-3)
    fields = {"model": Both(GM1D, PROCESS[VP]), "rows": rows, "count": count, "scale": 2.0}
    found = run(VP, steps=steps, **fields)
    assert abs(found["mean"] - exact[0]) < 0.03 + 2 * found["error"] and found["error"] < 0.02
    assert abs(found["variance"] - exact[1]) < 0.05
    naive = run(VP, steps=100, window=[0.0, 1e-9], **fields)
    assert abs(naive["mean"] - 0.21) < 0.06 and abs(naive["variance"] - 1.25) < 0.1


@pytest.mark.parametrize("process", [VP, FLOW])
def test_a_reward_tilts_the_law_with_half_of_its_gradient(process):
    reward = rewards.build(GM1D.reward())
    found = run(process, reward=reward, strength=2.0, trigger="ess")
    assert_close(found, GM1D.tilted(), variance=0.05)
    few = run(process, steps=50, reward=reward, strength=2.0, trigger="ess")
    assert abs(few["mean"] - GM1D.tilted()[0]) < 0.05


def test_jumps_reach_the_same_law():
    exact = quadrature(2 * log_density(GM1D))
    found = run(FLOW, exponents=[2.0], resampling="jump", rows=24)
    assert abs(found["mean"] - exact[0]) < 0.03 + 4 * found["error"]
    assert abs(found["variance"] / exact[1] - 1) < 0.08
    assert abs(found["log_z"] - exact[2]) < 0.25


def test_tempered_noise_is_biased_and_the_default_is_not():
    # One Gaussian squared, with its variance .25; no resampling.
    law = Mixture((1.0,), (0.0,), (0.5,), c=0.0, q=1.0, lam=1.0)
    spread = {}
    for zeta2 in (0.25, None):
        spread[zeta2] = run(VP, law=law, exponents=[2.0], zeta2=zeta2, trigger="never", count=2000, steps=400)
    assert abs(spread[None]["variance"] - 0.25) < 0.04
    assert spread[0.25]["variance"] < 0.16
    assert strategies.build({"name": "fkc", "exponents": [2.0]}).noise_level == 3.0
    assert strategies.build({"name": "fkc", "scale": 3.0}).noise_level == 1.0


def test_clamping_is_counted_and_off_by_default():
    assert (run(VP, rows=2, count=50, steps=20, exponents=[2.0])["columns"]["clipped"] == 0).all()
    assert (run(VP, rows=2, count=50, steps=20, exponents=[2.0], clamp=0.05)["columns"]["clipped"] > 0).all()


# --- as a part of a recipe -------------------------------------------------------------------------------------------


def recipe(**changes):
    fields = {
        "model": "gmm",
        "solver": {"name": "ddim", "eta": 1.0},
        "guidance": "none",
        "times": {"name": "uniform", "num_steps": 6},
        "batch_size": 16,
        "strategy": {"name": "fkc", "particles": 4},
    }
    made = Recipe(**fields | changes).completed()
    made.check()
    return made


@pytest.mark.parametrize("model", [{"name": "gmm"}, {"name": "gmm", "process": "flow"}, {"name": "digits"}], ids=str)
def test_one_particle_of_one_model_is_ancestral_sampling_draw_for_draw(model):
    one = generate(recipe(model=model, strategy={"name": "fkc", "particles": 1}, dtype="float64"), 0, 6)["x0"]
    single = generate(recipe(model=model, strategy="single", dtype="float64"), 0, 6)["x0"]
    np.testing.assert_allclose(one, single, rtol=1e-4, atol=1e-5 if model["name"] == "digits" else 1e-12)


def test_one_model_alone_weighs_nothing():
    rows = generate(recipe(), 0, 6)
    np.testing.assert_allclose(rows["log_z"], 0, atol=1e-12)
    np.testing.assert_allclose(rows["log_weights"], -math.log(4), atol=1e-12)


def test_rows_do_not_depend_on_the_split_and_cost_what_the_account_says():
    strategy = {"name": "fkc", "particles": 4, "scale": 2.0, "models": [{"name": "gmm", "labels": True, "seed": 5}]}
    made = recipe(model={"name": "gmm", "labels": True}, strategy=strategy)
    rows = generate(made, 0, 9)
    again = np.concatenate([generate(made, 0, 5)["x0"], generate(made, 5, 9)["x0"]])
    np.testing.assert_array_equal(rows["x0"], again)
    assert (rows["nfe"] == made.parts.strategy.account([1] * 6).nfe).all()
    assert made.parts.strategy.account([1] * 6).nfe == 4 * 6 * 3
    tilt = recipe(reward="quadratic", strategy={"name": "fkc", "particles": 4, "strength": 2.0})
    account = tilt.parts.strategy.account([1] * 6)
    assert (generate(tilt, 0, 3)["reward_calls"] == account.reward_calls).all()


def test_the_weights_of_a_further_model_are_in_the_key():
    one, two = (recipe(strategy={"name": "fkc", "models": [{"name": "gmm", "seed": seed}]}) for seed in (1, 2))
    assert one.key != two.key
    assert recipe().parts.strategy.revision is None
    assert one.parts.strategy.revision == "exact"


def test_no_call_to_a_further_model_exceeds_the_batch(monkeypatch):
    sizes = []
    call = CountedModel._call

    def watched(self, function, x, times, cond):
        sizes.append((len(x), self.max_rows))
        return call(self, function, x, times, cond)

    monkeypatch.setattr(CountedModel, "_call", watched)
    generate(recipe(batch_size=2, strategy={"name": "fkc", "particles": 4, "models": [{"name": "gmm"}]}), 0, 1)
    assert set(sizes) == {(4, 2)}


def test_what_does_not_belong_together_is_refused():
    labelled = {"name": "gmm", "labels": True}
    cases = [
        ({"solver": "euler"}, "takes weighted steps of its own, so solver euler would be ignored"),
        ({"solver": {"name": "ddim", "eta": 0.5}}, "takes weighted steps of its own, so solver ddim would be ignored"),
        ({"model": labelled, "guidance": "cfg"}, "guides by itself, so that it can weigh it, but guidance is cfg"),
        ({"strategy": {"name": "fkc", "scale": 2.0}}, "needs labels, but this study has none"),
        (
            {"strategy": {"name": "fkc", "models": [{"name": "gmm", "process": "edm"}]}},
            "A product needs equal ones",
        ),
        ({"strategy": {"name": "fkc", "models": [{"name": "gmm", "dim": 3}]}}, "shape \\(3,\\)"),
        ({"reward": "class_correct", "strategy": {"name": "fkc", "strength": 1.0}}, "class_correct"),
        ({"initial": {"name": "teleport"}}, "Use prior"),
    ]
    for changes, message in cases:
        with pytest.raises(ValueError, match=message):
            recipe(**changes)
    for fields, message in (
        ({"exponents": [-1.0]}, "must have a positive sum"),
        ({"exponents": [1.0, 1.0]}, "one number for the study's model"),
        ({"zeta2": 0.0}, "strategy.zeta2 must be positive or null, got 0.0"),
        ({"resampling": "jump", "trigger": "ess"}, "jump happens after every step"),
        ({"window": [2.0, 1.0]}, "two noise-to-signal ratios"),
        ({"resampling": "hop"}, "unknown resampling scheme 'hop'"),
    ):
        with pytest.raises(ValueError, match=message):
            strategies.build({"name": "fkc"} | fields)

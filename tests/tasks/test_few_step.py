"""Few-step models and solvers: exact laws where the flow map is known, stock classes, and the distilled model."""

import json
import math
import shutil

import diffusers
import numpy as np
import pytest
import torch

from tasks import registry
from tasks.checkpoint import WEIGHTS
from tasks.guidance.cfg import ClassifierFree
from tasks.models.digits import Digits
from tasks.models.digits_consistency import DigitsConsistency, coefficients
from tasks.models.gmm import GMM
from tasks.moments import Moments, frechet_distance
from tasks.noise import RowNoise
from tasks.processes import EDM, VP, Flow
from tasks.sampler import CountedModel, Sampler
from tasks.training import consistency as distillation
from tasks.types import State

PROCESSES = ["vp", "edm", "flow"]
MEAN, COVARIANCE = ((0.4, -0.2),), (((0.30, 0.12), (0.12, 0.10)),)
SPECS = [
    {"name": "consistency"},
    *({"name": "ctm", "gamma": gamma} for gamma in (0.0, 0.5, 0.9, 1.0)),
    {"name": "lcm"},
    {"name": "lcm", "boundary": False},
    *({"name": "tcd", "eta": eta} for eta in (0.0, 0.3, 1.0)),
    {"name": "rectified_flow"},
]
EVERY_SOLVER = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: "-".join(map(str, spec.values())))


def gaussian(process="vp"):
    """One component: the posterior mean and the flow map are both known."""
    return GMM(process=process, means=MEAN, covariances=COVARIANCE).load("cpu")


def noise_of(rows, seed=0, dtype=torch.float64):
    return RowNoise(seed, torch.arange(rows), dtype=dtype)


def sampler_of(spec, times, model, cond=None):
    return Sampler(CountedModel(model, 10**6), registry.solvers.build(spec), tuple(times), cond)


def grid_of(model, steps):
    name = "karras" if isinstance(model.process, EDM) else "uniform"
    return registry.times.build({"name": name, "num_steps": steps})(model.process)


class Ends:
    """A model that answers with the end of the flow of another."""

    def __init__(self, model):
        self.model, self.process, self.shape, self.num_classes = model, model.process, model.shape, model.num_classes

    def denoise(self, x, t, cond):
        return self.model.flow_map(x, t, 0.0, cond)


class NoNoise:
    """Fails when it is asked for numbers."""

    def at(self, step):
        return self

    def normal(self, shape, purpose):
        raise AssertionError(f"noise was drawn for {purpose}")


# --- the flow map ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("process", PROCESSES)
def test_the_flow_map_is_where_many_small_steps_of_the_ode_end(process):
    model = gaussian(process)
    start, stop = (0.05, 0.0025) if process == "edm" else (1.0, 0.1)
    times = np.linspace(start, stop, 1001)
    sampler = sampler_of({"name": "heun"}, times, model)
    x = sampler.start(noise_of(8)).x
    torch.testing.assert_close(model.flow_map(x, start, stop), sampler.run(noise_of(8)).x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("process", PROCESSES)
def test_flow_maps_compose_and_can_be_undone(process):
    model, x = gaussian(process), noise_of(8).normal((2,), "x")
    far = model.flow_map(x, 1.0, 0.2)
    torch.testing.assert_close(model.flow_map(model.flow_map(x, 1.0, 0.7), 0.7, 0.2), far, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model.flow_map(far, 0.2, 1.0), x, rtol=1e-9, atol=1e-9)
    rows = model.flow_map(x, torch.full((8,), 1.0, dtype=torch.float64), torch.full((8,), 0.2, dtype=torch.float64))
    torch.testing.assert_close(rows, far, rtol=1e-12, atol=1e-12)


def test_only_one_component_has_a_flow_map():
    assert GMM(means=MEAN).gives == ("posterior_mean", "flow_end", "flow_map")
    assert GMM().gives == ("posterior_mean",)
    assert CountedModel(gaussian(), 4).maps
    assert not CountedModel(GMM().load("cpu"), 4).maps
    assert not hasattr(GMM().load("cpu"), "flow_map")


def test_a_flow_map_call_counts_like_any_evaluation_and_is_cut_like_one():
    model, x = gaussian(), noise_of(10).normal((2,), "x")
    counted = CountedModel(model, 3)
    t, s = torch.linspace(0.5, 1.0, 10).double(), torch.linspace(0.1, 0.4, 10).double()
    torch.testing.assert_close(counted.flow_map(x, t, s, None), model.flow_map(x, t, s), rtol=1e-12, atol=1e-12)
    assert counted.rows == 10


def test_a_solver_never_sees_an_unguided_map_behind_guidance():
    model = GMM(means=MEAN, covariances=COVARIANCE, labels=True).load("cpu")
    guided = ClassifierFree(2.0).wrap(CountedModel(model, 100))
    seen = []

    class Look:
        def step(self, model, state, t, s, noise):
            seen.append(model.maps)
            return state

    for given in (guided, CountedModel(model, 100)):
        Sampler(given, Look(), (1.0, 0.0), torch.zeros(2, dtype=torch.int64)).step(State(torch.zeros(2, 2)), NoNoise())
    assert seen == [False, True]


# --- exact laws ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize(
    "spec",
    [{"name": "consistency"}, {"name": "lcm", "boundary": False}, {"name": "tcd", "eta": 1.0}]
    + [{"name": "ctm", "gamma": gamma} for gamma in (0.0, 0.5, 0.9, 1.0)],
    ids=lambda spec: "-".join(map(str, spec.values())),
)
@pytest.mark.parametrize("steps", [1, 4])
def test_samples_keep_the_law_of_the_data(spec, process, steps):
    rows, model = 20_000, gaussian(process)
    x = sampler_of(spec, grid_of(model, steps), model).run(noise_of(rows)).x.numpy()
    values, vectors = np.linalg.eigh(np.array(COVARIANCE[0]))
    along = (x - np.array(MEAN)) @ vectors
    assert (np.abs(along.mean(0)) < 5 * np.sqrt(values / rows)).all()
    assert (np.abs(along.std(0) / np.sqrt(values) - 1) < 5 / math.sqrt(2 * rows)).all()
    assert abs((along[:, 0] * along[:, 1]).mean()) < 5 * math.sqrt(values.prod() / rows)


@pytest.mark.parametrize("spec", [{"name": "consistency"}, {"name": "ctm", "gamma": 0.7}], ids=str)
def test_a_flow_that_ends_above_the_data_keeps_the_law_there(spec):
    rows, model, least = 20_000, gaussian("edm"), 0.3
    x = sampler_of(spec | {"sigma_min": least}, grid_of(model, 30)[:20:5] + (0.0,), model).run(noise_of(rows)).x.numpy()
    values, vectors = np.linalg.eigh(np.array(COVARIANCE[0]))
    std = ((x - np.array(MEAN)) @ vectors).std(0)
    assert (np.abs(std / np.sqrt(values + least**2) - 1) < 5 / math.sqrt(2 * rows)).all()


@pytest.mark.parametrize("process", PROCESSES)
def test_the_law_test_has_power_against_ddim(process):
    rows, model = 20_000, gaussian(process)
    x = sampler_of({"name": "ddim"}, grid_of(model, 4), model).run(noise_of(rows)).x.numpy()
    values, vectors = np.linalg.eigh(np.array(COVARIANCE[0]))
    std = ((x - np.array(MEAN)) @ vectors).std(0)
    assert (np.abs(std / np.sqrt(values) - 1) > 5 / math.sqrt(2 * rows)).any()


# --- identities ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("make", [gaussian, lambda process: GMM(process=process).load("cpu")], ids=["map", "answer"])
@pytest.mark.parametrize("same", [{"name": "ctm", "gamma": 1.0}, {"name": "tcd", "eta": 1.0}], ids=str)
def test_the_most_stochastic_end_is_consistency_draw_for_draw(same, make, process):
    model = make(process)
    a, b = (sampler_of(spec, grid_of(model, 5), model).run(noise_of(16)) for spec in (same, {"name": "consistency"}))
    torch.testing.assert_close(a.x, b.x, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(a.x0_hat, b.x0_hat, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("make", [gaussian, lambda process: GMM(process=process).load("cpu")], ids=["map", "answer"])
def test_gamma_one_is_consistency_where_the_flow_ends_above_the_data(make):
    model = make("edm")
    times = grid_of(model, 30)[:20:5] + (0.0,)
    specs = [{"name": "ctm", "gamma": 1.0, "sigma_min": 0.3}, {"name": "consistency", "sigma_min": 0.3}]
    a, b = (sampler_of(spec, times, model).run(noise_of(16)).x for spec in specs)
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_lcm_without_its_boundary_is_consistency():
    model = gaussian()
    specs = [{"name": "lcm", "boundary": False}, {"name": "consistency"}]
    a, b = (sampler_of(spec, grid_of(model, 5), model).run(noise_of(16)).x for spec in specs)
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("spec", [{"name": "ctm"}, {"name": "tcd", "eta": 0.0}], ids=str)
def test_gamma_or_eta_zero_draws_nothing(spec, process):
    model = gaussian(process)
    sampler = sampler_of(spec, grid_of(model, 4), model)
    state = sampler.start(noise_of(4))
    for _ in range(4):
        state = sampler.step(state, NoNoise())
    assert not registry.solvers.build(spec).stochastic


@pytest.mark.parametrize("spec", [s for s in SPECS if s["name"] != "rectified_flow"], ids=str)
def test_a_step_to_the_data_draws_nothing(spec):
    sampler = sampler_of(spec, (0.7, 0.0), gaussian())
    sampler.step(State(torch.zeros(3, 2, dtype=torch.float64)), NoNoise())


@pytest.mark.parametrize("process", PROCESSES)
def test_gamma_zero_walks_along_the_flow(process):
    model = gaussian(process)
    sampler = sampler_of({"name": "ctm"}, grid_of(model, 6), model)
    x = sampler.start(noise_of(16)).x
    end = model.flow_map(x, 1.0, 0.0)
    torch.testing.assert_close(sampler.run(noise_of(16)).x, end, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("gamma", [0.0, 0.6])
def test_the_clean_prediction_of_a_jump_is_the_one_that_ddim_would_need(process, gamma):
    model, t, s = gaussian(process), 0.6, 0.4
    x = noise_of(8).normal((2,), "x")
    state = sampler_of({"name": "ctm", "gamma": gamma}, (t, s, 0.0), model).step(State(x), noise_of(8))

    class Fixed:
        process = model.process
        shape, num_classes = (2,), 0

        def denoise(self, x, t, cond):
            return state.x0_hat

    again = sampler_of({"name": "ctm", "gamma": gamma}, (t, s, 0.0), Fixed()).step(State(x), noise_of(8))
    torch.testing.assert_close(again.x, state.x, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("spec", [{"name": "tcd", "eta": 0.0}, {"name": "ctm", "gamma": 0.0}], ids=str)
def test_the_deterministic_end_is_ddim_along_the_end_of_the_flow(spec, process):
    ends = Ends(gaussian(process))  # it has no map of its own, so ctm takes the surrogate
    times = grid_of(ends, 5)
    a, b = (sampler_of(s, times, ends).run(noise_of(16)).x for s in (spec, {"name": "ddim"}))
    torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_tcd_takes_the_end_of_the_flow_from_the_map():
    model = gaussian()
    specs_models = [({"name": "tcd"}, model), ({"name": "tcd"}, Ends(model))]
    a, b = (sampler_of(spec, grid_of(m, 5), m).run(noise_of(16)).x for spec, m in specs_models)
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_rectified_flow_is_euler_on_a_flow_and_refused_elsewhere():
    model = GMM(process="flow").load("cpu")
    times = np.linspace(1, 0, 6)
    a, b = (sampler_of({"name": name}, times, model).run(noise_of(16)).x for name in ("rectified_flow", "euler"))
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    x = noise_of(8).normal((2,), "x")
    step = sampler_of({"name": "rectified_flow"}, (0.7, 0.4, 0.0), model).step(State(x), NoNoise())
    velocity = (x - model.denoise(x, 0.7)) / 0.7
    torch.testing.assert_close(step.x, x - 0.3 * velocity, rtol=1e-12, atol=1e-12)
    solver = registry.solvers.build("rectified_flow")
    solver.check(Flow(), (1.0, 0.0))
    for process in (VP(), EDM()):
        with pytest.raises(ValueError, match=f"process is {type(process).__name__}; allowed: Flow"):
            solver.check(process, (1.0, 0.0))


# --- stock classes ---------------------------------------------------------------------------------------------------


def inject(monkeypatch, scheduler, noise):
    """Let a stock scheduler draw the numbers that a solver draws; ``noise.step`` says at which step."""
    module = type(scheduler).__module__
    monkeypatch.setattr(f"{module}.randn_tensor", lambda shape, **_: noise["now"].normal(tuple(shape[1:]), "step"))


def compare(monkeypatch, scheduler, spec, times, model, output, **options):
    """Step a stock scheduler and ours side by side, with the same model and noise."""
    sampler = sampler_of(spec, times, model)
    state, noise = sampler.start(noise_of(16)), {}
    x = state.x
    inject(monkeypatch, scheduler, noise)
    for i, n in enumerate(scheduler.timesteps):
        noise["now"] = noise_of(16).at(i)
        scheduler.scale_model_input(x, n)
        x = scheduler.step(output(x, times[i]), n, x, **options).prev_sample
        state = sampler.step(state, noise_of(16))
        torch.testing.assert_close(state.x, x, rtol=1e-5, atol=1e-5)


def test_consistency_is_the_stock_consistency_scheduler(monkeypatch):
    stock = diffusers.CMStochasticIterativeScheduler(clip_denoised=False)
    stock.set_timesteps(timesteps=[22, 11, 5, 0])
    process, sigma_data = EDM(), 0.5
    times = [float(s) / process.sigma_max for s in stock.sigmas[:-1]] + [0.0]

    class Network:
        process = EDM()
        shape, num_classes = (2,), 0

        def output(self, x, t):
            return torch.tanh(x / 3 + process.sigma(t))

        def denoise(self, x, t, cond):
            sigma = process.sigma(t)
            skip = sigma_data**2 / ((sigma - 0.002) ** 2 + sigma_data**2)
            out = (sigma - 0.002) * sigma_data / math.sqrt(sigma**2 + sigma_data**2)
            return skip * x + out * self.output(x, t)

    for spec in ({"name": "consistency", "sigma_min": 0.002}, {"name": "ctm", "gamma": 1.0, "sigma_min": 0.002}):
        stock.set_timesteps(timesteps=[22, 11, 5, 0])
        stock.is_scale_input_called = True
        compare(monkeypatch, stock, spec, times, Network(), Network().output)


def test_lcm_is_the_stock_lcm_scheduler(monkeypatch):
    model = GMM().load("cpu")  # VP with the same linear betas
    for clean in (999, 19, 0):  # the boundary scaling shows at n = 0 only
        stock = diffusers.LCMScheduler(
            beta_schedule="linear", beta_start=0.0001, beta_end=0.02, prediction_type="sample", clip_sample=False
        )
        steps = [n for n in (999, 759, 499, 259) if n > clean] + [clean]
        stock.set_timesteps(timesteps=steps)
        times = [(n + 1) / 1000 for n in steps] + [0.0]
        compare(monkeypatch, stock, {"name": "lcm"}, times, model, lambda x, t: model.denoise(x, t))


class Shifted(VP):
    """Time n / T is training step n, so that the stock class's s' = (1 - eta) n is ours."""

    def _alpha(self, t):
        return super()._alpha(t + 1 / self.num_train_steps)

    def _sigma(self, t):
        return super()._sigma(t + 1 / self.num_train_steps)


@pytest.mark.parametrize("eta", [0.0, 0.25, 0.5, 1.0])
def test_tcd_is_the_stock_tcd_scheduler(monkeypatch, eta):
    model = GMM().load("cpu")
    model.process = Shifted()
    stock = diffusers.TCDScheduler(
        beta_schedule="linear", beta_start=0.0001, beta_end=0.02, prediction_type="sample", clip_sample=False
    )
    steps = [960, 720, 480, 240]  # three quarters and halves of these are whole: the stock class rounds s' down
    stock.set_timesteps(timesteps=steps)
    times = [n / 1000 for n in steps] + [0.0]
    compare(monkeypatch, stock, {"name": "tcd", "eta": eta}, times, model, lambda x, t: model.denoise(x, t), eta=eta)


# --- cost, ends, refusals --------------------------------------------------------------------------------------------


@EVERY_SOLVER
@pytest.mark.parametrize("make", [gaussian, lambda process: GMM(process=process).load("cpu")], ids=["map", "answer"])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_the_evaluations_counted_are_the_evaluations_declared(spec, make, steps):
    sampler = sampler_of(spec, np.linspace(1, 0, steps + 1), make("flow"))
    sampler.run(noise_of(3))
    solver = registry.solvers.build(spec)
    assert sampler.model.rows == 3 * solver.nfe(steps)
    assert solver.fit(steps) == ({}, steps)


ENDS = [[1.0, 0.0], [1.0, 0.999999, 1e-6, 0.0], [1.0, 0.9, 0.5, 1e-4, 0.0], [1.0, 0.5, 1e-3]]


@EVERY_SOLVER
@pytest.mark.parametrize("process", [*PROCESSES, "cosine"])
@pytest.mark.parametrize("components", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_samples_are_finite_at_both_ends(spec, process, components, dtype):
    model = GMM(process="vp" if process == "cosine" else process, num_components=components).load("cpu")
    if process == "cosine":
        model.process = VP("squaredcos_cap_v2")  # alpha(1) is 5e-5
    for times in ENDS:
        state = sampler_of(spec, times, model).run(noise_of(32, dtype=dtype))
        assert state.x.dtype == dtype
        assert torch.isfinite(state.x).all()
        assert torch.isfinite(state.x0_hat).all()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "ctm", "gamma": 1.5}, "gamma must be between 0 and 1, got 1.5"),
        ({"name": "ctm", "sigma_min": -1.0}, "sigma_min must be at least 0, got -1.0"),
        ({"name": "consistency", "sigma_min": -1.0}, "sigma_min must be at least 0, got -1.0"),
        ({"name": "tcd", "eta": -0.1}, "eta must be between 0 and 1, got -0.1"),
        ({"name": "lcm", "sigma_data": 0.0}, "sigma_data must be above 0, got 0.0"),
        ({"name": "lcm", "timestep_scaling": -1.0}, "timestep_scaling must be above 0, got -1.0"),
    ],
    ids=str,
)
def test_a_value_out_of_range_is_refused_with_its_name(spec, message):
    with pytest.raises(ValueError, match=message):
        registry.solvers.build(spec)


@pytest.mark.parametrize("name", ["consistency", "ctm"])
def test_times_below_the_end_of_the_flow_are_refused(name):
    solver = registry.solvers.build({"name": name, "sigma_min": 0.002})
    solver.check(EDM(), (1.0, 0.5, 0.0))
    with pytest.raises(ValueError, match="time 1e-06 lies at or below solver.sigma_min=0.002"):
        solver.check(EDM(), (1.0, 0.5, 1e-6, 0.0))
    registry.solvers.build(name).check(EDM(), (1.0, 0.5, 1e-6, 0.0))


def test_lcm_lays_its_boundary_in_training_steps_only():
    solver = registry.solvers.build("lcm")
    solver.check(VP(), (1.0, 0.0))
    with pytest.raises(ValueError, match="which a Flow process does not have; allowed: VP"):
        solver.check(Flow(), (1.0, 0.0))
    registry.solvers.build({"name": "lcm", "boundary": False}).check(Flow(), (1.0, 0.0))


# --- the distilled model ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def distilled():
    return DigitsConsistency().load("cpu")


def test_the_distilled_model_is_the_identity_at_the_data(distilled):
    x, labels = noise_of(4, dtype=torch.float32).normal((1, 8, 8), "x"), torch.arange(4)
    p = distilled.process
    for t in (0.0, p.t_min / 2, p.t_min):
        torch.testing.assert_close(distilled.denoise(x, t, labels), x / p.alpha(t), rtol=1e-6, atol=1e-6)
    assert not torch.allclose(distilled.denoise(x, 0.5, labels), x / p.alpha(0.5))


def test_a_time_a_row_is_the_same_as_one_time(distilled):
    x, labels = noise_of(4, dtype=torch.float32).normal((1, 8, 8), "x"), torch.arange(4)
    t = torch.tensor([1.0, 0.5, 0.01, 0.0005], dtype=torch.float64)
    together = distilled.denoise(x, t, labels)
    for i in range(4):
        alone = distilled.denoise(x[i : i + 1], float(t[i]), labels[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-4)


def test_pure_noise_of_any_process_is_answered_by_the_second_output():
    assert [float(factor) for factor in coefficients(Flow(), torch.ones(1), 0.5)] == [0.0, 0.0, 1.0]
    for process in (VP(), VP("squaredcos_cap_v2"), EDM()):
        carry, eps, clean = (float(f) for f in coefficients(process, torch.ones(1, dtype=torch.float64), 0.75))
        assert 0 <= carry < 0.01 and -0.05 < eps < 0 and 0.99 < clean <= 1


def test_the_distilled_model_gives_the_end_of_the_flow_and_is_keyed_by_its_weights(tmp_path):
    spec = DigitsConsistency()
    assert spec.gives == ("flow_end",)
    assert (spec.shape, spec.num_classes, spec.noising) == ((1, 8, 8), 10, Digits().noising)
    assert len(spec.revision) == 16 and spec.revision != Digits().revision
    shutil.copytree(WEIGHTS / "digits_consistency", tmp_path / "copy")
    assert DigitsConsistency(str(tmp_path / "copy")).revision == spec.revision
    with pytest.raises(ValueError, match="sigma_data=None in its scheduler configuration"):
        DigitsConsistency(str(WEIGHTS / "digits"))


def test_the_weights_say_how_they_were_made():
    record = json.loads((WEIGHTS / "digits_consistency" / "training.json").read_text())
    assert record["command"].startswith("solvus train digits_consistency")
    assert record["teacher"] == Digits().revision
    assert sum(f.stat().st_size for f in (WEIGHTS / "digits_consistency").rglob("*") if f.is_file()) < 5 * 2**20


def test_the_teacher_is_carried_by_the_heun_step_that_the_solver_takes():
    teacher = Digits().load("cpu")
    x, labels = noise_of(6, dtype=torch.float64).normal((1, 8, 8), "x"), torch.arange(6)
    state = sampler_of({"name": "heun"}, (0.8, 0.6, 0.0), teacher, labels).step(State(x), NoNoise())
    t, s = torch.full((6,), 0.8, dtype=torch.float64), torch.full((6,), 0.6, dtype=torch.float64)
    torch.testing.assert_close(distillation.heun(teacher, x, t, s, labels), state.x, rtol=1e-5, atol=1e-5)


def test_the_training_grid_runs_from_the_first_training_step_to_pure_noise():
    process = Digits().noising
    times = distillation.grid(process, 18)
    assert float(times[0]) == pytest.approx(process.t_min) and float(times[-1]) == pytest.approx(1.0)
    assert (times.diff() > 0).all()
    karras = registry.times.build({"name": "karras", "num_steps": 18})(process)
    np.testing.assert_allclose(times.numpy()[::-1], karras[:-1], rtol=1e-9)


def test_distillation_is_a_function_of_its_seed(tmp_path):
    found = []
    for i, seed in enumerate((0, 0, 1)):
        folder = tmp_path / str(i)
        distillation.train(
            "digits_consistency", folder, steps=3, batch_size=4, num_trajectories=8, seed=seed, report=str
        )
        found.append(DigitsConsistency(str(folder)).load("cpu").network.state_dict())
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])
    assert not all(torch.equal(found[0][key], found[2][key]) for key in found[0])


def test_the_distilled_model_beats_the_few_steps_of_its_teacher():
    rows = 512
    features = registry.features.build("classifier")
    reference = Moments.of(features(torch.from_numpy(Digits().reference()[0]), None).numpy())
    labels = torch.arange(rows) % 10

    def distance(name, solver, steps):
        model = registry.models.build(name).load("cpu")
        x = sampler_of({"name": solver}, np.linspace(1, 0, steps + 1), model, labels).run(noise_of(rows)).x
        m = Moments.of(features(model.decode(x.float()), None).numpy())
        return frechet_distance(m.mean, m.covariance, reference.mean, reference.covariance)

    student = [distance("digits_consistency", "consistency", steps) for steps in (1, 2, 4)]
    teacher = [distance("digits", "ddim", steps) for steps in (1, 2, 4)]
    assert all(s < t / 2 for s, t in zip(student, teacher, strict=True)), (student, teacher)

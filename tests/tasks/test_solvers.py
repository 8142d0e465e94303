"""Solvers on models whose answer is known: order, moments, ends, permutations, purity and cost."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from tasks import registry
from tasks.models.gmm import GMM
from tasks.models.table import Table
from tasks.noise import RowNoise
from tasks.processes import VP, transfer
from tasks.sampler import CountedModel, Sampler
from tasks.types import State, reindex

# diffusers does numpy arithmetic on tensors in ways that numpy 2 deprecates.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context and return_scalar:DeprecationWarning"),
]

PROCESSES = ["vp", "edm", "flow"]
STOCK = {
    "UniPCMultistepScheduler": {},
    "DDIMScheduler": {"clip_sample": False},
    "DDPMScheduler": {"clip_sample": False},
    "DPMSolverMultistepScheduler": {},
    "EulerDiscreteScheduler": {},
    "EulerAncestralDiscreteScheduler": {},
    "HeunDiscreteScheduler": {},
    "KDPM2DiscreteScheduler": {},
    "LMSDiscreteScheduler": {},
    "PNDMScheduler": {},
    "DEISMultistepScheduler": {},
}
OWN = [{"name": name} for name in registry.solvers.names() if name != "diffusers"]
SPECIAL = {"flow_sde": "flow", "rectified_flow": "flow"}  # these step flows only


def steps(name):
    """The class of a solver that takes the conformance models: few-step solvers have tests and models of their own."""
    return getattr(registry.solvers.get(name), "needs", "posterior_mean") == "posterior_mean"


OWN = [spec for spec in OWN if steps(spec["name"])]
# Settings whose order shows cleanly on these ranges; the others are measured in the solvers' own tests.
CLEAN = {"dpm_solver_v3": {"statistics": "data", "max_order": 2, "corrector": False}, "ghvb": {"max_order": 2}}
CLEAN |= {"lsd": {"learn": "nothing"}}
OWN = [spec | CLEAN.get(spec["name"], {}) for spec in OWN]
GAUSSIAN = [spec for spec in OWN if registry.solvers.get(spec["name"]).process == "gaussian"]
DETERMINISTIC = [spec for spec in GAUSSIAN if not registry.solvers.build(spec).stochastic]
FIXED = [spec for spec in DETERMINISTIC if not getattr(registry.solvers.build(spec), "adaptive", False)]
VARIANTS = [
    *OWN,
    {"name": "ddim", "eta": 0.5},
    {"name": "ddim", "eta": 1.0},
    {"name": "heun", "leading_euler_steps": 1},
    {"name": "dpmpp_2m", "lower_order_final": True},
    {"name": "unified", "preset": "unipc"},
    {"name": "unified", "preset": "dpm_solver_3"},
    {"name": "ancestral", "cache": True},
    {"name": "ancestral", "gumbel": "float32"},
    {"name": "confidence", "confidence": "margin", "gumbel": 1.0, "quota": "linear"},
    {"name": "edlm", "k": 4, "window_low": 0.0, "window_high": 1.0},
    {"name": "remasking", "eta": 0.5, "confident": True},
    {"name": "remasking", "eta": 0.5, "schedule": "rescale", "loop": True},
]
TOKENS = [spec for spec in VARIANTS if registry.solvers.get(spec["name"]).process == "masked"]
EVERY_TOKENS = pytest.mark.parametrize("spec", TOKENS, ids=lambda spec: named(spec))
WRAPPED = [{"name": "diffusers", "scheduler": name, "config": config} for name, config in STOCK.items()]


def named(spec):
    return "-".join(str(value) for value in spec.values() if not isinstance(value, dict))


def noise_of(rows, seed=0):
    return RowNoise(seed, torch.arange(rows), dtype=torch.float64)


def model_for(spec, process="vp"):
    if registry.solvers.get(spec["name"]).process == "masked":
        return Table(vocabulary=2, length=3).load("cpu")
    return GMM(process=process).load("cpu")


def sampler_of(spec, times, process="vp", model=None, cond=None):
    solver = registry.solvers.build(spec)
    model = model_for(spec, process) if model is None else model
    counted = CountedModel(model, 10**6)
    if isinstance(times, int):  # a stock scheduler's own grid
        return Sampler(counted, solver, solver.grid(model.process, times), cond, times)
    return Sampler(counted, solver, tuple(times), cond)


def uniform(start, stop, num_steps):
    return [float(t) for t in np.linspace(start, stop, num_steps + 1)]


class FixedNoise:
    """Hands out given numbers instead of random ones."""

    def __init__(self, z):
        self.z, self.num_rows = z, len(z)

    def at(self, step):
        return self

    def normal(self, shape, purpose):
        assert tuple(shape) == tuple(self.z.shape[1:])
        return self.z


# --- order -----------------------------------------------------------------------------------------------------------

RANGE = {"vp": (1.0, 0.1), "edm": (0.05, 0.0025), "flow": (1.0, 0.1)}  # EDM: sigma from 4 to 0.2
STEPS = [20, 40, 80, 160]


@pytest.fixture(scope="module")
def exact():
    """End points of the probability-flow ODE from the exact score, to ten digits."""
    found = {}
    for name in PROCESSES:
        model, (start, stop) = GMM(process=name).load("cpu"), RANGE[name]
        process = model.process
        x = process.prior((2,), noise_of(16).at(-1), start)

        def slope(u, y, model=model, process=process, shape=x.shape):
            if process.kind_of_path == "linear":
                t = u
                state = torch.from_numpy(y).view(shape)
                return ((state - model.denoise(state, t)) / t).flatten().numpy()
            # y = x / alpha over u = sigma / alpha, whatever the schedule: the slope is the predicted noise.
            t = process.time(-math.log(u))
            state = process.alpha(t) * torch.from_numpy(y).view(shape)
            return ((state - process.alpha(t) * model.denoise(state, t)) / process.sigma(t)).flatten().numpy()

        (scale, first), (end_scale, last) = process.ode(start), process.ode(stop)
        run = solve_ivp(slope, (first, last), (x / scale).flatten().numpy(), method="DOP853", rtol=1e-11, atol=1e-12)
        found[name] = x, torch.from_numpy(run.y[:, -1]).view(x.shape) * end_scale
    return found


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("spec", [s for s in FIXED if registry.solvers.build(s).order > 0], ids=named)
def test_the_error_falls_at_the_declared_order(spec, process, exact):
    if process != SPECIAL.get(spec["name"], process):
        return  # refused when planning
    start, target = exact[process]
    errors = []
    for steps in STEPS:
        end = sampler_of(spec, uniform(*RANGE[process], steps), process).run(noise_of(16)).x
        errors.append(float((end - target).square().mean().sqrt()))
    slope = -np.polyfit(np.log(STEPS), np.log(errors), 1)[0]
    assert abs(slope - registry.solvers.build(spec).order) < 0.3, (slope, errors)
    # The runs started where the reference did.
    assert torch.equal(sampler_of(spec, uniform(*RANGE[process], 1), process).start(noise_of(16)).x, start)


@pytest.mark.parametrize("process", PROCESSES)
def test_second_order_beats_first_order(process, exact):
    target = exact[process][1]
    error = {}
    for name in ("euler", "heun", "dpmpp_2m"):
        end = sampler_of({"name": name}, uniform(*RANGE[process], 80), process).run(noise_of(16)).x
        error[name] = float((end - target).square().mean().sqrt())
    assert error["heun"] < error["euler"] / 5
    assert error["dpmpp_2m"] < error["euler"] / 5


def test_every_gaussian_solver_of_ours_is_measured():
    covered = {spec["name"] for spec in FIXED}
    rest = {"diffusers"} | {spec["name"] for spec in TOKENS}  # whatever the stock class is; tokens
    rest |= {"dopri5", "predictor_corrector", "flow_sde"}  # tests of their own: adaptive, and laws instead of paths
    rest |= {name for name in registry.solvers.names() if not steps(name)}
    assert covered == set(registry.solvers.names()) - rest


# --- identities ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("process", PROCESSES)
def test_ddim_with_eta_zero_is_euler(process):
    times = uniform(1.0, 0.0, 7)
    a, b = (sampler_of({"name": name}, times, process).run(noise_of(32)).x for name in ("ddim", "euler"))
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("process", PROCESSES)
def test_one_step_of_any_deterministic_solver_is_the_first_prediction(process):
    model = GMM(process=process).load("cpu")
    x = model.process.prior((2,), noise_of(8).at(-1))
    for spec in FIXED:
        torch.testing.assert_close(sampler_of(spec, [1.0, 0.0], process).run(noise_of(8)).x, model.denoise(x, 1.0))


def test_euler_on_a_flow_is_euler_on_its_velocity():
    model, t, s = GMM(process="flow").load("cpu"), 0.7, 0.4
    x = noise_of(8).normal((2,), "x")
    velocity = (x - model.denoise(x, t)) / t
    step = sampler_of({"name": "euler"}, [t, s, 0.0], model=model).step(State(x), noise_of(8))
    torch.testing.assert_close(step.x, x + (s - t) * velocity, rtol=1e-12, atol=1e-12)


def test_euler_on_edm_is_euler_in_the_noise_level():
    model, t, s = GMM(process="edm").load("cpu"), 0.02, 0.01
    x = noise_of(8).normal((2,), "x")
    slope = (x - model.denoise(x, t)) / model.process.sigma(t)
    step = sampler_of({"name": "euler"}, [t, s, 0.0], model=model).step(State(x), noise_of(8))
    torch.testing.assert_close(step.x, x + (80 * s - 80 * t) * slope, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("process", PROCESSES)
def test_ddim_with_eta_one_draws_from_the_ddpm_posterior(process):
    model, t, s = GMM(process=process).load("cpu"), 0.6, 0.5
    p = model.process
    x, z = noise_of(8).normal((2,), "x"), noise_of(8).normal((2,), "z")
    ratio = p.alpha(t) / p.alpha(s)
    added = p.sigma(t) ** 2 - ratio**2 * p.sigma(s) ** 2  # variance of x_t given x_s
    mean = ratio * p.sigma(s) ** 2 / p.sigma(t) ** 2 * x + p.alpha(s) * added / p.sigma(t) ** 2 * model.denoise(x, t)
    expected = mean + math.sqrt(added) * p.sigma(s) / p.sigma(t) * z
    step = sampler_of({"name": "ddim", "eta": 1.0}, [t, s, 0.0], model=model).step(State(x), FixedNoise(z))
    torch.testing.assert_close(step.x, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("process", PROCESSES)
def test_dpmpp_2m_is_the_published_update(process):
    model, times = GMM(process=process).load("cpu"), [0.9, 0.7, 0.4, 0.2]
    p, states = model.process, []
    sampler = sampler_of({"name": "dpmpp_2m"}, times, model=model)
    state = sampler.start(noise_of(8))
    for _ in range(3):
        states.append(state)
        state = sampler.step(state, noise_of(8))
    x, (before, t, s) = states[2].x, times[1:]
    h, previous = p.lam(s) - p.lam(t), p.lam(t) - p.lam(before)
    r = previous / h
    d = (1 + 1 / (2 * r)) * model.denoise(x, t) - 1 / (2 * r) * model.denoise(states[1].x, before)
    expected = p.sigma(s) / p.sigma(t) * x - p.alpha(s) * math.expm1(-h) * d
    torch.testing.assert_close(state.x, expected, rtol=1e-11, atol=1e-11)


def test_dpmpp_2m_can_end_on_a_first_order_step():
    times, model = [0.9, 0.7, 0.4, 0.2], GMM().load("cpu")
    states = {}
    for lower in (False, True):
        sampler = sampler_of({"name": "dpmpp_2m", "lower_order_final": lower}, times, model=model)
        state = sampler.start(noise_of(8))
        for _ in range(2):
            state = sampler.step(state, noise_of(8))
        states[lower] = state, sampler.step(state, noise_of(8))
    assert torch.equal(states[False][0].x, states[True][0].x)
    before, after = states[True]
    first_order = transfer(model.process, before.x, model.denoise(before.x, 0.4), 0.4, 0.2)
    torch.testing.assert_close(after.x, first_order, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(after.x, states[False][1].x)


def test_heun_with_only_leading_euler_steps_is_euler():
    times = uniform(1.0, 0.0, 5)
    heun = sampler_of({"name": "heun", "leading_euler_steps": 5}, times).run(noise_of(8)).x
    torch.testing.assert_close(heun, sampler_of({"name": "euler"}, times).run(noise_of(8)).x)


# --- moments ---------------------------------------------------------------------------------------------------------


def gaussian_recursion(process, times, eta, mean, variance):
    """Mean and variance of DDIM samples of N(mean, variance), where every step is linear: x_s = a x_t + b + nu z."""
    m, v = 0.0, process.prior_std(times[0]) ** 2
    for t, s in zip(times, times[1:], strict=False):
        alpha, sigma = process.alpha(t), process.sigma(t)
        gain = alpha * variance / (alpha**2 * variance + sigma**2)  # x0_hat = mean + gain (x - alpha mean)
        ratio = alpha / process.alpha(s)
        nu2 = eta**2 * process.sigma(s) ** 2 / sigma**2 * (sigma**2 - ratio**2 * process.sigma(s) ** 2)
        carry = math.sqrt(max(process.sigma(s) ** 2 - nu2, 0.0))  # x_s = alpha_s x0_hat + carry eps_hat + nu z
        a = process.alpha(s) * gain + carry * (1 - alpha * gain) / sigma
        b = (process.alpha(s) - carry * alpha / sigma) * (mean - gain * alpha * mean)
        m, v = a * m + b, a**2 * v + nu2
    return m, v


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_samples_of_a_gaussian_have_the_right_moments(process, eta):
    mean, variance, rows = 0.6, 0.25, 20_000
    model = GMM(process=process, means=((mean,),), covariances=((variance,),)).load("cpu")
    name = "uniform" if process != "edm" else "karras"
    times = registry.times.build({"name": name, "num_steps": 20})(model.process)
    x = sampler_of({"name": "ddim", "eta": eta}, times, model=model).run(noise_of(rows)).x.numpy()
    m, v = gaussian_recursion(model.process, times, eta, mean, variance)
    assert abs(x.mean() - m) < 5 * math.sqrt(v / rows)
    assert abs(x.var() / v - 1) < 5 * math.sqrt(2 / rows)  # standard error of the variance of a normal
    # Twenty steps leave a bias; four hundred leave a twentieth of it, and the law of the data.
    bias = [
        abs(gaussian_recursion(model.process, grid(model.process), eta, mean, variance)[1] / variance - 1)
        for grid in (registry.times.build({"name": name, "num_steps": n}) for n in (20, 400))
    ]
    assert bias[1] < bias[0] / 10
    assert bias[1] < 0.05


def test_ddim_noise_is_new_at_every_step_and_row():
    model = GMM().load("cpu")
    state = State(torch.zeros(6, 2, dtype=torch.float64))
    sampler = sampler_of({"name": "ddim", "eta": 1.0}, [0.9, 0.8, 0.7, 0.0], model=model)
    first = sampler.step(state, noise_of(6)).x
    second = sampler.step(replace(state, step=1), noise_of(6)).x
    assert len(first.flatten().unique()) == 12
    assert not torch.isclose(first, second).any()


# --- ends ------------------------------------------------------------------------------------------------------------

ENDS = [[1.0, 0.0], [1.0, 0.5, 0.0], [1.0, 0.999999, 1e-6, 0.0], [1.0, 0.9, 0.8, 0.7, 1e-4, 0.0], uniform(1.0, 0.0, 50)]


@pytest.mark.parametrize("process", [*PROCESSES, "cosine"])
@pytest.mark.parametrize("spec", [v for v in VARIANTS if v not in TOKENS], ids=named)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_samples_are_finite_at_both_ends(spec, process, dtype):
    model = GMM(process="vp" if process == "cosine" else process).load("cpu")
    if process == "cosine":
        model.process = VP("squaredcos_cap_v2")  # alpha(1) is 5e-5
    for times in ENDS:
        noise = RowNoise(0, torch.arange(64), dtype=dtype)
        state = sampler_of(spec, times, model=model).run(noise)
        assert state.x.dtype == dtype
        assert torch.isfinite(state.x).all()
    # The last grid is no trap. Components lie in [-1, 1] with deviations of a few tenths.
    assert state.x.abs().max() < 4


@EVERY_TOKENS
@pytest.mark.parametrize("times", [[1.0, 0.0], [1.0, 0.5, 0.0], [1.0, 1e-9, 0.0], uniform(1.0, 0.0, 20)])
def test_no_mask_is_left_at_the_end(spec, times):
    x = sampler_of(spec, times).run(noise_of(200)).x
    assert ((x >= 0) & (x < 2)).all()


# --- permutations, purity --------------------------------------------------------------------------------------------

CASES = [(spec, "uniform") for spec in VARIANTS] + [(spec, "stock") for spec in WRAPPED]
EVERY_CASE = pytest.mark.parametrize(("spec", "grid"), CASES, ids=[named(spec) for spec, _ in CASES])


def running(spec, grid, rows, steps_taken):
    """A sampler, its noise and the state after some steps."""
    sampler = sampler_of(spec, 6 if grid == "stock" else uniform(1.0, 0.0, 6))
    noise = noise_of(rows)
    state = sampler.start(noise)
    for _ in range(steps_taken):
        state = sampler.step(state, noise)
    return sampler, noise, state


def finish(sampler, noise, state):
    while state.step < sampler.num_steps:
        state = sampler.step(state, noise)
    return state


@EVERY_CASE
@pytest.mark.parametrize("steps_taken", [0, 1, 3])
def test_reindexing_in_mid_run_commutes_with_stepping(spec, grid, steps_taken):
    rows, index = 5, torch.tensor([3, 1, 1, 4, 0, 2, 2])  # drops nothing but could: two particles are copied
    sampler, noise, state = running(spec, grid, rows, steps_taken)
    moved_noise = replace(noise, indices=noise.indices[index])
    moved = finish(sampler, moved_noise, reindex(state, index))
    straight = finish(sampler, noise, state)
    torch.testing.assert_close(moved.x, straight.x[index], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(moved.x0_hat, straight.x0_hat[index], rtol=1e-10, atol=1e-10)


@EVERY_CASE
def test_dropped_particles_leave_no_trace(spec, grid):
    sampler, noise, state = running(spec, grid, 5, 3)
    index = torch.tensor([4, 2])
    kept = finish(sampler, replace(noise, indices=noise.indices[index]), reindex(state, index))
    torch.testing.assert_close(kept.x, finish(sampler, noise, state).x[index], rtol=1e-10, atol=1e-10)


@EVERY_CASE
def test_rows_do_not_see_each_other(spec, grid):
    sampler, noise, state = running(spec, grid, 5, 0)
    alone = sampler.run(replace(noise, indices=noise.indices[2:3]))
    torch.testing.assert_close(alone.x[0], finish(sampler, noise, state).x[2], rtol=1e-10, atol=1e-10)


def frozen_copy(state):
    """Numbers of every tensor that a state holds, to compare later."""
    found = []

    def visit(value):
        if isinstance(value, torch.Tensor):
            found.append(value.clone())
        elif isinstance(value, dict):
            for item in value.values():
                visit(item)
        elif isinstance(value, (list, tuple)):
            for item in value:
                visit(item)
        elif hasattr(value, "__dict__"):
            visit(vars(value))

    visit(state)
    return found


@EVERY_CASE
@pytest.mark.parametrize("steps_taken", [0, 1, 3])
def test_a_step_does_not_change_the_state_it_starts_from(spec, grid, steps_taken):
    sampler, noise, state = running(spec, grid, 4, steps_taken)
    before = frozen_copy(state)
    first = sampler.step(state, noise)
    after = frozen_copy(state)
    assert len(before) == len(after)
    for a, b in zip(before, after, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)  # stock classes keep a NaN at sigma = 0
    again = sampler.step(state, noise)
    assert torch.equal(first.x, again.x)
    assert torch.equal(finish(sampler, noise, first).x, finish(sampler, noise, again).x)
    assert first.step == state.step + 1


@EVERY_CASE
def test_a_state_can_be_copied_whole(spec, grid):
    sampler, noise, state = running(spec, grid, 4, 2)
    assert torch.equal(finish(sampler, noise, copy.deepcopy(state)).x, finish(sampler, noise, state).x)


@EVERY_CASE
def test_the_last_clean_prediction_is_kept(spec, grid):
    sampler, noise, state = running(spec, grid, 4, 2)
    assert state.x0_hat.shape[0] == 4
    assert state.x0_hat.shape == sampler.model.denoise(state.x, 0.5, None).shape


def test_reindex_reaches_every_tensor_of_a_nest():
    index = torch.tensor([2, 0])
    x = torch.arange(3.0)
    tree = State(x, None, {"a": (x, [x + 1, None]), "b": 2.5, "c": "text", "d": State(x * 2)}, 4)
    moved = reindex(tree, index)
    assert moved.x.tolist() == [2.0, 0.0]
    assert moved.memory["a"][0].tolist() == [2.0, 0.0]
    assert moved.memory["a"][1][0].tolist() == [3.0, 1.0]
    assert moved.memory["a"][1][1] is None
    assert (moved.memory["b"], moved.memory["c"], moved.step) == (2.5, "text", 4)
    assert moved.memory["d"].x.tolist() == [4.0, 0.0]
    assert tree.x.tolist() == [0.0, 1.0, 2.0]


# --- tokens ----------------------------------------------------------------------------------------------------------

DEPENDENT = Table(vocabulary=2, length=3, probabilities=(0.35, 0.0, 0.05, 0.1, 0.0, 0.15, 0.05, 0.3))


def histogram(times, rows, table=DEPENDENT):
    x = sampler_of({"name": "ancestral"}, times, model=table.load("cpu")).run(noise_of(rows)).x
    place = torch.tensor([table.vocabulary**i for i in range(table.length - 1, -1, -1)])
    return torch.bincount((x * place).sum(1), minlength=len(table.joint)).numpy() / rows


def test_many_ancestral_steps_reach_the_table():
    rows, steps = 4000, 400
    share = histogram(uniform(1.0, 0.0, steps), rows)
    joint = DEPENDENT.joint
    distance = 0.5 * np.abs(share - joint).sum()
    # Sampling error: the mean is at most half the sum of the standard errors; one row moves the distance by at most
    # 1/n, so by McDiarmid P(excess > e) < exp(-2 n e^2), which is 3e-7 (five sigma, one-sided) at the e below.
    mean = 0.5 * np.sqrt(joint * (1 - joint) / rows).sum()
    excess = math.sqrt(15 / (2 * rows))
    # Tokens revealed in one step are drawn independently: at most the chance that two of three share a step, 3 / N.
    assert distance < mean + excess + 3 / steps
    assert share[joint == 0].sum() <= 3 / steps + 5 * math.sqrt(3 / steps / rows)
    # The bound has power: one step draws every token from its marginal, far from this table.
    assert 0.5 * np.abs(histogram([1.0, 0.0], rows) - joint).sum() > 3 * (mean + excess + 3 / steps)


def test_one_ancestral_step_draws_from_the_marginals():
    rows = 20_000
    share = histogram([1.0, 0.0], rows)
    one = np.array([[DEPENDENT.joint[DEPENDENT.strings[:, i] == v].sum() for v in (0, 1)] for i in range(3)])
    product = np.array([math.prod(one[i, v] for i, v in enumerate(string)) for string in DEPENDENT.strings])
    assert (np.abs(share - product) <= 5 * np.sqrt(product * (1 - product) / rows)).all()


@EVERY_TOKENS
def test_unmasked_tokens_never_change_unless_the_method_remasks(spec):
    sampler, noise = sampler_of(spec, uniform(1.0, 0.0, 12)), noise_of(300)
    state, mask, again = sampler.start(noise), 2, 0
    for _ in range(12):
        after = sampler.step(state, noise)
        fixed = state.x != mask
        changed = fixed & (after.x != state.x)
        assert (after.x[changed] == mask).all(), "a token becomes another only by way of the mask"
        again += int(changed.sum())
        state = after
    assert (state.x != mask).all()
    assert (again > 0) == getattr(sampler.solver, "remasks", False)


def test_tokens_are_revealed_at_the_stated_rate():
    rows, t, s = 20_000, 0.8, 0.5
    sampler = sampler_of({"name": "ancestral"}, [t, s, 0.0])
    x = sampler.step(sampler.start(noise_of(rows)), noise_of(rows)).x
    rate, count = (t - s) / t, rows * 3
    assert abs((x != 2).double().mean() - rate) < 5 * math.sqrt(rate * (1 - rate) / count)


@pytest.mark.parametrize("spec", [t for t in TOKENS if t["name"] != "remasking"], ids=named)
def test_a_prompt_of_fixed_tokens_is_respected(spec):
    sampler, noise = (
        sampler_of(spec, uniform(1.0, 0.0, 8), model=Table(vocabulary=2, length=3).load("cpu")),
        noise_of(50),
    )
    start = sampler.start(noise)
    x = start.x.clone()
    x[:, 1] = 1
    end = finish(sampler, noise, replace(start, x=x))
    assert (end.x[:, 1] == 1).all()


# --- cost ------------------------------------------------------------------------------------------------------------


DECIDES = ("adaptive", "saves")
PREDICTABLE = [v for v in VARIANTS if not any(getattr(registry.solvers.build(v), d, False) for d in DECIDES)]


@pytest.mark.parametrize("spec", PREDICTABLE, ids=named)
@pytest.mark.parametrize("num_steps", [1, 2, 3, 6])
def test_nfe_is_what_the_counter_counts(spec, num_steps):
    sampler = sampler_of(spec, uniform(1.0, 0.0, num_steps))
    sampler.run(noise_of(3))
    assert sampler.model.rows == 3 * registry.solvers.build(spec).nfe(num_steps)


@pytest.mark.parametrize("spec", WRAPPED, ids=named)
@pytest.mark.parametrize("num_steps", [4, 7])
def test_nfe_of_a_stock_scheduler_is_what_the_counter_counts(spec, num_steps):
    sampler = sampler_of(spec, num_steps)
    sampler.run(noise_of(3))
    assert sampler.model.rows == 3 * registry.solvers.build(spec).nfe(num_steps)


@pytest.mark.parametrize("spec", PREDICTABLE, ids=named)
def test_fit_spends_exactly_what_was_asked(spec):
    for nfe in range(1, 30):
        fields, steps = registry.solvers.build(spec).fit(nfe)
        assert steps >= 1
        assert registry.solvers.build(spec | fields).nfe(steps) == nfe


@pytest.mark.parametrize("spec", WRAPPED, ids=named)
def test_fit_of_a_stock_scheduler_is_exact_or_refused(spec):
    solver = registry.solvers.build(spec)
    steps_of = {solver.nfe(steps): steps for steps in range(4, 7)}
    for nfe in range(min(steps_of), max(steps_of) + 1):
        if nfe in steps_of:
            fields, steps = solver.fit(nfe)
            assert registry.solvers.build(spec | fields).nfe(steps) == nfe
        else:
            with pytest.raises(ValueError, match=f"{spec['scheduler']} cannot spend exactly {nfe} evaluations"):
                solver.fit(nfe)

"""Our solvers against the stock diffusers schedulers, and the wrapper around them against the usual pipeline loop.

Where a stock class is right, ours equals it on the same nodes; where it is known to be wrong (DDIM with trailing or
linspace spacing steps to ``t - T // N`` instead of the next node, diffusers issues 11347 and 12633), ours equals the
formula and the difference is shown.
"""

import inspect

import diffusers
import numpy as np
import pytest
import torch

from tasks import registry
from tasks.models.gmm import GMM
from tasks.noise import RowNoise
from tasks.processes import EDM, VP, Flow, from_x0, transfer
from tasks.sampler import Sampler
from tasks.types import State

# diffusers does numpy arithmetic on tensors in ways that numpy 2 deprecates.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context and return_scalar:DeprecationWarning"),
]

# Stock classes keep their coefficients in float32, and sigma / alpha reaches 157: that is where 1e-5 comes from.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
ROWS = 8


def noise_of(rows=ROWS, dtype=torch.float32, seed=0):
    return RowNoise(seed, torch.arange(rows), dtype=dtype)


@pytest.fixture(scope="module")
def digits():
    return registry.models.build("digits").load("cpu")


@pytest.fixture(scope="module")
def digits_flow():
    return registry.models.build("digits_flow").load("cpu")


@pytest.fixture(params=["gmm", "digits"])
def curved(request):
    """A model with a variance-preserving process, and labels for it."""
    if request.param == "gmm":
        return GMM().load("cpu"), None
    return request.getfixturevalue("digits"), torch.arange(ROWS) % 10


@pytest.fixture(params=["gmm", "digits_flow"])
def straight(request):
    """A model with a flow process, and labels for it."""
    if request.param == "gmm":
        return GMM(process="flow").load("cpu"), None
    return request.getfixturevalue("digits_flow"), torch.arange(ROWS) % 10


def stock(name, process, **config):
    """A stock scheduler with the betas of a process."""
    if isinstance(process, VP):
        config = {
            "beta_schedule": process.schedule,
            "beta_start": process.beta_start,
            "beta_end": process.beta_end,
            "num_train_timesteps": process.num_train_steps,
        } | config
    return getattr(diffusers, name)(**config)


def with_grid(scheduler, *args, **options):
    scheduler.set_timesteps(*args, **options)
    return scheduler


def own(spec, model, times, cond, x=None, noise=None):
    """Our solver from the same start, (start, end)."""
    noise = noise_of() if noise is None else noise
    sampler = Sampler(model, registry.solvers.build(spec), tuple(times), cond)
    state = sampler.start(noise)
    if x is not None:
        state = State(x, None, state.memory, 0)
    begin = state.x
    while state.step < sampler.num_steps:
        state = sampler.step(state, noise)
    return begin, state.x


def predicted_noise(model, cond):
    """What a pipeline's network would say at training step n: eps."""

    def network(x, n):
        t = (float(n) + 1) / model.process.num_train_steps
        return from_x0("epsilon", x, model.denoise(x, t, cond), model.process.alpha(t), model.process.sigma(t))

    return network


def loop(scheduler, network, sample, options=lambda i: {}):
    """The denoising loop that every diffusers pipeline has."""
    for i, n in enumerate(scheduler.timesteps):
        x = scheduler.scale_model_input(sample, n) if hasattr(scheduler, "scale_model_input") else sample
        sample = scheduler.step(network(x, n), n, sample, **options(i), return_dict=False)[0]
    return sample


def times_of(steps, num_train_steps=1000):
    """Our times for integer training steps, ending at the data."""
    return [(int(n) + 1) / num_train_steps for n in steps] + [0.0]


NODES = [999, 870, 741, 600, 430, 333, 200, 90, 15]


# --- our solvers, variance preserving --------------------------------------------------------------------------------


@pytest.mark.parametrize(("spacing", "steps"), [("leading", 10), ("leading", 7), ("trailing", 10), ("trailing", 8)])
def test_ddim_equals_the_stock_class_where_its_grid_is_regular(curved, spacing, steps):
    model, cond = curved
    scheduler = with_grid(stock("DDIMScheduler", model.process, timestep_spacing=spacing, clip_sample=False), steps)
    x, end = own({"name": "ddim"}, model, times_of(scheduler.timesteps), cond)
    torch.testing.assert_close(end, loop(scheduler, predicted_noise(model, cond), x), **CLOSE)


@pytest.mark.parametrize(("spacing", "steps"), [("linspace", 10), ("trailing", 7), ("trailing", 9)])
def test_stock_ddim_misses_its_own_nodes_where_the_spacing_is_not_a_divisor(spacing, steps):
    model = GMM().load("cpu")
    process, network = model.process, predicted_noise(model, None)
    scheduler = with_grid(stock("DDIMScheduler", process, timestep_spacing=spacing, clip_sample=False), steps)
    nodes = times_of(scheduler.timesteps)
    x, end = own({"name": "ddim"}, model, nodes, None)
    # Ours is the formula, evaluated from node to node.
    expected = x
    for t, s in zip(nodes, nodes[1:], strict=False):
        eps = network(expected, t * 1000 - 1)
        expected = process.alpha(s) / process.alpha(t) * (expected - process.sigma(t) * eps) + process.sigma(s) * eps
    torch.testing.assert_close(end, expected, rtol=1e-5, atol=1e-4)
    # The stock class goes from each node to t - T // N, which is another time than that of the next evaluation.
    wrong = loop(scheduler, network, x)
    assert (wrong - end).abs().max() > 3e-4
    shifted = x
    for n in scheduler.timesteps.tolist():
        t, s = (n + 1) / 1000, max(n + 1 - 1000 // steps, 0) / 1000
        shifted = transfer(process, shifted, model.denoise(shifted, t, None), t, s)
    torch.testing.assert_close(shifted, wrong, **CLOSE)


def test_stock_ddim_told_the_right_stride_equals_ours():
    model = GMM().load("cpu")
    scheduler = stock("DDIMScheduler", model.process, timestep_spacing="linspace", clip_sample=False)
    scheduler = with_grid(scheduler, 10)
    assert set(np.diff(scheduler.timesteps.numpy())) == {-111}
    x, end = own({"name": "ddim"}, model, times_of(scheduler.timesteps), None)
    scheduler.num_inference_steps = 9  # so that T // N is 111, the distance between the nodes
    torch.testing.assert_close(end, loop(scheduler, predicted_noise(model, None), x), **CLOSE)


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_stochastic_ddim_equals_the_stock_class(curved, eta):
    model, cond = curved
    scheduler = with_grid(stock("DDIMScheduler", model.process, clip_sample=False), 10)
    x, end = own({"name": "ddim", "eta": eta}, model, times_of(scheduler.timesteps), cond)

    def options(i):
        return {"eta": eta, "variance_noise": noise_of().at(i).normal(tuple(x.shape[1:]), purpose="step")}

    torch.testing.assert_close(end, loop(scheduler, predicted_noise(model, cond), x, options), **CLOSE)


def test_ddim_with_eta_one_is_stock_ddpm(curved, monkeypatch):
    from diffusers.schedulers import scheduling_ddpm

    model, cond = curved
    scheduler = with_grid(stock("DDPMScheduler", model.process, clip_sample=False), timesteps=NODES)
    step = {"index": 0}

    def drawn(shape, **_):
        return noise_of().at(step["index"]).normal(tuple(shape[1:]), purpose="step")

    def options(i):
        step["index"] = i
        return {}

    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", drawn)
    x, end = own({"name": "ddim", "eta": 1.0}, model, times_of(NODES), cond)
    torch.testing.assert_close(end, loop(scheduler, predicted_noise(model, cond), x, options), **CLOSE)


def test_dpmpp_2m_equals_the_stock_class(curved):
    model, cond = curved
    scheduler = with_grid(stock("DPMSolverMultistepScheduler", model.process), timesteps=NODES)
    x, end = own({"name": "dpmpp_2m"}, model, times_of(NODES), cond)
    torch.testing.assert_close(end, loop(scheduler, predicted_noise(model, cond), x), **CLOSE)


@pytest.mark.parametrize("lower", [False, True])
def test_dpmpp_2m_that_stops_at_the_first_training_step_equals_the_stock_class(curved, lower):
    model, cond = curved
    config = {"final_sigmas_type": "sigma_min", "lower_order_final": lower}
    scheduler = with_grid(stock("DPMSolverMultistepScheduler", model.process, **config), timesteps=NODES)
    x, end = own({"name": "dpmpp_2m", "lower_order_final": lower}, model, [*times_of(NODES)[:-1], 0.001], cond)
    torch.testing.assert_close(end, loop(scheduler, predicted_noise(model, cond), x), **CLOSE)


@pytest.mark.parametrize(("name", "solver"), [("EulerDiscreteScheduler", "euler"), ("HeunDiscreteScheduler", "heun")])
def test_sigma_space_solvers_equal_the_stock_classes(curved, name, solver):
    model, cond = curved
    scheduler = with_grid(stock(name, model.process), timesteps=NODES)
    x, end = own({"name": solver}, model, times_of(NODES), cond)
    sample = x / model.process.alpha(1.0)  # these classes keep x / alpha
    torch.testing.assert_close(end, loop(scheduler, predicted_noise(model, cond), sample), **CLOSE)


# --- our solvers, flows ----------------------------------------------------------------------------------------------


def velocity(model, cond):
    """What a pipeline's network would say at time n / 1000: dx/dt."""

    def network(x, n):
        t = float(n) / 1000
        return from_x0("flow", x, model.denoise(x, t, cond), 1 - t, t)

    return network


def test_euler_equals_stock_flow_matching(straight):
    model, cond = straight
    nodes = [1.0, 0.85, 0.6, 0.45, 0.2, 0.05]
    scheduler = with_grid(diffusers.FlowMatchEulerDiscreteScheduler(), sigmas=nodes)
    x, end = own({"name": "euler"}, model, [*nodes, 0.0], cond)
    torch.testing.assert_close(end, loop(scheduler, velocity(model, cond), x), **CLOSE)


def test_heun_equals_stock_flow_matching(straight):
    model, cond = straight
    scheduler = with_grid(diffusers.FlowMatchHeunDiscreteScheduler(), 6)
    nodes = [float(n) / 1000 for n in scheduler.timesteps[::2]]
    x, end = own({"name": "heun"}, model, [*nodes, 0.0], cond)
    torch.testing.assert_close(end, loop(scheduler, velocity(model, cond), x), **CLOSE)


def test_dpmpp_2m_equals_the_stock_class_on_a_flow():
    model = GMM(process="flow").load("cpu")
    config = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    scheduler = with_grid(diffusers.DPMSolverMultistepScheduler(**config), 9)
    nodes = [float(s) for s in scheduler.sigmas[:-1]]

    def network(x, n):
        t = nodes[int((scheduler.timesteps == n).nonzero()[0])]  # its timesteps are sigmas cut to integers
        return from_x0("flow", x, model.denoise(x, t), 1 - t, t)

    x, end = own({"name": "dpmpp_2m"}, model, [*nodes, 0.0], None)
    torch.testing.assert_close(end, loop(scheduler, network, x), **CLOSE)


# --- our solvers, EDM ------------------------------------------------------------------------------------------------


def raw_output(model, scheduler):
    """What an EDM network would say before its preconditioning, for its scaled input and log(sigma) / 4."""
    data = scheduler.config.sigma_data

    def network(scaled, n):
        sigma = float(torch.exp(4 * n))
        x = scaled * (sigma**2 + data**2) ** 0.5
        clean = model.denoise(x, sigma / model.process.sigma_max)
        return (clean - data**2 / (sigma**2 + data**2) * x) / (sigma * data / (sigma**2 + data**2) ** 0.5)

    return network


@pytest.mark.parametrize(
    ("name", "solver"), [("EDMEulerScheduler", "euler"), ("EDMDPMSolverMultistepScheduler", "dpmpp_2m")]
)
def test_edm_solvers_equal_the_stock_classes(name, solver):
    model = GMM(process="edm").load("cpu")
    scheduler = with_grid(getattr(diffusers, name)(sigma_min=0.002, sigma_max=80.0), 12)
    nodes = registry.times.build({"name": "karras", "num_steps": 12})(EDM())
    np.testing.assert_allclose([80 * t for t in nodes], scheduler.sigmas, rtol=1e-5)
    x, end = own({"name": solver}, model, nodes, None)
    torch.testing.assert_close(end, loop(scheduler, raw_output(model, scheduler), x), **CLOSE)


# --- the wrapper on stock grids --------------------------------------------------------------------------------------

TWO_EVALUATIONS = ("Heun", "KDPM2")
VP_CLASSES = {
    "UniPCMultistepScheduler": {},
    "DDIMScheduler": {"clip_sample": False, "timestep_spacing": "trailing"},
    "DDIMParallelScheduler": {},
    "DDPMScheduler": {"clip_sample": False},
    "DDPMParallelScheduler": {},
    "DPMSolverMultistepScheduler": {},
    "DPMSolverSinglestepScheduler": {},
    "DEISMultistepScheduler": {},
    "EulerDiscreteScheduler": {"use_karras_sigmas": True},
    "EulerAncestralDiscreteScheduler": {},
    "HeunDiscreteScheduler": {"timestep_spacing": "trailing"},
    "KDPM2DiscreteScheduler": {},
    "KDPM2AncestralDiscreteScheduler": {},
    "LMSDiscreteScheduler": {},
    "PNDMScheduler": {},
    "SASolverScheduler": {},
    "LCMScheduler": {},
    "TCDScheduler": {},
    "CogVideoXDDIMScheduler": {},
}
DIGITS_CLASSES = ["UniPCMultistepScheduler", "DDPMScheduler", "EulerDiscreteScheduler", "PNDMScheduler"]
FLOW_CLASSES = {
    "FlowMatchEulerDiscreteScheduler": {"shift": 3.0},
    "FlowMatchHeunDiscreteScheduler": {},
    "FlowMatchLCMScheduler": {},
    "UniPCMultistepScheduler": {"use_flow_sigmas": True, "prediction_type": "flow_prediction"},
    "DPMSolverMultistepScheduler": {"use_flow_sigmas": True, "prediction_type": "flow_prediction"},
    "DEISMultistepScheduler": {"use_flow_sigmas": True, "prediction_type": "flow_prediction"},
}


def wrapped(name, config, model, steps, cond=None):
    """The wrapper with times=stock."""
    solver = registry.solvers.build({"name": "diffusers", "scheduler": name, "config": config})
    return Sampler(model, solver, solver.grid(model.process, steps), cond, steps).run(noise_of()).x


def generators(scheduler, name):
    """One generator per row and step, seeded as the wrapper seeds them."""
    stride = 2 if any(word in name for word in TWO_EVALUATIONS) else 1
    held = {}

    def options(i):
        if "generator" not in inspect.signature(scheduler.step).parameters:
            return {}
        if i // stride not in held:
            seeds = noise_of().at(i // stride).integers("scheduler")
            held[i // stride] = [torch.Generator().manual_seed(seed) for seed in seeds]
        return {"generator": held[i // stride]}

    return options


def prior(model):
    return noise_of().at(-1).normal(tuple(model.shape), purpose="prior")


@pytest.mark.parametrize(("name", "config"), VP_CLASSES.items(), ids=VP_CLASSES.keys())
def test_the_wrapper_is_the_usual_loop(name, config):
    model = GMM().load("cpu")
    scheduler = with_grid(stock(name, model.process, **config), 6)
    sample = prior(model) * scheduler.init_noise_sigma
    expected = loop(scheduler, predicted_noise(model, None), sample, generators(scheduler, name))
    torch.testing.assert_close(wrapped(name, config, model, 6), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", DIGITS_CLASSES)
def test_the_wrapper_gives_the_network_what_the_usual_loop_gives_it(name, digits):
    labels = torch.arange(ROWS) % 10
    config = VP_CLASSES[name]
    scheduler = with_grid(stock(name, digits.process, **config), 5)

    def network(x, n):
        with torch.no_grad():
            return digits.network(x, n, labels).sample

    sample = prior(digits) * scheduler.init_noise_sigma
    expected = loop(scheduler, network, sample, generators(scheduler, name))
    # The wrapper goes through the clean prediction and back, which costs float32 digits where alpha is 0.03.
    torch.testing.assert_close(wrapped(name, config, digits, 5, labels), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "config"), FLOW_CLASSES.items(), ids=FLOW_CLASSES.keys())
def test_the_wrapper_is_the_usual_loop_on_a_flow(name, config):
    model = GMM(process="flow").load("cpu")
    scheduler = with_grid(getattr(diffusers, name)(**config), 6)
    plain = {k: v for k, v in config.items() if k == "shift"}  # the wrapper chooses flow sigmas by itself
    expected = loop(scheduler, velocity(model, None), prior(model), generators(scheduler, name))
    torch.testing.assert_close(wrapped(name, plain, model, 6), expected, rtol=1e-5, atol=1e-5)


def test_the_wrapper_gives_a_flow_network_what_the_usual_loop_gives_it(digits_flow):
    labels = torch.arange(ROWS) % 10
    scheduler = with_grid(diffusers.FlowMatchEulerDiscreteScheduler(), 5)

    def network(x, n):
        with torch.no_grad():
            return digits_flow.network(x, n, labels).sample

    expected = loop(scheduler, network, prior(digits_flow))
    end = wrapped("FlowMatchEulerDiscreteScheduler", {}, digits_flow, 5, labels)
    torch.testing.assert_close(end, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"])
def test_the_wrapper_is_the_usual_loop_on_edm(name):
    model = GMM(process="edm").load("cpu")
    scheduler = with_grid(getattr(diffusers, name)(sigma_min=0.002, sigma_max=80.0), 8)
    expected = loop(scheduler, raw_output(model, scheduler), prior(model) * scheduler.init_noise_sigma)
    torch.testing.assert_close(wrapped(name, {}, model, 8), expected, rtol=1e-5, atol=1e-4)


# --- the wrapper on our grids ----------------------------------------------------------------------------------------

GRID = (1.0, 0.8, 0.55, 0.3, 0.1, 0.0)
SAME = [
    ("EulerDiscreteScheduler", {"timestep_spacing": "leading"}, "vp", {"name": "euler"}),
    ("HeunDiscreteScheduler", {"timestep_spacing": "leading"}, "vp", {"name": "heun"}),
    ("DPMSolverMultistepScheduler", {}, "vp", {"name": "dpmpp_2m"}),
    ("FlowMatchEulerDiscreteScheduler", {}, "flow", {"name": "euler"}),
]


@pytest.mark.parametrize(("name", "config", "process", "solver"), SAME, ids=[case[0] for case in SAME])
def test_the_wrapper_on_our_grid_equals_our_solver(name, config, process, solver):
    model = GMM(process=process).load("cpu")
    spec = {"name": "diffusers", "scheduler": name, "config": config}
    end = Sampler(model, registry.solvers.build(spec), GRID).run(noise_of()).x
    torch.testing.assert_close(end, own(solver, model, GRID, None)[1], **CLOSE)


class Spy:
    """Writes down the times at which a model is asked."""

    def __init__(self, model):
        self._model, self.times = model, []

    def __getattr__(self, name):
        return getattr(self._model, name)

    def denoise(self, x, t, cond=None):
        self.times.append(t)
        return self._model.denoise(x, t, cond)


EXPLICIT = [
    *[("vp", name, {}) for name in VP_CLASSES],
    *[("flow", name, {}) for name in FLOW_CLASSES],
    ("flow", "DPMSolverSinglestepScheduler", {}),
    ("flow", "SASolverScheduler", {}),
    ("edm", "EDMEulerScheduler", {}),
    ("edm", "EDMDPMSolverMultistepScheduler", {}),
]


@pytest.mark.parametrize(("process", "name", "config"), EXPLICIT, ids=[f"{p}-{n}" for p, n, _ in EXPLICIT])
def test_given_times_are_followed_or_refused(process, name, config):
    spy = Spy(GMM(process=process).load("cpu"))
    solver = registry.solvers.build({"name": "diffusers", "scheduler": name, "config": config})
    try:
        solver.check(spy.process, GRID)
    except ValueError as error:
        assert name in str(error)  # the message says which class takes no explicit times
        return
    x = Sampler(spy, solver, GRID).run(noise_of()).x
    assert torch.isfinite(x).all()
    assert sorted(set(spy.times), reverse=True) == pytest.approx(GRID[:-1], abs=1e-6)


@pytest.mark.parametrize("config", [{"shift": 3.0}, {"use_karras_sigmas": True}, {"invert_sigmas": True}], ids=str)
def test_given_times_are_not_shifted_behind_the_networks_back(config):
    # The class shifts given sigmas but not given timesteps, so network and integrator would stand at different times.
    model = GMM(process="flow").load("cpu")
    spec = {"name": "diffusers", "scheduler": "FlowMatchEulerDiscreteScheduler", "config": config}
    solver = registry.solvers.build(spec)
    try:
        solver.check(model.process, GRID)
    except ValueError:
        return
    end = Sampler(model, solver, GRID).run(noise_of()).x
    torch.testing.assert_close(end, own({"name": "euler"}, model, GRID, None)[1], **CLOSE)


# --- every class -----------------------------------------------------------------------------------------------------

EVERY = sorted(name for name in dir(diffusers) if name.endswith("Scheduler"))
PROCESSES = {"vp": VP(), "flow": Flow(), "edm": EDM()}


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("name", EVERY)
def test_any_class_of_diffusers_runs_or_is_refused_when_planning(name, process):
    model = GMM(process=process).load("cpu")
    solver = registry.solvers.build({"name": "diffusers", "scheduler": name})
    for steps in (5, GRID):
        try:
            solver.check(model.process, steps)
        except ValueError as error:
            assert name in str(error)
            continue
        stock_steps = steps if isinstance(steps, int) else None
        grid = solver.grid(model.process, steps) if stock_steps else steps
        x = Sampler(model, solver, tuple(grid), None, stock_steps).run(noise_of()).x
        assert torch.isfinite(x).all()
        assert x.abs().max() < 10  # it went towards the data


def test_the_classes_that_matter_are_not_refused():
    for process, names in (("vp", VP_CLASSES), ("flow", FLOW_CLASSES)):
        for name in names:
            registry.solvers.build({"name": "diffusers", "scheduler": name}).check(PROCESSES[process], 5)


@pytest.mark.parametrize(
    ("process", "name", "config"),
    [("vp", name, config) for name, config in VP_CLASSES.items()]
    + [
        ("flow", "FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}),
        ("flow", "FlowMatchLCMScheduler", {}),
    ]
    + [("vp", "DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"})],
    ids=str,
)
def test_no_class_draws_from_global_random_state(process, name, config):
    model = GMM(process=process).load("cpu")
    ends = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        ends.append(wrapped(name, config, model, 5))
    assert torch.equal(*ends)

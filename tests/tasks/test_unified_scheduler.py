"""UnifiedScheduler: Solvus's own run in a pipeline's loop, and what diffusers asks of every scheduler."""

import copy
import json

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, UNet2DModel

from tasks import registry
from tasks.adapt import shortened, weighted
from tasks.models.gmm import GMM
from tasks.noise import RowNoise
from tasks.presets import PRESETS
from tasks.processes import VP, Flow
from tasks.sampler import Sampler
from tasks.schedule import SolverSchedule, Step
from tasks.scheduler import Network, UnifiedScheduler, process_config

# diffusers does numpy arithmetic on tensors in ways that numpy 2 deprecates.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context and return_scalar:DeprecationWarning"),
    # A loop over the compatible classes constructs those that diffusers deprecates.
    pytest.mark.filterwarnings("ignore:algorithm_type:FutureWarning"),
]

ROWS = 4
CLOSE = {"rtol": 0.0, "atol": 1e-5}


class Stream:
    """Draws of one generator in the order in which they are asked for."""

    num_rows = ROWS

    def __init__(self):
        self.generator = torch.Generator().manual_seed(1)

    def normal(self, shape, purpose):
        return torch.randn((ROWS, *shape), generator=self.generator)

    def at(self, step):
        return self


@pytest.fixture(scope="module", params=["digits", "digits_flow"])
def model(request):
    torch.set_num_threads(1)
    return registry.models.build(request.param).load("cpu")


@pytest.fixture(scope="module")
def digits():
    return registry.models.build("digits").load("cpu")


def labels_of(model):
    return torch.arange(ROWS) % 10 if model.num_classes else None


def scheduler_of(process, **config):
    kind = "flow_prediction" if isinstance(process, Flow) else "epsilon"
    return UnifiedScheduler(**(process_config(process) | {"prediction_type": kind} | config))


def network_of(model, times=()):
    return getattr(model, "network", None) or Network(model, times=times)


def own(model, times, fields, noise=None):
    """Solvus's run: where it starts and where it ends."""
    solver = registry.solvers.build({"name": "unified"} | fields)
    sampler = Sampler(model, solver, tuple(times), labels_of(model))
    state = sampler.start(RowNoise(0, torch.arange(ROWS)))
    begin, noise = state.x, noise or Stream()
    with torch.no_grad():
        for _ in range(sampler.num_steps):
            state = sampler.step(state, noise)
    return begin, state.x


def loop(scheduler, model, x, entries=None):
    """The denoising loop that every pipeline has."""
    plan = getattr(scheduler, "_plan", None)
    network = network_of(model, () if plan is None else plan.times)
    options = {"generator": torch.Generator().manual_seed(1)} if isinstance(scheduler, UnifiedScheduler) else {}
    with torch.no_grad():
        for t in scheduler.timesteps if entries is None else entries:
            output = network(scheduler.scale_model_input(x, t), t, labels_of(model)).sample
            x = scheduler.step(output, t, x, **options, return_dict=False)[0]
    return x


def gap(scheduler, model, times, fields):
    x, end = own(model, times, fields)
    return float((loop(scheduler, model, x) - end).abs().max())


def uniform(num_steps):
    return [1.0 - i / num_steps for i in range(num_steps)] + [0.0]


# --- it makes Solvus's own samples -----------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_makes_solvus_own_samples(model, preset):
    scheduler = scheduler_of(model.process, preset=preset)
    scheduler.set_timesteps(5)
    assert gap(scheduler, model, uniform(5), {"preset": preset}) < 1e-5


@pytest.mark.parametrize(
    "fields",
    [
        {"preset": "ddim", "eta": 0.5},
        {"preset": "ddim", "kappa": 1.0, "window": [1, 3]},
        {"preset": "dpmpp_2m", "kappa": 0.7},
        {"preset": "dpmpp_2s", "kappa": 0.7},
        {"preset": "heun", "churn": 3.0, "s_noise": 1.01},
        {"preset": "heun", "leading": 1},
        {"preset": "dpmpp_2m", "first": "noise"},
        {"preset": "unipc", "max_order": 2, "lower_order_final": False},
        {"preset": "dpmpp_2m", "hooks": [{"name": "dual_fast"}, {"name": "heavy_ball", "beta": 0.7}]},
        {"preset": "unipc", "hooks": [{"name": "compensation", "ratios": [1.0, 1.0, 1.2, 0.9, 1.1]}]},
    ],
    ids=str,
)
def test_settings_noise_and_hooks_are_carried(digits, fields):
    settings = {k: v for k, v in fields.items() if k not in ("preset", "hooks")}
    scheduler = scheduler_of(
        digits.process, preset=fields["preset"], settings=settings, hooks=fields.get("hooks"), grid="logsnr"
    )
    scheduler.set_timesteps(5)
    times = registry.times.build({"name": "logsnr", "num_steps": 5})(digits.process)
    assert gap(scheduler, digits, times, fields) < 1e-5


MIXED = (
    Step(),
    Step(order=2, prediction="eps", variable="rho", corrector="pseudo"),
    Step(order=2, corrector="implicit"),
    Step(call="reuse"),
    Step(order=2, kappa=0.5),
    Step(prediction="v", variable="u", churn=0.1),
    Step(call="reuse", prediction="eps"),
    Step(),
)
MIXED_TIMES = (1.0, 0.83, 0.7, 0.52, 0.44, 0.3, 0.2, 0.1, 0.0)


def test_a_schedule_with_every_kind_of_step_is_carried(digits):
    schedule = SolverSchedule(MIXED_TIMES, MIXED)
    scheduler = scheduler_of(digits.process, schedule=json.loads(schedule.to_json()))
    scheduler.set_timesteps(8)
    assert len(scheduler.timesteps) == schedule.nfe == 7  # the implicit step has two, reused predictions none
    fields = {"steps": [step.to_data() for step in MIXED]}
    assert gap(scheduler, digits, MIXED_TIMES, fields) < 1e-5
    assert scheduler.solver_schedule == schedule


@pytest.mark.parametrize("process", ["vp", "edm", "flow"])
def test_exact_models_in_the_dress_of_a_unet_give_solvus_own_samples(process):
    model = GMM(process=process).load("cpu")
    scheduler = scheduler_of(
        model.process, prediction_type="sample", preset="heun", grid={"name": "karras", "rho": 5.0}
    )
    scheduler.set_timesteps(6)
    times = registry.times.build({"name": "karras", "num_steps": 6, "rho": 5.0})(model.process)
    x, end = own(model, times, {"preset": "heun"})
    assert scheduler.init_noise_sigma == model.process.prior_std(1.0)
    torch.testing.assert_close(loop(scheduler, model, x), end, **CLOSE)


@pytest.mark.parametrize("prediction", ["sample", "v_prediction"])
def test_every_prediction_type_means_the_same(prediction):
    model = GMM().load("cpu")
    ends = []
    for kind in ("epsilon", prediction):
        scheduler = scheduler_of(model.process, prediction_type=kind)
        scheduler.set_timesteps(6)
        x = torch.randn(ROWS, 2, generator=torch.Generator().manual_seed(0))
        for t in scheduler.timesteps:
            x = scheduler.step(Network(model, kind)(x, t).sample, t, x).prev_sample
        ends.append(x)
    torch.testing.assert_close(*ends, **CLOSE)


# --- and those of stock classes, where a preset is one ---------------------------------------------------------------

NODES = [999, 870, 741, 600, 430, 333, 200, 90, 15]


@pytest.mark.parametrize(
    ("name", "config", "preset"),
    [
        ("DPMSolverMultistepScheduler", {"solver_order": 1}, "ddim"),
        ("DPMSolverMultistepScheduler", {"solver_order": 2}, "dpmpp_2m"),
        ("DPMSolverMultistepScheduler", {"solver_order": 3, "lower_order_final": False}, "dpmpp_3m_published"),
    ],
    ids=str,
)
def test_custom_timesteps_give_what_the_stock_class_gives(digits, name, config, preset):
    base = {k: v for k, v in process_config(digits.process).items()}
    stock = getattr(diffusers, name)(**base, **config)
    ours = scheduler_of(digits.process, preset=preset)
    stock.set_timesteps(timesteps=NODES)
    ours.set_timesteps(timesteps=NODES)
    assert ours.timesteps.tolist() == stock.timesteps.tolist() and ours.timesteps.dtype == torch.int64
    x = torch.randn(ROWS, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(loop(ours, digits, x), loop(stock, digits, x), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "config", "preset"),
    [
        ("DDIMScheduler", {"clip_sample": False}, "ddim"),
        ("UniPCMultistepScheduler", {"solver_order": 3}, "unipc"),
    ],
    ids=str,
)
def test_a_number_of_steps_gives_what_the_stock_class_gives_with_trailing_spacing(digits, name, config, preset):
    base = {k: v for k, v in process_config(digits.process).items()} | {"timestep_spacing": "trailing"}
    stock, ours = getattr(diffusers, name)(**base, **config), scheduler_of(digits.process, preset=preset)
    stock.set_timesteps(8)
    ours.set_timesteps(8)
    assert ours.timesteps.tolist() == stock.timesteps.tolist()
    x = torch.randn(ROWS, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(loop(ours, digits, x), loop(stock, digits, x), rtol=0, atol=1e-5)


def test_sigmas_of_a_flow_give_what_flow_match_euler_gives():
    model = registry.models.build("digits_flow").load("cpu")
    sigmas = [1.0, 0.8, 0.55, 0.3, 0.1]
    stock = diffusers.FlowMatchEulerDiscreteScheduler()
    ours = UnifiedScheduler.from_config(stock.config, preset="ddim")
    x = torch.randn(ROWS, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    stock.set_timesteps(sigmas=sigmas)
    ours.set_timesteps(sigmas=sigmas)
    torch.testing.assert_close(ours.timesteps, stock.timesteps)
    with torch.no_grad():
        y = x
        for t in stock.timesteps:
            y = stock.step(model.network(y, t, labels_of(model)).sample, t, y).prev_sample
    torch.testing.assert_close(loop(ours, model, x), y, rtol=0, atol=1e-5)


# --- what diffusers asks of a scheduler ------------------------------------------------------------------------------

CONFIGS = [
    {},
    {"preset": "heun", "grid": {"name": "karras", "rho": 5.0}},
    {"preset": "unipc", "settings": {"max_order": 2}, "beta_schedule": "squaredcos_cap_v2"},
    {"preset": "ddim", "settings": {"kappa": 1.0, "window": [0, 3]}},
    {"process": "flow", "prediction_type": "flow_prediction", "preset": "dpmpp_2s"},
    {"prediction_type": "v_prediction", "beta_start": 0.001, "num_train_timesteps": 500},
    {"schedule": json.loads(SolverSchedule((1.0, 0.5, 0.2, 0.0), (Step(), Step(order=2), Step())).to_json())},
]


def count_of(config):
    return 3 if "schedule" in config else 7


def fake_run(scheduler, count, dtype=torch.float32):
    """A whole run against a made-up network."""
    scheduler.set_timesteps(count)
    x = torch.linspace(-1, 1, 2 * 3 * 4 * 4).view(2, 3, 4, 4).to(dtype) * scheduler.init_noise_sigma
    generator = torch.Generator().manual_seed(0)
    for t in scheduler.timesteps:
        x = scheduler.step((0.1 * x + 0.01).to(dtype), t, x, generator=generator).prev_sample
    return x


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_saving_and_loading_gives_equal_steps_and_an_equal_configuration(config, tmp_path):
    scheduler = UnifiedScheduler(**config)
    scheduler.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["scheduler_config.json"]
    for again in (UnifiedScheduler.from_pretrained(tmp_path), UnifiedScheduler.from_config(scheduler.config)):
        assert torch.equal(fake_run(again, count_of(config)), fake_run(scheduler, count_of(config)))
    expected = {k: v for k, v in scheduler.config.items() if k != "_use_default_values"}
    loaded = UnifiedScheduler.from_pretrained(tmp_path)
    assert json.loads(json.dumps(dict(loaded.config))) == json.loads(json.dumps(expected))


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_changing_the_number_of_steps_in_the_middle_forgets_the_run(config):
    scheduler, count = UnifiedScheduler(**config), count_of(config)
    first = fake_run(scheduler, count)
    x = torch.ones(2, 3, 4, 4)
    for other in (count, 4) if "schedule" not in config else (count,):
        scheduler.set_timesteps(other)
        for t in scheduler.timesteps[:2]:
            x = scheduler.step(0.1 * x, t, x).prev_sample
        assert scheduler.step_index == 2
    assert torch.equal(fake_run(scheduler, count), first)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_samples_come_back_in_their_own_dtype_and_shape(dtype):
    scheduler = UnifiedScheduler(preset="unipc")
    out = fake_run(scheduler, 7, dtype)
    assert (out.dtype, out.shape) == (dtype, (2, 3, 4, 4))
    tolerance = {torch.float16: 5e-3, torch.bfloat16: 5e-2, torch.float64: 1e-6}[dtype]
    torch.testing.assert_close(out.float(), fake_run(scheduler, 7), rtol=tolerance, atol=tolerance)


def test_tuples_and_outputs_agree_and_later_steps_are_found_by_their_order():
    a, b = UnifiedScheduler(preset="heun"), UnifiedScheduler(preset="heun")
    a.set_timesteps(4)
    b.set_timesteps(4)
    assert a.timesteps.tolist() == [999, 749, 749, 499, 499, 249, 249] and a.order == 2
    x = y = torch.ones(1, 2)
    for t in a.timesteps:
        x, (y,) = a.step(0.1 * x, t, x).prev_sample, b.step(0.1 * y, t, y, return_dict=False)
        assert torch.equal(x, y)
    assert a.num_inference_steps == 4 and len(a) == 1000
    with pytest.raises(ValueError, match="all 7 entries of timesteps are done. Call set_timesteps"):
        a.step(x, 249, x)


def test_compatible_classes_take_the_configuration_and_give_it_back():
    scheduler = UnifiedScheduler(preset="unipc", beta_end=0.018)
    assert len(scheduler.compatibles) > 10
    for cls in scheduler.compatibles:
        try:
            other = cls.from_config(scheduler.config)
        except ImportError:  # a class whose own requirements are not installed
            continue
        assert getattr(other.config, "beta_end", 0.018) == 0.018
        again = UnifiedScheduler.from_config(other.config)
        assert (again.config.preset, again.config.beta_end) == ("unipc", 0.018)
    back = UnifiedScheduler.from_config(diffusers.DPMSolverMultistepScheduler(beta_end=0.03).config, preset="heun")
    assert (back.config.beta_end, back.config.preset) == (0.03, "heun")


def test_configurations_of_flows_are_recognised():
    flow = UnifiedScheduler.from_config(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0).config)
    assert flow.config.process == "flow" and flow.config.prediction_type == "flow_prediction"
    stock = diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    unified = UnifiedScheduler.from_config(stock.config)
    unified.set_timesteps(4)
    assert unified.timesteps.tolist() == [1000.0, 750.0, 500.0, 250.0] and unified.init_noise_sigma == 1.0


def test_unused_arguments_are_returned_and_no_keyword_is_deprecated():
    scheduler, unused = UnifiedScheduler.from_config({"preset": "ddim"}, return_unused_kwargs=True, colour="red")
    assert scheduler.config.preset == "ddim" and unused == {"colour": "red"}
    assert UnifiedScheduler._deprecated_kwargs == []


def test_trained_betas_are_the_betas():
    betas = np.linspace(0.0002, 0.03, 50)
    scheduler = UnifiedScheduler(trained_betas=betas, num_train_timesteps=50)
    x, noise = torch.ones(50, 1), torch.zeros(50, 1)
    kept = scheduler.add_noise(x, noise, torch.arange(50)).square()[:, 0]
    torch.testing.assert_close(kept, torch.from_numpy(np.cumprod(1 - betas)).float())
    torch.testing.assert_close(scheduler.betas, torch.from_numpy(betas).float())
    torch.testing.assert_close(UnifiedScheduler().alphas_cumprod, diffusers.DDPMScheduler().alphas_cumprod)
    scheduler.set_timesteps(5)
    assert scheduler.timesteps.tolist() == [49, 39, 29, 19, 9]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_noise_is_added_as_the_stock_class_adds_it(dtype):
    stock, ours = diffusers.DDPMScheduler(), UnifiedScheduler()
    x, noise = torch.randn(3, 2, 4, 4).to(dtype), torch.randn(3, 2, 4, 4).to(dtype)
    steps = torch.tensor([0, 500, 999])
    added = ours.add_noise(x, noise, steps)
    assert added.dtype == dtype
    # The stock class takes its square roots in the dtype of the samples, which costs half precision its digits.
    expected = stock.add_noise(x.float(), noise.float(), steps).to(dtype)
    torch.testing.assert_close(added, expected, rtol=2e-3, atol=2e-3)
    flow = UnifiedScheduler(process="flow", prediction_type="flow_prediction")
    torch.testing.assert_close(flow.add_noise(x, noise, torch.tensor([500.0] * 3)), (x + noise) / 2)


def test_a_scheduler_can_be_copied_in_mid_run():
    scheduler = UnifiedScheduler(preset="unipc")
    scheduler.set_timesteps(5)
    x = torch.ones(1, 3)
    for t in scheduler.timesteps[:2]:
        x = scheduler.step(0.1 * x, t, x).prev_sample
    other, t = copy.deepcopy(scheduler), scheduler.timesteps[2]
    assert torch.equal(scheduler.step(0.1 * x, t, x).prev_sample, other.step(0.1 * x, t, x).prev_sample)


# --- beginning in the middle -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["ddim", "dpmpp_2m", "unipc", "dpmpp_3m", "dpmpp_2s", "pndm", "heun"])
def test_a_run_that_begins_later_equals_one_over_the_rest_of_the_schedule(digits, preset):
    scheduler = scheduler_of(digits.process, preset=preset)
    scheduler.set_timesteps(5)
    k = 2 * scheduler.order
    i = scheduler._entries[k][1]
    rest = shortened(scheduler.solver_schedule, i)
    x = torch.randn(ROWS, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    other = scheduler_of(digits.process, schedule=json.loads(rest.to_json()))
    other.set_timesteps()
    expected = loop(other, digits, x)
    torch.testing.assert_close(loop(scheduler, digits, x, scheduler.timesteps[k:]), expected)
    scheduler.set_timesteps(5)
    scheduler.set_begin_index(k)
    assert scheduler.begin_index == k
    torch.testing.assert_close(loop(scheduler, digits, x, scheduler.timesteps[k:]), expected)
    assert rest.steps[0].order == 1 and torch.isfinite(expected).all()


def test_a_schedule_in_weights_steps_a_stock_loop_but_cannot_begin_later(digits):
    scheduler = scheduler_of(digits.process, preset="unipc")
    scheduler.set_timesteps(5)
    made = weighted(digits.process, scheduler.solver_schedule, "v")
    x = torch.randn(ROWS, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    other = scheduler_of(digits.process, schedule=json.loads(made.to_json()))
    other.set_timesteps()
    torch.testing.assert_close(loop(other, digits, x), loop(scheduler, digits, x), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="step 2 has weights of what came before step 2.*strength 1"):
        shortened(made, 2)


def test_a_repeated_timestep_is_the_start_of_a_step_when_a_run_begins_there():
    scheduler = UnifiedScheduler(preset="heun")
    scheduler.set_timesteps(4)
    assert [scheduler.index_for_timestep(t) for t in (999, 749, 499)] == [0, 2, 4]
    scheduler.set_begin_index(1)
    with pytest.raises(ValueError, match="entry 1 of timesteps is the second evaluation of a step"):
        scheduler.step(torch.ones(1, 2), 749, torch.ones(1, 2))
    with pytest.raises(ValueError, match=r"timestep 5 is none of \[999, 749"):
        scheduler.index_for_timestep(5)


# --- inside a real pipeline ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    ).eval()  # fmt: skip


def images(pipe, num_steps):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe(batch_size=2, generator=generator, num_inference_steps=num_steps, output_type="pt").images


@pytest.mark.parametrize("preset", ["ddim", "unipc", "dpmpp_2m_sde", "heun"])
def test_a_stock_pipeline_runs_it_and_survives_being_saved(unet, preset, tmp_path):
    pipe = DDPMPipeline(unet=unet, scheduler=UnifiedScheduler(preset=preset))
    made = images(pipe, 6)
    assert torch.isfinite(made).all() and made.shape == (2, 1, 8, 8)
    pipe.save_pretrained(tmp_path)
    again = DDPMPipeline.from_pretrained(tmp_path)
    assert type(again.scheduler) is UnifiedScheduler
    assert torch.equal(images(again, 6), made)


def test_a_stock_pipeline_makes_the_same_images_as_with_the_stock_class(unet):
    stock = diffusers.DPMSolverMultistepScheduler(timestep_spacing="trailing")
    theirs = images(DDPMPipeline(unet=unet, scheduler=stock), 10)
    ours = images(DDPMPipeline(unet=unet, scheduler=UnifiedScheduler(preset="dpmpp_2m")), 10)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


# --- what is refused -------------------------------------------------------------------------------------------------

FIXED = {"schedule": json.loads(SolverSchedule((1.0, 0.5, 0.0), (Step(), Step())).to_json())}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"prediction_type": "eps"}, "unknown prediction_type 'eps'"),
        ({"process": "ve"}, "unknown process 've', did you mean 'vp'\\? Allowed: vp, flow, edm"),
        ({"process": "flow"}, "prediction_type epsilon says nothing about the data at the start of a flow"),
        ({"beta_schedule": "exp"}, "unknown beta schedule 'exp'"),
        ({"rescale_betas_zero_snr": True}, "not supported here"),
        ({"preset": "dpmpp"}, "unknown preset 'dpmpp'"),
        ({"settings": {"ordre": 2}}, "field of solver 'unified': 'ordre'"),
        (FIXED | {"settings": {"kappa": 1.0}}, "solver.steps says everything"),
        ({"schedule": {"times": [1.0, 0.0]}}, "a schedule needs times and steps"),
        ({"grid": "gits"}, "grid gits cannot be laid by a scheduler"),
        ({"hooks": [{"name": "time_shift"}]}, "hook time_shift changes what the network is told"),
        ({"hooks": [{"name": "compensation"}]}, "hook compensation has to look at the model first"),
    ],
    ids=str,
)
def test_a_configuration_that_cannot_run_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        UnifiedScheduler(**config)


@pytest.mark.parametrize(
    ("config", "arguments", "message"),
    [
        (FIXED, {"num_inference_steps": 3}, "a schedule of 2 steps, got num_inference_steps=3. Allowed: 2 or None"),
        (FIXED, {"timesteps": [999, 10]}, "takes no timesteps"),
        ({}, {}, "exactly one of num_inference_steps, timesteps and sigmas, got none"),
        ({}, {"num_inference_steps": 2, "timesteps": [999]}, "got num_inference_steps, timesteps"),
        ({}, {"num_inference_steps": 0}, "a whole number of at least 1, got 0"),
        ({}, {"timesteps": [10, 999]}, "timesteps must decrease"),
        ({}, {"timesteps": [1500]}, "timesteps must decrease from at most pure noise"),
        ({}, {"sigmas": [1.0]}, "sigmas are times of a flow"),
        ({"grid": {"name": "ratios", "ratios": [0.5]}}, {"num_inference_steps": 3}, "grid ratios has 2 steps"),
    ],
    ids=str,
)
def test_times_that_cannot_be_done_are_refused(config, arguments, message):
    with pytest.raises(ValueError, match=message):
        UnifiedScheduler(**config).set_timesteps(**arguments)


def test_steps_out_of_place_are_refused():
    scheduler, x = UnifiedScheduler(), torch.ones(1, 2)
    with pytest.raises(ValueError, match="no times are set. Call set_timesteps"):
        scheduler.step(x, 999, x)
    scheduler.set_timesteps(3)
    with pytest.raises(ValueError, match=r"model_output has shape \(1, 4\), but the sample \(1, 2\)"):
        scheduler.step(torch.ones(1, 4), 999, x)
    lead = UnifiedScheduler(settings={"first": "noise"})
    lead.set_timesteps(3)
    with pytest.raises(ValueError, match="made by scale_model_input, which was not called"):
        lead.step(x, lead.timesteps[0], x)
    stochastic = UnifiedScheduler(preset="ddim", settings={"first": "noise", "kappa": 1.0})
    with pytest.raises(ValueError, match="comes before the first evaluation and draws noise"):
        stochastic.set_timesteps(3)


def test_processes_have_their_words_and_others_are_refused():
    assert process_config(VP())["beta_schedule"] == "linear" and process_config(Flow())["process"] == "flow"
    with pytest.raises(ValueError, match="steps VP, flow and EDM processes, not MeanReverting"):
        process_config(GMM(process="mr").noising)

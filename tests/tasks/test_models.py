"""Models: exact posteriors against brute force, guidance, and checkpoints that are and are not one."""

import itertools
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import integrate, stats

import tasks
from tasks import registry
from tasks.checkpoint import Checkpoint
from tasks.data import digits as digits_data
from tasks.models.gmm import GMM
from tasks.models.table import Table
from tasks.processes import VP, Flow, to_x0
from tasks.recipe import Recipe
from tasks.run import generate

WEIGHTS = Path(tasks.__file__).parent / "weights"
PROCESSES = ["vp", "edm", "flow"]


def times_of(process):
    """A late, a middle and an early time of each process."""
    return {"vp": (0.05, 0.3, 0.9), "edm": (0.002, 0.02, 0.5), "flow": (0.05, 0.5, 0.95)}[process]


# --- Gaussian mixtures -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("process", PROCESSES)
def test_posterior_mean_in_one_dimension_is_the_integral(process):
    weights, means, variances = (0.3, 0.7), (-1.0, 0.8), (0.16, 0.25)
    spec = GMM(
        process=process, weights=weights, means=tuple((m,) for m in means), covariances=tuple((v,) for v in variances)
    )
    model = spec.load("cpu")
    for t in times_of(process):
        alpha, sigma = model.process.alpha(t), model.process.sigma(t)
        for x in alpha * np.array([-1.5, -0.2, 0.4, 1.1]) + 0.3 * sigma:

            def joint(x0, x=x, alpha=alpha, sigma=sigma):
                data = sum(
                    w * stats.norm.pdf(x0, m, math.sqrt(v)) for w, m, v in zip(weights, means, variances, strict=True)
                )
                return data * stats.norm.pdf(x, alpha * x0, sigma)

            grid = np.linspace(-6, 6, 200_001)
            values = joint(grid)
            density = integrate.simpson(values, x=grid)
            mean = integrate.simpson(grid * values, x=grid) / density
            state = torch.tensor([[x]], dtype=torch.float64)
            assert model.denoise(state, t).item() == pytest.approx(mean, rel=1e-9, abs=1e-9)
            assert model.log_density(state, t).item() == pytest.approx(math.log(density), rel=1e-9)


@pytest.mark.parametrize("process", PROCESSES)
def test_posterior_mean_in_two_dimensions_is_that_of_weighted_draws(process):
    spec = GMM(process=process, seed=3)
    model, (x0, _) = spec.load("cpu"), spec.reference(400_000)
    t = times_of(process)[1]
    alpha, sigma = model.process.alpha(t), model.process.sigma(t)
    for point in ((0.2, -0.1), (-0.5, 0.5)):
        x = alpha * np.array(point)
        logits = -((x - alpha * x0) ** 2).sum(1) / (2 * sigma**2)
        weight = np.exp(logits - logits.max())
        weight /= weight.sum()
        mean = weight @ x0
        # Self-normalised importance sampling: the variance of a weighted mean is the sum of w^2 (x - mean)^2.
        error = np.sqrt((weight[:, None] ** 2 * (x0 - mean) ** 2).sum(0))
        found = model.denoise(torch.tensor(x[None]), t)[0].numpy()
        assert (np.abs(found - mean) < 5 * error).all()
        assert (error < 0.02).all()


def test_posterior_mean_of_one_gaussian_is_the_kalman_update():
    covariance = np.array([[0.5, 0.2], [0.2, 0.3]])
    spec = GMM(means=((1.0, -2.0),), covariances=(tuple(map(tuple, covariance)),))
    model, t = spec.load("cpu"), 0.4
    alpha, sigma = model.process.alpha(t), model.process.sigma(t)
    x = np.array([[0.3, 0.1], [2.0, -1.0]])
    gain = alpha * covariance @ np.linalg.inv(alpha**2 * covariance + sigma**2 * np.eye(2))
    expected = np.array([1.0, -2.0]) + (x - alpha * np.array([1.0, -2.0])) @ gain.T
    np.testing.assert_allclose(model.denoise(torch.tensor(x), t), expected, rtol=1e-12)


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("labels", [False, True])
def test_score_is_the_gradient_of_the_log_density(process, labels):
    model = GMM(process=process, labels=labels, seed=1).load("cpu")
    cond = torch.tensor([0, 1, 2, 3]) if labels else None  # 3 means no label
    for t in times_of(process):
        x = (0.3 * torch.randn(4, 2, generator=torch.Generator().manual_seed(0)).double()).requires_grad_()
        (gradient,) = torch.autograd.grad(model.log_density(x, t, cond).sum(), x)
        torch.testing.assert_close(model.score(x.detach(), t, cond), gradient, rtol=1e-8, atol=1e-8)


def test_log_density_integrates_to_one():
    model = GMM().load("cpu")
    axis = torch.linspace(-6, 6, 601, dtype=torch.float64)
    x = torch.cartesian_prod(axis, axis)
    for t in (0.05, 0.5):
        assert model.log_density(x, t).exp().sum().item() * 0.02**2 == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("process", PROCESSES)
def test_at_pure_noise_and_at_clean_data_the_posterior_mean_is_known(process):
    spec = GMM(process=process)
    model, mean = spec.load("cpu"), spec.moments()[0]
    x = spec.reference(8)[0].astype(np.float64)
    np.testing.assert_allclose(model.denoise(torch.tensor(x), 0.0), x, rtol=1e-12)
    if process == "flow":
        np.testing.assert_allclose(model.denoise(torch.tensor(x), 1.0), np.tile(mean, (8, 1)), rtol=1e-12)


@pytest.mark.parametrize(
    "spec",
    [
        GMM(),
        GMM(dim=3, num_components=5, seed=2),
        GMM(means=((0.0, 1.0), (2.0, 3.0)), covariances=(0.5, 2.0), weights=(1.0, 3.0)),
        GMM(fit="digits", ridge=0.02),
    ],
    ids=["random", "random_3d", "given", "digits"],
)
def test_moments_are_those_of_reference_draws(spec):
    count = 20_000
    samples, component = spec.reference(count)
    weights, means, covariances = spec.parameters
    mean, covariance = spec.moments()
    variance = np.diag(covariance)
    assert (np.abs(samples.mean(0) - mean) < 5 * np.sqrt(variance / count)).all()
    # The variance of a sample variance from its own fourth moment.
    centred = samples - mean
    spread = np.sqrt((centred**2).var(0) / count)
    assert (np.abs((centred**2).mean(0) - variance) < 5 * spread + 1e-9).all()
    cross = np.sqrt((centred[:, 0] * centred[:, 1]).var() / count)
    assert abs((centred[:, 0] * centred[:, 1]).mean() - covariance[0, 1]) < 5 * cross + 1e-9
    share = np.bincount(component, minlength=len(weights)) / count
    assert (np.abs(share - weights) < 5 * np.sqrt(weights * (1 - weights) / count)).all()
    assert weights.sum() == pytest.approx(1)
    assert samples.dtype == np.float32
    again, _ = spec.reference(count)
    np.testing.assert_array_equal(samples, again)


def test_covariances_may_be_matrices_variances_or_deviations():
    by_matrix = GMM(means=((0.0, 0.0),), covariances=(((4.0, 0.0), (0.0, 4.0)),))
    by_variance = GMM(means=((0.0, 0.0),), covariances=((4.0, 4.0),))
    by_deviation = GMM(means=((0.0, 0.0),), covariances=(2.0,))
    for spec in (by_variance, by_deviation):
        np.testing.assert_array_equal(spec.parameters[2], by_matrix.parameters[2])


def test_a_label_picks_its_component():
    spec = GMM(labels=True)
    weights, means, covariances = spec.parameters
    model, x = spec.load("cpu"), torch.randn(5, 2, generator=torch.Generator().manual_seed(0)).double()
    assert spec.num_classes == model.num_classes == 3
    for k in range(3):
        alone = GMM(means=(tuple(means[k]),), covariances=(tuple(map(tuple, covariances[k])),)).load("cpu")
        given = model.denoise(x, 0.4, torch.full((5,), k))
        torch.testing.assert_close(given, alone.denoise(x, 0.4), rtol=1e-12, atol=1e-12)
    free = model.denoise(x, 0.4, torch.full((5,), 3))
    torch.testing.assert_close(free, GMM().load("cpu").denoise(x, 0.4), rtol=1e-12, atol=1e-12)
    mixed = model.denoise(x, 0.4, torch.tensor([0, 1, 2, 3, 0]))
    torch.testing.assert_close(mixed[3], free[3])
    torch.testing.assert_close(mixed[1], model.denoise(x, 0.4, torch.full((5,), 1))[1])


def test_the_unconditional_mean_is_the_mixture_of_the_conditional_ones():
    spec = GMM(labels=True, seed=5)
    model, x = spec.load("cpu"), torch.randn(6, 2, generator=torch.Generator().manual_seed(1)).double()
    t = 0.3
    conditional = torch.stack([model.denoise(x, t, torch.full((6,), k)) for k in range(3)])
    # With a label the log density keeps the component's weight, so the responsibilities are a softmax over labels.
    joint = torch.stack([model.log_density(x, t, torch.full((6,), k)) for k in range(3)])
    mixed = (torch.softmax(joint, 0)[..., None] * conditional).sum(0)
    torch.testing.assert_close(model.denoise(x, t), mixed, rtol=1e-10, atol=1e-10)


def test_answers_come_in_the_dtype_of_the_state():
    model, x = GMM().load("cpu"), torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
    assert model.denoise(x, 0.5).dtype == torch.float32
    torch.testing.assert_close(model.denoise(x, 0.5), model.denoise(x.double(), 0.5).float(), rtol=0, atol=0)


def test_mixture_fitted_to_the_digits_has_their_moments():
    spec = GMM(fit="digits", ridge=0.01)
    pixels = digits_data.images().reshape(-1, 64).astype(np.float64)
    mean, covariance = spec.moments()
    np.testing.assert_allclose(mean, pixels.mean(0), atol=1e-12)
    np.testing.assert_allclose(covariance, np.cov(pixels.T, bias=True) + 0.01 * np.eye(64), atol=1e-10)


# --- guidance --------------------------------------------------------------------------------------------------------


class Counting:
    def __init__(self, model):
        self._model, self.calls = model, 0

    def __getattr__(self, name):
        return getattr(self._model, name)

    def denoise(self, x, t, cond):
        self.calls += 1
        return self._model.denoise(x, t, cond)


@pytest.fixture(params=["gmm", "digits"])
def labelled(request):
    if request.param == "gmm":
        return GMM(labels=True).load("cpu"), torch.randn(6, 2, generator=torch.Generator().manual_seed(0))
    model = registry.models.build("digits").load("cpu")
    return model, torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 3.0])
def test_guidance_extrapolates_from_unconditional_to_conditional(labelled, scale):
    model, x = labelled
    cond = torch.tensor([0, 1, 2, 0, 1, 2])
    guided = registry.guidance.build({"name": "cfg", "scale": scale}).wrap(model).denoise(x, 0.4, cond)
    conditional = model.denoise(x, 0.4, cond)
    unconditional = model.denoise(x, 0.4, torch.full_like(cond, model.num_classes))
    assert not torch.allclose(conditional, unconditional, atol=1e-3)
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(guided, (1 - scale) * unconditional + scale * conditional, **close)
    if scale == 1.0:
        torch.testing.assert_close(guided, conditional, **close)
    if scale == 0.0:
        torch.testing.assert_close(guided, unconditional, **close)


def test_guidance_asks_twice_and_passes_everything_else_through():
    model = Counting(GMM(labels=True).load("cpu"))
    plugin = registry.guidance.build("cfg")
    guided = plugin.wrap(model)
    guided.denoise(torch.zeros(2, 2), 0.5, torch.zeros(2, dtype=torch.int64))
    assert model.calls == plugin.evaluations == 2
    assert guided.shape == (2,)
    assert guided.num_classes == 3
    assert guided.process is model.process


def test_guidance_needs_labels():
    guided = registry.guidance.build("cfg").wrap(GMM(labels=True).load("cpu"))
    with pytest.raises(ValueError, match="guidance needs labels, but this row has none. Set labels=cycle"):
        guided.denoise(torch.zeros(2, 2), 0.5, None)


def test_no_guidance_is_the_model_itself():
    model = GMM().load("cpu")
    assert registry.guidance.build("none").wrap(model) is model


# --- tokens ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [Table(), Table(vocabulary=2, length=3, seed=4)], ids=["default", "binary"])
def test_masked_posterior_is_the_conditional_probability(spec):
    model, mask = spec.load("cpu"), spec.vocabulary
    joint = {tuple(string): p for string, p in zip(spec.strings.tolist(), spec.joint, strict=True)}
    assert sum(joint.values()) == pytest.approx(1)
    states = list(itertools.product(range(spec.vocabulary + 1), repeat=spec.length))
    found = model.denoise(torch.tensor(states), 0.5).numpy()
    assert found.dtype == np.float64
    for state, probabilities in zip(
        states[:: max(1, len(states) // 60)], found[:: max(1, len(states) // 60)], strict=True
    ):
        agree = {s: p for s, p in joint.items() if all(x in (mask, v) for x, v in zip(state, s, strict=True))}
        total = sum(agree.values())
        for position, value in itertools.product(range(spec.length), range(spec.vocabulary)):
            expected = sum(p for s, p in agree.items() if s[position] == value) / total
            assert probabilities[position, value] == pytest.approx(expected, abs=1e-12)


def test_a_revealed_token_is_certain():
    model = Table(vocabulary=3, length=4).load("cpu")
    found = model.denoise(torch.tensor([[2, 3, 0, 3]]), 0.5)[0]
    assert found[0].tolist() == pytest.approx([0, 0, 1])
    assert found[2].tolist() == pytest.approx([1, 0, 0])
    torch.testing.assert_close(found.sum(-1), torch.ones(4, dtype=torch.float64))


def test_reference_strings_follow_the_table():
    spec, count = Table(), 20_000
    samples, labels = spec.reference(count)
    place = 3 ** np.arange(3, -1, -1)
    share = np.bincount(samples @ place, minlength=81) / count
    np.testing.assert_array_equal(spec.strings @ place, np.arange(81))
    assert (np.abs(share - spec.joint) <= 5 * np.sqrt(spec.joint * (1 - spec.joint) / count) + 1e-12).all()
    assert (labels == 0).all()


def test_given_probabilities_are_normalised():
    spec = Table(vocabulary=2, length=1, probabilities=(1.0, 3.0))
    np.testing.assert_allclose(spec.joint, [0.25, 0.75])


# --- the embedded networks -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["digits", "digits_flow"])
def test_an_image_with_little_noise_is_nearly_unchanged(name):
    model = registry.models.build(name).load("cpu")
    images, labels = (torch.from_numpy(a[:16]) for a in registry.models.build(name).reference())
    t = model.process.t_min
    alpha, sigma = model.process.alpha(t), model.process.sigma(t)
    noisy = alpha * images + sigma * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    clean = model.denoise(noisy, t, labels)
    assert clean.shape == images.shape
    # x0_hat = (x - sigma eps_hat) / alpha: off by about sigma where the network predicts unit-variance noise.
    assert (clean - images).square().mean().sqrt() < 2 * sigma
    assert (clean - noisy / alpha).square().mean().sqrt() < 3 * sigma


@pytest.mark.parametrize("name", ["digits", "digits_flow"])
def test_the_network_was_trained_to_this_schedule(name):
    # Denoising at an early time beats the best guess that ignores the state, the class mean, by far; a wrong schedule,
    # time or parametrisation would not.
    model = registry.models.build(name).load("cpu")
    every, every_label = (torch.from_numpy(a) for a in registry.models.build(name).reference())
    images, labels = every[:64], every_label[:64]
    means = torch.stack([every[every_label == k].mean(0) for k in range(10)])
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    for t in (0.1, 0.3):
        x = model.process.alpha(t) * images + model.process.sigma(t) * noise
        error = (model.denoise(x, t, labels) - images).square().mean()
        assert error < 0.5 * (means[labels] - images).square().mean()


def test_embedded_models_describe_themselves_without_loading():
    digits, flow = registry.models.build("digits"), registry.models.build("digits_flow")
    for plugin in (digits, flow):
        assert plugin.shape == (1, 8, 8)
        assert plugin.num_classes == 10
        assert plugin.kind == "image"
        assert len(plugin.revision) == 16
    assert digits.noising == VP("scaled_linear", 0.00085, 0.016, 1000)
    assert flow.noising == Flow(1000)
    assert digits.revision != flow.revision


def test_no_label_is_the_last_embedding():
    model = registry.models.build("digits").load("cpu")
    x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model.denoise(x, 0.5, None), model.denoise(x, 0.5, torch.full((4,), 10)))
    assert not torch.allclose(model.denoise(x, 0.5, None), model.denoise(x, 0.5, torch.zeros(4, dtype=torch.int64)))


def test_decoded_images_lie_between_minus_one_and_one():
    model = registry.models.build("digits").load("cpu")
    assert model.decode(torch.tensor([-3.0, 0.25, 2.0])).tolist() == [-1.0, 0.25, 1.0]


def test_reference_images_are_the_digits():
    images, labels = registry.models.build("digits").reference()
    assert images.shape == (1797, 1, 8, 8)
    assert images.min() == -1
    assert images.max() == 1
    assert sorted(set(labels.tolist())) == list(range(10))


def test_the_network_is_told_the_models_time_and_labels(monkeypatch):
    model = registry.models.build("digits").load("cpu")
    seen = {}

    def network(x, time, labels):
        seen.update(x=x, time=time, labels=labels)

        class Output:
            sample = torch.zeros_like(x)

        return Output()

    monkeypatch.setattr(model, "network", network)
    x = torch.ones(3, 1, 8, 8, dtype=torch.float64)
    out = model.denoise(x, 0.2505, torch.tensor([1, 2, 3]))
    assert seen["time"].tolist() == pytest.approx([249.5] * 3)
    assert seen["labels"].tolist() == [1, 2, 3]
    assert seen["x"].dtype == torch.float32
    assert out.dtype == torch.float64
    torch.testing.assert_close(out, x / model.process.alpha(0.2505))


# --- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.fixture
def copy(tmp_path):
    """A copy of the digits checkpoint that a test may damage."""
    shutil.copytree(WEIGHTS / "digits", tmp_path / "model")
    return tmp_path / "model"


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def load(folder, **fields):
    return registry.models.build({"name": "unet", "path": str(folder)} | fields).load("cpu")


def rows(model):
    fields = {"solver": "ddim", "times": {"name": "uniform", "num_steps": 2}, "guidance": "none", "strategy": "single"}
    return generate(Recipe(model=model, batch_size=16, **fields).completed(), 0, 20)


def test_a_unet_at_the_digits_folder_gives_the_rows_of_digits():
    embedded = rows({"name": "digits"})
    for model in (
        {"name": "unet", "path": str(WEIGHTS / "digits")},
        {"name": "digits", "path": str(WEIGHTS / "digits")},
    ):
        found = rows(model)
        for name in ("x0", "label", "nfe", "sample_id"):
            np.testing.assert_array_equal(found[name], embedded[name])


def test_a_bare_unet_folder_takes_its_schedule_from_the_recipe(copy):
    schedule = json.loads((copy / "scheduler" / "scheduler_config.json").read_text())
    keys = ("beta_schedule", "beta_start", "beta_end", "prediction_type", "num_train_timesteps")
    plugin = registry.models.build(
        {"name": "unet", "path": str(copy / "unet"), "scheduler": {k: schedule[k] for k in keys}}
    )
    assert plugin.noising == registry.models.build("digits").noising
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(plugin.load("cpu").denoise(x, 0.5), registry.models.build("digits").load("cpu").denoise(x, 0.5))


def test_a_field_that_no_scheduler_has_is_refused():
    with pytest.raises(ValueError, match="unknown field of model.scheduler: 'beta_strat', did you mean 'beta_start'"):
        load(WEIGHTS / "digits", scheduler={"beta_strat": 0.1})


def test_a_folder_without_a_scheduler_is_refused(copy):
    shutil.rmtree(copy / "scheduler")
    with pytest.raises(ValueError, match="has no scheduler/scheduler_config.json; set model.scheduler, for example"):
        load(copy)


def test_truncated_weights_are_refused(copy):
    weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
    for size in (0, 5, 1000, weights.stat().st_size - 1):
        weights.write_bytes((WEIGHTS / "digits" / "unet" / weights.name).read_bytes()[:size])
        with pytest.raises(ValueError, match=f"{weights.name} is damaged: .* Save or copy the model again"):
            load(copy)


@pytest.mark.parametrize(
    "changes",
    [
        {"in_channels": 3, "out_channels": 3},
        {"block_out_channels": [32, 48]},
        {"layers_per_block": 2},
        {"num_class_embeds": 5},
    ],
    ids=str,
)
def test_weights_that_do_not_fit_the_configuration_are_refused(copy, changes):
    edit(copy / "unet" / "config.json", **changes)
    with pytest.raises(ValueError, match=r"safetensors does not fit .*config.json: \S"):
        load(copy)


def test_missing_weights_are_refused_and_pickles_are_not_loaded(copy):
    weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_name("diffusion_pytorch_model.bin"))
    with pytest.raises(ValueError, match="has no diffusion_pytorch_model.safetensors; pickled weights are not loaded"):
        load(copy)


def test_a_folder_without_a_configuration_is_refused(copy):
    (copy / "unet" / "config.json").unlink()
    with pytest.raises(ValueError, match="has no config.json, so it is not a diffusers UNet"):
        load(copy)


@pytest.mark.parametrize("text", ["{", "", "\xff", "[]", "null", "3"])
@pytest.mark.parametrize("file", ["unet/config.json", "scheduler/scheduler_config.json"])
def test_a_configuration_that_is_no_configuration_is_refused(copy, file, text):
    (copy / file).write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=Path(file).name):
        load(copy)


@pytest.mark.parametrize("missing", ["sample_size", "in_channels"])
def test_a_configuration_that_lacks_the_shape_is_refused(copy, missing):
    file = copy / "unet" / "config.json"
    config = json.loads(file.read_text())
    del config[missing]
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=missing):
        _ = registry.models.build({"name": "unet", "path": str(copy)}).shape


def test_another_kind_of_network_is_refused(copy):
    edit(copy / "unet" / "config.json", _class_name="UNet2DConditionModel")
    with pytest.raises(ValueError, match="describes a 'UNet2DConditionModel', not a UNet2DModel"):
        load(copy)


def refused_when_planning(folder):
    fields = {"solver": "ddim", "times": "uniform", "guidance": "none", "strategy": "single"}
    Recipe(model={"name": "unet", "path": str(folder)}, **fields).completed().check()


@pytest.mark.parametrize(
    "changes",
    [
        {"beta_schedule": "sigmoid"},
        {"prediction_type": "velocity"},
        {"rescale_betas_zero_snr": True},
        {"trained_betas": [0.1, 0.2]},
        {"_class_name": "ScoreSdeVeScheduler"},
        {"_class_name": "EDMEulerScheduler"},
        {"_class_name": "CMStochasticIterativeScheduler"},
    ],
    ids=lambda c: "-".join(map(str, c.values())),
)
def test_a_noise_schedule_that_is_not_understood_is_refused_when_planning(copy, changes):
    # To sample such a network with the default betas would give numbers that look right.
    edit(copy / "scheduler" / "scheduler_config.json", **changes)
    with pytest.raises(ValueError, match="schedul|prediction|betas"):
        refused_when_planning(copy)


def test_a_damaged_embedded_model_says_which_file(copy):
    weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    plugin = registry.models.build({"name": "digits", "path": str(copy)})
    with pytest.raises(ValueError, match="diffusion_pytorch_model.safetensors is damaged"):
        plugin.load("cpu")


def test_the_revision_follows_weights_and_configuration(copy):
    first = Checkpoint(copy).revision
    assert first == registry.models.build("digits").revision
    edit(copy / "scheduler" / "scheduler_config.json", beta_end=0.02)
    second = Checkpoint(copy).revision
    weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert len({first, second, Checkpoint(copy).revision}) == 3


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_every_prediction_type_becomes_the_clean_prediction(copy, kind):
    edit(copy / "scheduler" / "scheduler_config.json", prediction_type=kind)
    model, x = load(copy), torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    raw = model.network(x, torch.full((3,), 399.0), torch.full((3,), 10)).sample
    alpha, sigma = model.process.alpha(0.4), model.process.sigma(0.4)
    expected = {"epsilon": (x - sigma * raw) / alpha, "sample": raw, "v_prediction": alpha * x - sigma * raw}[kind]
    torch.testing.assert_close(model.denoise(x, 0.4), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.denoise(x, 0.4), to_x0(kind, x, raw, alpha, sigma), rtol=1e-6, atol=1e-6)


def test_reference_data_must_be_named():
    path = str(WEIGHTS / "digits")
    with pytest.raises(ValueError, match="brings no data to compare samples with. Set model.data to a folder"):
        registry.models.build({"name": "unet", "path": path}).reference()
    images, _ = registry.models.build({"name": "unet", "path": path, "data": "digits"}).reference()
    assert len(images) == 1797


def test_unknown_reference_data_is_refused_when_planning():
    with pytest.raises(ValueError, match="model.data .*'cifar10'"):
        registry.models.build({"name": "unet", "path": str(WEIGHTS / "digits"), "data": "cifar10"}).check_data()

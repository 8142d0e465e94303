"""Rewards against closed forms."""

import io

import numpy as np
import pytest
import tiny_weights
import torch
from PIL import Image

from tasks import registry
from tasks.recipe import scorer_identity

IMAGES = torch.linspace(-1, 1, 6 * 64).view(6, 1, 8, 8).sin()


def build(name, **fields):
    return registry.rewards.build({"name": name} | fields)


def test_quadratic_and_linear_are_their_formulas():
    x = torch.tensor([[1.0, 2.0], [0.0, -1.0]])
    expected = [-(0.25 + 0.25) / 4, -(2.25 + 6.25) / 4]
    np.testing.assert_allclose(build("quadratic", center=1.5, q=2.0)(x, None), expected)
    np.testing.assert_allclose(build("linear", slope=-2.0)(x, None), [-6.0, 2.0])


def test_symmetry_is_zero_for_a_symmetric_image_only():
    symmetric = IMAGES + IMAGES.flip(-1)
    values = build("symmetry")(torch.cat([symmetric, IMAGES]), None)
    assert values[:6].abs().max() < 1e-12
    assert (values[6:] < -1e-4).all()


def test_symmetry_is_the_mean_square_of_the_difference():
    x = torch.tensor([[[[1.0, 0.0]]]])
    assert build("symmetry")(x, None).item() == -1.0


def test_jpeg_prefers_smooth_images_and_counts_bytes():
    noise = torch.from_numpy(np.random.default_rng(0).uniform(-1, 1, (1, 3, 32, 32)))
    flat = torch.zeros(1, 3, 32, 32)
    reward = build("jpeg_compressibility", quality=80)
    values = reward(torch.cat([noise, flat.double()]), None)
    assert values[1] > values[0]
    buffer = io.BytesIO()
    pixels = ((noise[0].float() + 1) * 127.5).round().to(torch.uint8).numpy().transpose(1, 2, 0)
    Image.fromarray(pixels).save(buffer, format="JPEG", quality=80)
    assert values[0].item() == -len(buffer.getvalue()) / 1000
    assert torch.equal(reward(noise, None), values[:1])


def test_a_lower_quality_compresses_more():
    images = torch.from_numpy(np.random.default_rng(1).uniform(-1, 1, (4, 1, 16, 16)))
    low, high = (build("jpeg_compressibility", quality=q)(images, None) for q in (20, 90))
    assert (low > high).all()


@pytest.mark.parametrize("shape", [(2,), (2, 8, 8)])
def test_jpeg_refuses_what_is_no_image(shape):
    with pytest.raises(ValueError, match="jpeg_compressibility needs images"):
        build("jpeg_compressibility").check(shape)


def test_weighted_is_the_weighted_sum():
    parts = [{"name": "ink"}, {"name": "symmetry"}, {"name": "class_log_prob"}]
    labels = torch.arange(6)
    reward = build("weighted", rewards=parts, weights=[2.0, -1.0, 0.5])
    expected = sum(
        w * registry.rewards.build(spec)(IMAGES, labels).double()
        for w, spec in zip([2.0, -1.0, 0.5], parts, strict=True)
    )
    np.testing.assert_allclose(reward(IMAGES, labels), expected, rtol=1e-12)


def test_weighted_is_what_its_rewards_are():
    plain, needy = build("weighted"), build("weighted", rewards=[{"name": "class_log_prob"}], weights=[1.0])
    hard = build("weighted", rewards=[{"name": "ink"}, {"name": "jpeg_compressibility"}], weights=[1.0, 1.0])
    assert (plain.needs_labels, needy.needs_labels) == (False, True)
    assert (plain.differentiable, hard.differentiable) == (True, False)
    assert registry.rewards.build("class_log_prob").revision in needy.revision
    with pytest.raises(ValueError, match="class_log_prob reads 8x8 grey images"):
        needy.check((2,))


def test_weighted_is_keyed_by_its_rewards():
    a, b = ({"name": "weighted", "rewards": [{"name": "quadratic", "q": q}], "weights": [1.0]} for q in (1.0, 2.0))
    assert scorer_identity(a) != scorer_identity(b)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"weights": [1.0]}, "1 weights and 2 rewards"),
        ({"rewards": [], "weights": []}, "0 weights and 0 rewards"),
        ({"rewards": [{"name": "inc"}], "weights": [1.0]}, "did you mean 'ink'"),
    ],
)
def test_weighted_refuses_what_it_cannot_sum(fields, message):
    with pytest.raises(ValueError, match=message):
        build("weighted", **fields)


@pytest.mark.parametrize("name", [n for n in registry.rewards.names() if n != "log_likelihood"])
def test_a_reward_says_truly_whether_it_passes_gradients(name):
    made = build(name, **tiny_weights.fields("reward", name))
    reward = made.at(torch.arange(6)) if hasattr(made, "at") else made
    x = (0.5 * IMAGES).clone().requires_grad_()
    values = reward(x, torch.arange(6))
    if not getattr(made, "differentiable", False):
        assert not values.requires_grad
        return
    (gradient,) = torch.autograd.grad(values.sum(), x)
    step = 1e-3 * gradient / gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    with torch.no_grad():
        change = (reward(x + step, torch.arange(6)) - reward(x - step, torch.arange(6))).double()
    along = (2 * step * gradient).flatten(1).sum(1).double()
    np.testing.assert_allclose(change, along, rtol=0.05, atol=1e-5)

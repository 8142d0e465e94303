"""Token models: that they use their context, their exact laws, guidance, and what is refused."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pytest
import torch

from tasks import registry, token_network
from tasks.autoregressive import Autoregressive
from tasks.checkpoint import WEIGHTS
from tasks.data import digits
from tasks.recipe import Recipe
from tasks.run import generate, score
from tasks.token_network import TokenNetwork, TokenNetworkConfig
from tasks.tokens import token_ids
from tasks.training import tokens as training

TINY = TokenNetworkConfig(vocabulary=3, height=2, width=2, num_classes=2, dim=16, depth=2, heads=2, dropout=0.0)


def held_out(count):
    rows = np.flatnonzero(digits.held_out())[:count]
    return torch.from_numpy(digits.tokens()[rows]), torch.from_numpy(digits.labels()[rows])


def awake(config, seed=0):
    """A network whose answers differ everywhere: at its beginning the last layer is zero."""
    torch.manual_seed(seed)
    network = TokenNetwork(config).eval()
    for weight in network.parameters():
        torch.nn.init.normal_(weight, std=0.4)
    return network


# --- what was trained ------------------------------------------------------------------------------------------------


def test_tokens_are_the_grey_levels_of_the_digits():
    tokens = digits.tokens()
    assert tokens.shape == (1797, 64) and tokens.min() == 0 and tokens.max() == digits.LEVELS - 1
    model = registry.models.build("digits_tokens").load("cpu")
    np.testing.assert_array_equal(model.decode(torch.from_numpy(tokens)).numpy(), digits.images())
    assert torch.equal(model.encode(torch.from_numpy(digits.images())), torch.from_numpy(tokens))


@pytest.mark.parametrize(("hidden", "least"), [(0.25, 0.25), (0.5, 0.2), (0.75, 0.1)])
def test_the_masked_model_uses_its_context(hidden, least):
    # A model that looks at label and place alone reaches the class marginals at best, however many tokens it is shown.
    tokens, labels = held_out(160)
    network = token_network.load(WEIGHTS / "digits_tokens", "cpu")
    found = training.bound(network, tokens, labels, seed=1, hidden=hidden)
    marginals = -training.class_marginals()[labels[:, None], np.arange(64), tokens].mean(axis=1)
    gain = marginals - found.numpy()
    assert gain.mean() > least  # nats a token; the less is visible, the less there is to gain
    assert gain.mean() > 5 * gain.std() / math.sqrt(len(gain))


def test_the_autoregressive_model_uses_its_context():
    tokens, labels = held_out(160)
    found = -Autoregressive().log_prob(tokens, labels).numpy() / 64
    marginals = -training.class_marginals()[labels[:, None], np.arange(64), tokens].mean(axis=1)
    gain = marginals - found
    assert gain.mean() > 0.2
    assert gain.mean() > 5 * gain.std() / math.sqrt(len(gain))


@pytest.mark.parametrize("name", ["digits_tokens", "digits_tokens_ar"])
def test_a_token_model_says_how_it_was_made_and_what_it_reached(name):
    record = json.loads((WEIGHTS / name / "training.json").read_text())
    assert record["command"].startswith(f"solvus train {name} ") and record["seed"] == 0
    nats = record["nats_per_token"]
    assert nats["held_out"] < nats["class_marginals_held_out"] - 0.2
    assert (WEIGHTS / name / "model.safetensors").stat().st_size <= 5e6
    if name == "digits_tokens_ar":
        tokens, labels = held_out(None)
        found = -Autoregressive().log_prob(tokens, labels).mean().item() / 64
        assert found == pytest.approx(nats["held_out"], abs=1e-4)


def test_samples_are_the_digits_that_were_asked_for():
    recipe = Recipe({"name": "digits_tokens"}, {"name": "ancestral"}, {"name": "uniform", "num_steps": 8},
                    {"name": "none"}, {"name": "single"}, batch_size=64).completed()  # fmt: skip
    recipe.check()
    rows = generate(recipe, 0, 64)
    assert rows["x0"].shape == (64, 1, 8, 8) and rows["x0"].dtype == np.float32
    levels = (rows["x0"] + 1) * 8
    np.testing.assert_array_equal(levels, np.rint(levels))
    right = score({"name": "class_correct"}, rows["x0"], rows["label"], 0, 64, "cpu")
    assert right.mean() > 0.7  # chance is 0.1


def test_training_makes_models_that_load(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "measured", lambda network: {"held_out": 2.0})  # seconds, on all digits
    for name in ("digits_tokens", "digits_tokens_ar"):
        record = training.train(name, tmp_path / name, steps=3, batch_size=4, report=lambda line: None)
        assert len(record["loss_curve"]) == 3
    first = registry.models.build({"name": "digits_tokens", "path": str(tmp_path / "digits_tokens")})
    assert first.load("cpu").denoise(torch.full((2, 64), 17), 1.0).shape == (2, 64, 17)
    assert first.revision != registry.models.build("digits_tokens").revision
    Autoregressive(tmp_path / "digits_tokens_ar").log_prob(torch.zeros(1, 64, dtype=torch.int64))


# --- the network -----------------------------------------------------------------------------------------------------


def test_a_causal_network_is_a_probability_over_all_strings():
    network = awake(TokenNetworkConfig(**vars(TINY) | {"causal": True}))
    strings = torch.cartesian_prod(*[torch.arange(3)] * 4)
    for label in range(3):
        log_p = network(strings, torch.full((81,), label)).double().log_softmax(-1)
        total = log_p.gather(-1, strings[..., None])[..., 0].sum(1).exp().sum()
        assert total.item() == pytest.approx(1, abs=1e-5)


def test_a_masked_network_sees_every_other_token_and_the_label():
    network = awake(TINY)
    masked = torch.tensor([[3, 0, 1, 2]])
    base = network(masked, torch.tensor([0]))[0, 0]
    for place in (1, 2, 3):
        other = masked.clone()
        other[0, place] = 3 - other[0, place] if other[0, place] else 2
        assert not torch.allclose(network(other, torch.tensor([0]))[0, 0], base, atol=1e-4)
    assert not torch.allclose(network(masked, torch.tensor([2]))[0, 0], base, atol=1e-4)


def test_moved_pictures_are_moved_by_the_pixel_that_the_network_is_told():
    picture = torch.zeros(1, 64, dtype=torch.int64)
    picture[0, 3 * 8 + 4] = 9
    for number, (dy, dx) in enumerate(training.MOVES):
        moved = training.move(picture, torch.tensor([number]))
        assert moved.sum() == 9 and moved[0, (3 + dy) * 8 + 4 + dx] == 9
    assert training.MOVES[0] == (0, 0)
    corner = torch.full((1, 64), 5)
    assert (training.move(corner, torch.tensor([training.MOVES.index((1, 1))])).view(8, 8)[0] == 0).all()


def test_as_many_tokens_are_hidden_as_were_asked_for():
    tokens, counts = torch.zeros(5, 64, dtype=torch.int64), torch.tensor([1, 2, 30, 63, 64])
    seen = training.masked_at_random(tokens, counts, 17, torch.Generator().manual_seed(0))
    assert torch.equal((seen == 17).sum(1), counts)


# --- the models' answers ---------------------------------------------------------------------------------------------


def test_visible_tokens_are_certain_and_probabilities_add_up():
    model = registry.models.build("digits_tokens").load("cpu")
    x = torch.from_numpy(digits.tokens()[:4]).clone()
    x[:, ::2] = model.process.mask
    p = model.denoise(x, 0.5, torch.tensor([0, 1, 2, 10]))
    assert p.dtype == torch.float64 and p.shape == (4, 64, 17)
    torch.testing.assert_close(p.sum(-1), torch.ones(4, 64, dtype=torch.float64))
    assert torch.equal(p[:, 1::2].argmax(-1), x[:, 1::2]) and (p[:, 1::2].max(-1).values == 1).all()
    assert torch.equal(model.denoise(x, 0.5, None), model.denoise(x, 0.9, torch.full((4,), 10)))


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_guidance_of_tokens_extrapolates_log_probabilities(scale):
    model = registry.models.build("digits_tokens").load("cpu")
    x = torch.from_numpy(digits.tokens()[:2]).clone()
    x[:, 20:] = model.process.mask
    label, nothing = torch.tensor([3, 5]), torch.tensor([10, 10])
    guided = registry.guidance.build({"name": "cfg", "scale": scale}).wrap(model).denoise(x, 0.5, label)
    log_c, log_u = (model.denoise(x, 0.5, c)[:, 20:].log() for c in (label, nothing))
    expected = (log_u + scale * (log_c - log_u)).softmax(-1)
    torch.testing.assert_close(guided[:, 20:], expected, rtol=1e-8, atol=1e-10)
    assert torch.equal(guided[:, :20], model.denoise(x, 0.5, label)[:, :20])


def test_the_energy_of_a_table_is_its_joint():
    spec = registry.models.build({"name": "table", "vocabulary": 3, "length": 4, "seed": 2})
    found = spec.load("cpu").energy_log_prob(torch.from_numpy(spec.strings))
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found.exp().numpy(), spec.joint, rtol=1e-12)


def test_the_energy_of_digits_is_that_of_the_autoregressive_model():
    model = registry.models.build("digits_tokens").load("cpu")
    tokens, labels = held_out(3)
    found = model.energy_log_prob(tokens, labels)
    assert found.dtype == torch.float64 and found.shape == (3,)
    assert torch.equal(found, Autoregressive().log_prob(tokens, labels))
    assert torch.equal(model.energy_log_prob(tokens), Autoregressive().log_prob(tokens, torch.full((3,), 10)))
    assert (found > Autoregressive().log_prob(17 - 1 - tokens, labels)).all()  # the negative of a digit is no digit


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.zeros(2, 63, dtype=torch.int64), r"\(B, 64\) tokens, got shape \(2, 63\)"),
        (torch.full((2, 64), 17), "between 0 and 16, got 17 to 17.*a mask that is left must be filled first"),
    ],
)
def test_strings_that_the_law_does_not_know_are_refused(tokens, message):
    with pytest.raises(ValueError, match=message):
        registry.models.build("digits_tokens").load("cpu").energy_log_prob(tokens)


def test_tokens_are_read_from_images_and_strings_alike():
    tokens = torch.from_numpy(digits.tokens()[:3])
    assert torch.equal(token_ids(torch.from_numpy(digits.images()[:3])), tokens)
    assert torch.equal(token_ids(torch.from_numpy(digits.images()[:3]) + 0.06), tokens)  # half a level is 0.0625
    assert torch.equal(token_ids(tokens), tokens)
    with pytest.raises(ValueError, match=r"8x8 grey images \(1, 8, 8\), but the model makes \(3, 32, 32\)"):
        token_ids(torch.zeros(2, 3, 32, 32))


# --- pairings --------------------------------------------------------------------------------------------------------


JUDGED = {"name": "token_log_prob", "model": {"name": "table"}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"solver": "ddim"},
            "solver ddim steps gaussian processes, but model digits_tokens is masked. Choose one of: anc",
        ),
        ({"solver": "unified"}, "steps gaussian processes, but model digits_tokens is masked"),
        ({"model": "digits"}, "solver ancestral steps masked processes, but model digits is gaussian. Choose one of: "),
        (
            {"times": "gits"},
            "times gits is made for gaussian processes, but model digits_tokens is masked. Use times=uni",
        ),
        ({"times": "karras"}, "need a Gaussian model. Use times=uniform"),
        ({"initial": "teleport"}, "initial teleport is made for gaussian processes.*Use initial=prior"),
        ({"guidance": {"name": "cfg", "sigma_low": 0.1}}, "model digits_tokens has no noise levels"),
        ({"strategy": {"name": "best_of_majority", "n": 2, "equivalence": "cell"}}, "Set it to tokens, or classifier"),
        ({"strategy": "dps"}, "solver ancestral does not give"),
        ({"strategy": "noise_search"}, "model digits_tokens is masked"),
        ({"model": "table", "guidance": "cfg"}, "needs labels, but model table has none"),
        (
            {"model": {"name": "table", "vocabulary": 5}, "strategy": "best_of_n", "reward": JUDGED},
            "knows 4 tokens of 3 values, but the samples of model table are 4 tokens of 5. Set reward token_log_prob's",
        ),
        ({"strategy": "best_of_n", "reward": JUDGED}, r"knows 4 tokens, but the samples have 64"),
        ({"strategy": "repulsion"}, "Use token_repulsion for tokens"),
    ],
)
def test_what_does_not_fit_tokens_is_refused_when_planning(changes, message):
    recipe = Recipe({"name": "digits_tokens"}, {"name": "ancestral"}, {"name": "uniform", "num_steps": 4},
                    {"name": "none"}, {"name": "single"}, {"name": "class_log_prob"}).completed()  # fmt: skip
    recipe.check()
    with pytest.raises(ValueError, match=message):
        recipe.override(changes).check()


@pytest.mark.parametrize(
    "strategy",
    [
        {"name": "best_of_n", "n": 2},
        {"name": "best_of_majority", "n": 2, "equivalence": "classifier"},
        {"name": "best_of_majority", "n": 2, "equivalence": "tokens"},
        {"name": "fk_steering", "particles": 2, "first": 1, "every": 1},
        {"name": "svdd", "children": 2},
        {"name": "token_repulsion", "particles": 2},
    ],
    ids=lambda s: "-".join(str(v) for v in s.values()),
)
def test_strategies_choose_among_tokens_by_rewards_of_images(strategy):
    recipe = Recipe({"name": "digits_tokens"}, {"name": "ancestral"}, {"name": "uniform", "num_steps": 2},
                    {"name": "cfg"}, strategy, {"name": "class_log_prob"}, batch_size=8).completed()  # fmt: skip
    recipe.check()
    rows = generate(recipe, 0, 4)
    assert rows["x0"].shape == (4, 1, 8, 8)
    assert (rows["nfe"] == recipe.nfe).all()


# --- folders ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def copy(tmp_path):
    return shutil.copytree(WEIGHTS / "digits_tokens", tmp_path / "copy")


def test_folders_that_hold_no_token_model_are_refused(copy, tmp_path):
    def build(path):
        return registry.models.build({"name": "digits_tokens", "path": str(path)})

    assert build(copy).revision == registry.models.build("digits_tokens").revision
    with pytest.raises(ValueError, match="is not a folder"):
        build(tmp_path / "none")
    with pytest.raises(ValueError, match="sees only what comes before"):
        build(WEIGHTS / "digits_tokens_ar")
    with pytest.raises(ValueError, match="sees the whole text, so it has no log-probability"):
        Autoregressive(copy)
    weights = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(weights[:1000])
    with pytest.raises(ValueError, match="is damaged"):
        build(copy).load("cpu")
    (copy / "model.safetensors").write_bytes(weights)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"depth": config["depth"] + 1}))
    with pytest.raises(ValueError, match="do not fit its config.json"):
        build(copy).load("cpu")
    (copy / "config.json").write_text(json.dumps(config | {"colour": 1}))
    with pytest.raises(ValueError, match="not the configuration of a token network"):
        build(copy)
    (copy / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="has no model.safetensors"):
        build(copy)

"""Early exits by learned uncertainty: exact where nothing is saved, the block's own head where something is."""

import copy
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tasks import early_exit, registry
from tasks.checkpoint import WEIGHTS
from tasks.layer_skip import multiply_adds
from tasks.recipe import Recipe
from tasks.run import generate, load_model, score
from tasks.training import probes


def recipe(guidance="none", model="digits_dit", steps=8, **changes):
    times = {"name": "uniform", "num_steps": steps}
    plain = Recipe(model, "ddim", times, "none", "single", batch_size=8).completed()
    return plain.override({"guidance": guidance} | changes)


def deediff(threshold, **fields):
    return {"name": "deediff", "threshold": threshold} | fields


def rows(made):
    made.check()
    return generate(made, 0, 8)


@pytest.fixture(scope="module")
def model():
    return load_model(recipe())


@pytest.fixture(scope="module")
def exits(model):
    return early_exit.load(None, model.network)


@pytest.fixture(scope="module")
def seen(model):
    """Noisy digits at eight noise levels, eight of each, as the network is told of them."""
    images, labels = registry.models.build("digits_dit").reference()
    generator = torch.Generator().manual_seed(5)
    pick = torch.randint(len(images), (64,), generator=generator)
    t = torch.arange(1, 9).repeat_interleave(8) / 8.0
    x0 = torch.from_numpy(images)[pick]
    eps = torch.randn(x0.shape, generator=generator)
    alpha, sigma = (f(t).float().view(-1, 1, 1, 1) for f in (model.process.alpha, model.process.sigma))
    return alpha * x0 + sigma * eps, model.process.model_time(t).float(), torch.from_numpy(labels)[pick]


def shortened(network, exits, depth):
    """The network of the first blocks, with a head in the place of its last layer."""
    found = copy.deepcopy(network)
    found.transformer_blocks = found.transformer_blocks[:depth]
    if depth <= len(exits):
        found.proj_out_1, found.proj_out_2 = exits[depth - 1].modulation, exits[depth - 1].out
    return found


def test_where_no_row_leaves_the_rows_are_the_models_bit_for_bit():
    plain = rows(recipe())
    never, hardly = rows(recipe(deediff(0.0))), rows(recipe(deediff(1e-9)))
    np.testing.assert_array_equal(never["x0"], plain["x0"])
    np.testing.assert_array_equal(hardly["x0"], plain["x0"])
    assert "work" not in never and (hardly["nfe"] == 8).all() and (hardly["work"] > 8).all()  # the probes' work


def test_every_row_is_the_shortened_network_of_the_block_after_which_it_leaves(model, exits, seen):
    """Rows of one batch leave after different blocks."""
    with torch.no_grad():
        early = early_exit.EarlyExit(model.network, exits, 0.12)
        answer, (left,) = early(*seen).sample, early.left
        assert len(left.unique()) >= 4
        for depth in left.unique().tolist():
            mine = left == depth
            expected = shortened(model.network, exits, depth)(*(y[mine] for y in seen)).sample
            torch.testing.assert_close(answer[mine], expected, atol=1e-5, rtol=1e-5)


def test_a_row_decides_for_itself(model, exits, seen):
    with torch.no_grad():
        together = early_exit.EarlyExit(model.network, exits, 0.12)
        answers = together(*seen).sample
        alone = early_exit.EarlyExit(model.network, exits, 0.12)
        each = torch.cat([alone(*(y[i : i + 1] for y in seen)).sample for i in range(len(answers))])
    assert torch.equal(torch.cat(alone.left), together.left[0])
    torch.testing.assert_close(each, answers, atol=1e-5, rtol=1e-5)


def test_rows_leave_earlier_under_a_higher_threshold_and_where_there_is_more_noise(model, exits, seen):
    left = []
    with torch.no_grad():
        for threshold in (0.0, 0.05, 0.12, 0.3, 1.0):
            early = early_exit.EarlyExit(model.network, exits, threshold)
            early(*seen)
            left.append(early.left[0])
    assert (left[0] == 6).all() and (left[-1] == 1).all()
    assert all((a >= b).all() for a, b in zip(left, left[1:], strict=False))
    by_level = left[2].view(8, 8).double().mean(dim=1)  # from little noise to pure noise
    assert by_level[0] == 6 and (by_level.diff() <= 0).all() and by_level[-1] < 4


def test_the_committed_probes_know_how_wrong_their_heads_are(model, exits):
    """Estimated uncertainty against the error itself, on fresh noise: over all rows, and within one noise level."""
    images, labels = (torch.from_numpy(y) for y in registry.models.build("digits_dit").reference())
    generator = torch.Generator().manual_seed(11)
    t = torch.tensor([0.05, 0.2, 0.4, 0.6, 0.8, 1.0]).repeat_interleave(64)
    pick = torch.randint(len(images), (len(t),), generator=generator)
    eps = torch.randn(images[pick].shape, generator=generator)
    with torch.no_grad():
        wrong, unsure = probes.errors(model.network, exits, model.process, images[pick], eps, t, labels[pick])
    actual = wrong.abs().tanh()
    overall = [np.corrcoef(a.mean(dim=(1, 2)), u.mean(dim=(1, 2)))[0, 1] for a, u in zip(actual, unsure, strict=True)]
    assert min(overall) > 0.9
    for a, u in zip(actual.unflatten(1, (6, 64)).unbind(1), unsure.unflatten(1, (6, 64)).unbind(1), strict=True):
        assert abs(float(a.mean() - u.mean())) < 0.03  # calibrated at every level
        assert np.corrcoef(a.flatten(), u.flatten())[0, 1] > 0.1  # and tells places and blocks apart there


def test_heads_get_better_from_block_to_block(model, exits, seen):
    """Against the network's own answer, so what no network could know does not count."""
    with torch.no_grad():
        whole = model.network(*seen).sample
        gaps = [float((shortened(model.network, exits, k)(*seen).sample - whole).square().mean()) for k in range(1, 6)]
    assert gaps == sorted(gaps, reverse=True) and gaps[-1] < 0.25 * gaps[0]


def test_work_is_that_of_the_blocks_that_ran_their_probes_and_one_head(model, exits):
    with torch.device("meta"):
        net, ways = model.skeleton, early_exit.Exits.of(model.skeleton)
        inputs = (torch.zeros(1, 1, 8, 8), torch.zeros(1), torch.zeros(1, dtype=torch.int64))
        whole = multiply_adds(net, *inputs)
        expected = []
        for depth in range(1, 7):
            probe = 16 * 2 * 48 * 4 * min(depth, 5)
            expected.append((multiply_adds(shortened(net, ways, depth), *inputs) + probe) / whole)
    assert early_exit.shares(model.skeleton) == pytest.approx(expected)
    found = rows(recipe(deediff(1.0)))
    assert found["work"] == pytest.approx(8 * expected[0])


def test_savings_are_counted_and_the_distance_grows_with_them():
    spec = registry.features.complete({"name": "acceleration_distance"})
    work, gaps = [], []
    for threshold in (0.08, 0.15):
        made = recipe(deediff(threshold))
        found = rows(made)
        whole = generate(made.companion(spec), 0, 8)
        work.append(found["work"].mean())
        gaps.append(score(spec, found["x0"], found["label"], 0, 8, "cpu", whole["x0"])[:, 0].mean())
        assert (found["nfe"] == made.nfe).all()
    assert 8 > work[0] > work[1] and 0 < gaps[0] < gaps[1]
    guided = rows(recipe([{"name": "cfg", "scale": 1.0}, deediff(0.15)]))
    assert (guided["nfe"] == 16).all() and guided["work"][0] < 15
    np.testing.assert_allclose(guided["x0"], rows(recipe(deediff(0.15)))["x0"], atol=1e-4)
    skipping = {"name": "unified", "preset": "dpmpp_2m", "hooks": [{"name": "sada"}]}  # asks about some rows only
    assert (rows(recipe(deediff(0.15), solver=skipping, steps=16))["nfe"] < 16).all()


def test_training_changes_heads_and_probes_alone_and_is_repeatable(tmp_path):
    record = probes.train("digits_dit_probes", tmp_path / "a", steps=6, batch_size=16, report=str)
    probes.train("digits_dit_probes", tmp_path / "b", steps=6, batch_size=16, report=str)
    a, b = (load_file(tmp_path / k / early_exit.FILE) for k in "ab")
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert {key.split(".")[1] for key in a} == {"modulation", "out", "probe"}
    assert record["network"] == recipe().parts.model.revision
    committed = json.loads((WEIGHTS / "digits_dit_probes" / "training.json").read_text())
    assert (
        committed["command"].startswith("solvus train digits_dit_probes") and committed["network"] == record["network"]
    )
    (_, *first), (_, *last) = committed["loss_curve"][0], committed["loss_curve"][-1]
    assert last[0] < first[0] and last[1] < first[1]


def test_what_cannot_be_left_early_is_refused_when_planning(tmp_path):
    net = registry.models.build("digits_dit").checkpoint.network("cpu")
    with torch.no_grad():
        net.proj_out_2.bias += 1.0
    from tasks.training import digits

    digits.save(net, "digits_dit", tmp_path / "other")
    other = {"name": "digits_dit", "path": str(tmp_path / "other")}
    skip = {"times": [1.0, 0.5, 0.0], "steps": [{"skip": 1}, {}]}
    for made, message in [
        (recipe(deediff(0.1), model="digits"), "leaves a DiTTransformer2DModel .* model digits is none"),
        (recipe(deediff(0.1), model=other), "has probes of a network with revision .* Set guidance.path"),
        (recipe([deediff(0.1), {"name": "int8"}]), "guidance int8 runs others"),
        (recipe([deediff(0.1), {"name": "autoguidance"}]), "guidance autoguidance runs others"),
        (recipe(deediff(0.1)).override({"schedule": skip}), "the schedule runs others"),
    ]:
        with pytest.raises(ValueError, match=message):
            made.check()
    for fields, message in [
        ({"threshold": -0.1}, "threshold must be between 0 and 1, got -0.1"),
        ({"path": str(tmp_path)}, "has no model.safetensors. Give a folder made by `solvus train digits_dit_probes"),
    ]:
        with pytest.raises(ValueError, match=message):
            registry.guidance.build({"name": "deediff"} | fields)
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ValueError, match="is damaged"):
        recipe(deediff(0.1, path=str(tmp_path))).check()

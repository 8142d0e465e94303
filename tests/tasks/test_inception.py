"""The Inception-v3 of the FID: its shape, its details, and weights that must be the right ones."""

import numpy as np
import pytest
import tiny_weights
import torch
from torch.nn import functional as F

from tasks import inception, registry
from tasks.pretrained import file_digest


@pytest.fixture(scope="module")
def network():
    path = tiny_weights.inception()
    return inception.load(str(path), file_digest(path), "cpu")


def test_it_has_the_published_number_of_weights(network):
    # Inception-v3 has 27,161,264; without the auxiliary classifier's 3,326,696 and with 1008 classes instead of 1000.
    assert sum(p.numel() for p in network.parameters()) == 27_161_264 - 3_326_696 + 8 * (2048 + 1)
    assert len([n for n in network.state_dict() if n.endswith("conv.weight")]) == 94


def test_blocks_have_the_published_sizes():
    with torch.device("meta"):
        made = inception.Inception()
        x = torch.zeros(1, 192, 35, 35)
        sizes = []
        for name in ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c"):
            x = getattr(made, f"Mixed_{name}")(x)
            sizes.append(tuple(x.shape[1:]))
    assert sizes == [
        (256, 35, 35), (288, 35, 35), (288, 35, 35), *[(768, 17, 17)] * 5, (1280, 8, 8), (2048, 8, 8), (2048, 8, 8),
    ]  # fmt: skip


def test_a_block_is_its_branches_in_the_published_order(network):
    # Written out once more, for the block with forks.
    block = network.Mixed_7c
    x = torch.randn(1, 2048, 3, 3, generator=torch.Generator().manual_seed(0))

    def conv(name, y):
        layer = getattr(block, name)
        y = F.conv2d(y, layer.conv.weight, None, layer.conv.stride, layer.conv.padding)
        bn = layer.bn
        return F.relu(F.batch_norm(y, bn.running_mean, bn.running_var, bn.weight, bn.bias, False, 0.0, 0.001))

    middle, double = conv("branch3x3_1", x), conv("branch3x3dbl_2", conv("branch3x3dbl_1", x))
    expected = torch.cat(
        [
            conv("branch1x1", x), conv("branch3x3_2a", middle), conv("branch3x3_2b", middle),
            conv("branch3x3dbl_3a", double), conv("branch3x3dbl_3b", double),
            conv("branch_pool", F.max_pool2d(x, 3, stride=1, padding=1)),
        ],
        dim=1,
    )  # fmt: skip
    torch.testing.assert_close(block(x), expected)


def test_average_pools_do_not_count_padding():
    assert torch.equal(inception.POOLS["average"](torch.ones(1, 1, 4, 4)), torch.ones(1, 1, 4, 4))


@pytest.mark.parametrize("side", [8, 32, 299, 512])
def test_resizing_is_tensorflows_of_2015(side):
    # Output i reads the input at i * side / 299: no half pixel, no antialiasing.
    levels = np.random.default_rng(0).integers(0, 256, (1, 1, side, 1))
    image = torch.from_numpy(np.repeat(levels, side, axis=3) / 127.5 - 1)
    found = inception.resized(image)[0, 0, :, 5].numpy() * 128 + 128
    place = np.arange(299) * side / 299
    low = np.floor(place).astype(int)
    column = levels[0, 0, :, 0].astype(float)
    expected = column[low] + (place - low) * (column[np.minimum(low + 1, side - 1)] - column[low])
    np.testing.assert_allclose(found, expected, atol=2e-3)


def test_features_and_logits_of_a_picture(network):
    path = tiny_weights.inception()
    samples = torch.linspace(-1, 1, 64).view(1, 1, 8, 8)
    features = registry.features.build({"name": "inception_v3", "path": str(path), "sha256": ""})
    found = features(samples, None)
    assert found.shape == (1, features.dim((1, 8, 8)))
    assert found.std() > 1e-3
    torch.testing.assert_close(found @ network.fc.weight.T, network.logits(inception.resized(samples)))
    # Below half a level nothing changes: pictures count as they would be stored.
    stored = ((samples + 1) * 127.5).round() / 127.5 - 1
    assert torch.equal(inception.resized(stored + 1e-3), inception.resized(stored))


def test_the_weights_hash_is_the_revision_and_is_checked():
    path = tiny_weights.inception()
    spec = {"name": "inception_v3", "path": str(path)}
    with pytest.raises(ValueError, match="SHA-256 of .* is .*, but features.sha256 says 6726825d...: these are other"):
        registry.features.build(spec).check((3, 32, 32))
    made = registry.features.build(spec | {"sha256": file_digest(path)})
    made.check((3, 32, 32))
    assert made.revision == file_digest(path)[:16]


def test_missing_weights_say_what_to_fetch_and_where_to_put_it(tmp_path, monkeypatch):
    monkeypatch.setenv("SOLVUS_WEIGHTS", str(tmp_path))
    for name in ("inception_v3", "inception_v3_logits"):
        with pytest.raises(ValueError, match="Fetch https://github.com/mseitzer.*6726825d.pth, put it there") as caught:
            registry.features.build(name).check((3, 32, 32))
        assert str(tmp_path / inception.FILE) in str(caught.value)
    with pytest.raises(ValueError, match="reads pictures .* but the model makes"):
        registry.features.build("inception_v3").check((2,))


def test_damaged_and_foreign_weights_are_refused(tmp_path):
    damaged, foreign = tmp_path / "damaged.pth", tmp_path / "foreign.pth"
    damaged.write_bytes(b"no weights")
    torch.save({"fc.weight": torch.zeros(1008, 2048)}, foreign)
    for path, message in ((damaged, "cannot be read as weights"), (foreign, "tensors are missing or left over")):
        with pytest.raises(ValueError, match=message):
            inception.load(str(path), file_digest(path), "cpu")

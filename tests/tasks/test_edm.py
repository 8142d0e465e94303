"""EDM's network pickles: read as data, converted once, and the networks that they hold."""

from __future__ import annotations

import hashlib
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import tiny_edm
import torch

from tasks import registry
from tasks.edm import convert
from tasks.models.edm import EDMNetwork
from tasks.recipe import Recipe
from tasks.run import generate

# EDM's own code (NVlabs/edm at 0a2ff34, training/networks.py, float32) on these weights, inputs, sigma and labels:
# three pixels of each row, and the mean of the absolute values.
PUBLISHED = {
    "ddpmpp": [0.41669, 0.1937, -0.05401, 0.24992, 0.25298, 0.25312, 0.33204],
    "ncsnpp": [0.3295, 0.07705, -0.18106, 0.25069, 0.25094, 0.25064, 0.35312],
    "skips": [0.63579, 0.40236, 0.13005, 0.34386, 0.34602, 0.34943, 0.39494],
    "adm": [0.49312, 0.31426, 0.1351, 0.07451, 0.0817, 0.08658, 0.49101],
}
X = 3 * torch.sin(0.3 * torch.arange(2 * 3 * 16 * 16, dtype=torch.float64)).view(2, 3, 16, 16).float()


@pytest.fixture(autouse=True)
def _weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOLVUS_WEIGHTS", str(tmp_path / "weights"))


def model(path: Path, sha256: str = "", **fields: Any) -> EDMNetwork:
    made: EDMNetwork = registry.models.build({"name": "edm", "path": str(path), "sha256": sha256} | fields)
    return made


@pytest.mark.parametrize("kind", PUBLISHED)
def test_the_denoiser_is_that_of_edm_s_own_code(tmp_path: Path, kind: str) -> None:
    sha256 = tiny_edm.snapshot(tmp_path / "net.pkl", kind)
    made = model(tmp_path / "net.pkl", sha256)
    assert (made.shape, made.num_classes, made.needs_labels) == ((3, 16, 16), 3, True)
    denoiser = made.load("cpu")
    out = denoiser.denoise(X, torch.tensor([0.01, 0.1], dtype=torch.float64), torch.tensor([1, 2]))  # sigma 0.8 and 8
    found = [*out[0, 0, 3, 3:6].tolist(), *out[1, 2, 9, 7:10].tolist(), out.abs().mean().item()]
    assert found == pytest.approx(PUBLISHED[kind], abs=2e-5)
    assert torch.equal(denoiser.denoise(X, 0.0, torch.tensor([1, 2])), X)  # no noise, nothing to remove
    none = denoiser.denoise(X, 0.1, None)
    assert torch.equal(none, denoiser.denoise(X, 0.1, torch.tensor([3, 3]))) and not torch.equal(none[1], out[1])


def test_a_pickle_is_read_without_running_what_it_holds_and_only_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = f"open({str(tmp_path / 'ran')!r}, 'w')"
    sha256 = tiny_edm.snapshot(tmp_path / "net.pkl", source=source)
    made = model(tmp_path / "net.pkl", sha256)
    assert made.file == tmp_path / "weights" / "edm" / f"{sha256}.safetensors" and not (tmp_path / "ran").exists()
    assert source.encode() in (tmp_path / "net.pkl").read_bytes() and source.encode() not in made.file.read_bytes()
    monkeypatch.setattr(convert, "read", None)  # a second conversion would call it
    (tmp_path / "net.pkl").rename(tmp_path / "moved.pkl")
    again, alone = model(tmp_path / "moved.pkl", sha256), model(made.file)
    assert made.revision == again.revision == alone.revision
    assert torch.equal(alone.load("cpu").denoise(X, 0.1), made.load("cpu").denoise(X, 0.1))


class Command:
    def __reduce__(self) -> Any:
        return os.system, ("true",)


DANGEROUS = [
    (Command(), "names posix.system"),
    ({"ema": Path("x")}, "names pathlib"),
    ({"ema": eval}, "names builtins.eval"),
    ({"ema": torch.nn.Linear(1, 1)}, "names torch.nn.modules.linear.Linear"),
    ({"other": 1}, "holds a NoneType, not a network with EDM's preconditioning"),
]


@pytest.mark.parametrize(("content", "message"), DANGEROUS, ids=lambda value: str(value)[:20])
def test_a_pickle_that_names_anything_else_is_refused(tmp_path: Path, content: Any, message: str) -> None:
    data = pickle.dumps(content)
    (tmp_path / "net.pkl").write_bytes(data)
    with pytest.raises(ValueError, match=message):
        model(tmp_path / "net.pkl", hashlib.sha256(data).hexdigest())


def test_only_a_pickle_whose_content_is_pinned_is_read(tmp_path: Path) -> None:
    path = tmp_path / "net.pkl"
    found = tiny_edm.snapshot(path)
    with pytest.raises(ValueError, match=r"is a pickle. It is read as data .* set model.sha256 to its 64"):
        model(path)
    with pytest.raises(ValueError, match=f"has SHA-256 {found}, but model.sha256 is {'0' * 64}"):
        model(path, "0" * 64)
    with pytest.raises(ValueError, match="must be a network pickle of EDM"):
        model(tmp_path / "none.pkl", found)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match="cannot be read as a network pickle of EDM"):
        model(path, hashlib.sha256(path.read_bytes()).hexdigest())
    (tmp_path / "net.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is no converted network of EDM"):
        model(tmp_path / "net.safetensors")


OTHER = [
    ({"name": "VPPrecond"}, "holds a VPPrecond, .* those named edm-"),
    ({"kwargs": {"depth": 3}}, "made with depth, which is not known"),
    ({"kwargs": {"encoder_type": "odd"}}, "encoder is 'odd'; known: standard, skip, residual"),
    ({"kwargs": {"num_blocks": 2}}, r"\d+ tensors are missing, left over or of another shape, such as dec"),
]


@pytest.mark.parametrize(("changes", "message"), OTHER)
def test_a_network_of_another_kind_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    sha256 = tiny_edm.snapshot(tmp_path / "net.pkl", **changes)
    with pytest.raises(ValueError, match=message):
        model(tmp_path / "net.pkl", sha256)


def test_it_samples_as_any_model_and_guidance_needs_label_dropout(tmp_path: Path) -> None:
    sha256 = tiny_edm.snapshot(tmp_path / "net.pkl")
    spec = {"name": "edm", "path": str(tmp_path / "net.pkl"), "sha256": sha256}
    times = {"name": "karras", "num_steps": 3}
    made = Recipe(spec, {"name": "heun"}, times, {"name": "none"}, {"name": "single"}, batch_size=4).completed()
    made.check()
    found = generate(made, 0, 4)
    assert found["x0"].shape == (4, 3, 16, 16) and found["nfe"].tolist() == [5] * 4
    assert made.override({"model.path": str(made.parts.model.file), "model.sha256": ""}).key == made.key
    with pytest.raises(ValueError, match="has no unconditional prediction"):
        made.override({"guidance": "cfg"}).check()
    dropped = tiny_edm.snapshot(tmp_path / "dropped.pkl", kwargs={"label_dropout": 0.1})
    made.override(
        {"model": spec | {"path": str(tmp_path / "dropped.pkl"), "sha256": dropped}, "guidance": "cfg"}
    ).check()

"""Every preset runs on a pipeline of its kind as the documentation writes it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.tasks import tiny_pipelines as tiny

PRESETS = Path(__file__).resolve().parents[2] / "configs" / "preset"
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "sd15": ("stable_diffusion", {}),
    "sd21": ("stable_diffusion", {"prediction": "v_prediction"}),
    "sdxl": ("sdxl", {}),
    "sd3": ("sd3", {}),
    "flux_dev": ("flux", {"guidance_embeds": True}),
    "flux_schnell": ("flux", {"guidance_embeds": False}),
    "pixart": ("pixart", {}),
    "lcm": ("stable_diffusion", {"time_cond_proj_dim": 8}),
    "tcd": ("stable_diffusion", {}),
    "hyper_sd": ("stable_diffusion", {}),
    "instaflow": ("stable_diffusion", {}),
}
FIXED = ("lcm", "tcd", "instaflow")  # their times are part of what they are


def test_every_preset_is_tried_here() -> None:
    assert {path.stem for path in PRESETS.glob("*.yaml")} == set(KINDS)


@pytest.mark.parametrize("name", KINDS)
def test_a_preset_runs(solvus: Callable[..., Any], tmp_path: Path, name: str) -> None:
    kind, options = KINDS[name]
    getattr(tiny, kind)(tmp_path / "pipeline", **options)
    (tmp_path / "prompts.txt").write_text("a red fox\ntwo green apples\n")
    argv = [f"preset={name}", f"model.path={tmp_path / 'pipeline'}", f"prompts={tmp_path / 'prompts.txt'}"]
    argv += ["num_samples=2", "batch_size=2", "metrics=[]", "tracker=none", f"root={tmp_path / 'root'}"]
    argv += [] if name in FIXED else ["times.num_steps=4"]
    argv += ["model.height=16", "model.width=16"] if kind == "flux" else []
    done = solvus("run", *argv, "--json")
    assert done.code == 0, done.err
    assert done.data["state"] == "complete" and done.data["samples_made"] == 2

"""A study with prompts, end to end: every sample is scored against its own prompt, and prompts make the groups."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from dashboards.report.samples import browser
from dashboards.report.study import open_view
from orchestrator import api
from tasks import registry
from tasks.pictures import Preparation
from tests.tasks import tiny_pipelines, tiny_weights

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")

PROMPTS = ["a red fox", "two green apples", "a red fox", "the sea at night"]
CLIP = "reward/clip_score"
DIVERSITY = "quality/conditional_diversity"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("prompted")
    tiny_pipelines.stable_diffusion(place / "pipeline")
    (place / "prompts.txt").write_text("\n".join(PROMPTS))
    return place


def arguments(root: Path, name: str, *more: str) -> list[str]:
    clip = f"{{name:clip_score,path:{tiny_weights.clip()}}}"
    diversity = "{name:conditional_diversity,features:identity,by:prompt,relative:false}"
    return [
        f"name={name}", "model=diffusers", f"model.path={root / 'pipeline'}", f"prompts={root / 'prompts.txt'}",
        "guidance=cfg", "nfe=2", "batch_size=8", "shard_size=8", "num_samples=16", "group_by=prompt", "tracker=none",
        f"root={root / 'root'}", f"metrics=[{{name:mean_reward,reward:{clip}}},{diversity}]", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def study(root: Path) -> api.OpenStudy:
    """Of two candidates for every row, the one that fits the row's prompt better."""
    reward = ["reward=clip_score", f"reward.path={tiny_weights.clip()}"]
    return api.run(*arguments(root, "prompted", "strategy=best_of_n", "strategy.n=2", *reward))


def pictures(rows: pa.Table) -> np.ndarray:
    """Stored samples, (B, 3, 16, 16) in [-1, 1]."""
    return np.array(rows["x0"].to_pylist(), dtype=np.float32).reshape(-1, 3, 16, 16)


def cosines(samples: np.ndarray, prompts: list[str]) -> np.ndarray:
    """transformers' own similarities of pictures and prompts."""
    from transformers import CLIPModel, CLIPTokenizer

    model = CLIPModel.from_pretrained(tiny_weights.clip()).eval()
    tokens = CLIPTokenizer.from_pretrained(tiny_weights.clip())(
        prompts, padding=True, truncation=True, max_length=24, return_tensors="pt"
    )
    with torch.no_grad():
        found = model(**tokens, pixel_values=Preparation(16)(torch.from_numpy(samples)))
        return (found.logits_per_image.diagonal() / model.logit_scale.exp()).numpy()


def test_every_sample_is_scored_against_its_own_prompt(study: api.OpenStudy) -> None:
    rows = study.rows(columns=["sample_id", "prompt", "prompt_id", "clip_score", "x0", "reward_calls"])
    assert rows["prompt"].to_pylist() == PROMPTS * 4
    assert rows["prompt_id"].to_pylist() == ["0", "1", "2", "3"] * 4
    wanted = 100 * np.maximum(cosines(pictures(rows), PROMPTS * 4), 0)
    assert wanted.std() > 1
    np.testing.assert_allclose(rows["clip_score"].to_numpy(), wanted, rtol=1e-4, atol=1e-2)
    turned = 100 * np.maximum(cosines(pictures(rows), [*PROMPTS[1:], PROMPTS[0]] * 4), 0)
    assert np.abs(turned - wanted).max() > 1  # another prompt would be another score
    assert rows["reward_calls"].to_pylist() == [2] * 16


def test_selection_by_the_prompt_s_reward_beats_a_single_sample(study: api.OpenStudy, root: Path) -> None:
    single = api.run(*arguments(root, "single"))
    best, plain = (s.rows(columns=["clip_score"])["clip_score"].to_numpy() for s in (study, single))
    assert best.mean() > plain.mean() and (best >= plain - 1e-3).all()


def test_intervals_and_diversity_are_those_of_prompts(study: api.OpenStudy) -> None:
    """Three distinct prompts, one of them twice as often; written out from the rows."""
    row = study.trials().to_pylist()[0]
    rows = study.rows(columns=["prompt", "clip_score", "x0"])
    score, prompt = rows["clip_score"].to_numpy().astype(np.float64), np.array(rows["prompt"].to_pylist())
    sums = np.array([(score[prompt == p] - score.mean()).sum() for p in sorted(set(PROMPTS))])
    wanted = np.sqrt((sums**2).sum() * 3 / 2) / 16  # of three clusters
    assert row[f"se/{CLIP}"] == pytest.approx(wanted, rel=1e-5)
    x = pictures(rows).reshape(16, -1).astype(np.float64)
    within = [2 * x[prompt == p].var(axis=0, ddof=1).sum() for p in sorted(set(PROMPTS))]
    assert row[f"value/{DIVERSITY}"] == pytest.approx(np.mean(within), rel=1e-5)
    assert row[f"se/{DIVERSITY}"] == pytest.approx(np.std(within, ddof=1) / np.sqrt(3), rel=0.5)


def test_the_report_s_browser_knows_the_prompts(study: api.OpenStudy) -> None:
    view = open_view(str(study.store.root), study.name)
    (section,) = browser(view)
    assert section.browser is not None
    (trial,) = section.browser["trials"]
    assert trial["prompts"] == PROMPTS * 4 and len(trial["scores"]["clip_score"]) == 16
    json.dumps(section.browser)


def test_a_study_without_prompts_refuses_rewards_that_read_them(solvus: Callable[..., Any], root: Path) -> None:
    given = [a for a in arguments(root, "none") if not a.startswith(("prompts=", "guidance=", "group_by=", "metrics="))]
    reward = f"{{name:clip_score,path:{tiny_weights.clip()}}}"
    found = solvus("run", *given, "guidance=none", f"metrics=[{{name:mean_reward,reward:{reward}}}]")
    assert found.code != 0
    assert "compares a picture with its prompt, but there is none. Give the model prompts=FILE" in found.err


def test_the_key_of_a_column_changes_with_the_prompts_and_not_with_their_place(root: Path) -> None:
    from orchestrator import config

    spec = registry.rewards.complete({"name": "clip_score", "path": str(tiny_weights.clip())})
    recipe = config.study(config.compose(arguments(root, "keys"))).recipe
    (root / "moved.txt").write_text("\n".join(PROMPTS))
    (root / "other.txt").write_text("\n".join([*PROMPTS[:3], "a ship"]))
    moved, other = (recipe.override({"prompts": str(root / name)}) for name in ("moved.txt", "other.txt"))
    assert moved.column_key(spec) == recipe.column_key(spec) != other.column_key(spec)
    assert recipe.column_key(spec | {"prompts": ["a cat"]}) != recipe.column_key(spec)

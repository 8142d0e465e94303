"""The two pure functions that workers run: ``generate`` (recipe, range -> rows) and ``score`` (rows -> a column).

Rows are laid out in blocks by absolute index: block g always holds the same rows in the same places, whatever range was
asked for, and a range that cuts a block computes the whole block and keeps its part. So the tensors that enter the
network are the same for any shard size, worker or executor, and every row is a function of (recipe, index) bit for bit.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from tasks import calibration, registry
from tasks.noise import MAX_INDEX, RowNoise
from tasks.not_finite import IN_DECODER, IN_NETWORK, IN_SOLVER, NotFinite, Watched
from tasks.pipelines.texts import Kept
from tasks.prefixes import Resume, States, keys
from tasks.prompted import reading
from tasks.recipe import Recipe, canonical, grid_of, scorer_identity
from tasks.registry import Spec
from tasks.remembered import Remembered
from tasks.room import check_room
from tasks.sampler import CountedModel, CountedReward, Sampler
from tasks.turns import Elsewhere, Turn, in_turns
from tasks.types import Model

COLUMNS = ("sample_id", "label", "nfe", "reward_calls", "decodes", "seconds")  # of all rows, beside their samples
REMEMBERED = 100_000  # values of a reward that a process keeps, about 40 MB


def use_one_thread() -> None:
    """One torch thread a process: two on two busy cores make a step four times slower, and change its last bits."""
    torch.set_num_threads(1)


@lru_cache(maxsize=4)
def load(spec: str, device: str) -> Model:
    """A model by its canonical spec, kept warm between calls of one process."""
    return registry.models.build(json.loads(spec)).load(device)


def load_model(recipe: Recipe) -> Model:
    """The recipe's model, kept warm between calls of one process.

    Raises:
        ValueError: the device is missing, or the checkpoint is damaged.
    """
    if recipe.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda, but torch sees no CUDA device here. Use device=cpu.")
    return load(canonical(recipe.model), recipe.device)


@lru_cache(maxsize=4)
def _memory(identity: str, spec: str, texts: tuple[str, ...]) -> Remembered:
    return Remembered(reading(registry.rewards.build(json.loads(spec)), texts), size=REMEMBERED)


def remembered(spec: Spec, texts: tuple[str, ...] = ()) -> Any:
    """A reward that this process remembers by content, one for each identity; itself where that is not worth it.

    A cheap one costs less than a look into the memory, and one that depends on the row cannot be known by a sample.
    """
    reward = reading(registry.rewards.build(spec), texts)
    if getattr(reward, "cheap", False) or hasattr(reward, "at"):
        return reward
    # The identity has the hash of weights, which may change where they lie.
    return _memory(
        canonical(scorer_identity(spec)), canonical(spec), tuple(texts) if hasattr(reward, "reading") else ()
    )


def blocks(start: int, stop: int, rows: int) -> Iterator[tuple[int, int, int]]:
    """(first index of a block, first and last index wanted of it) for every block that [start, stop) touches."""
    for first in range(start - start % rows, stop, rows):
        yield first, max(start, first), min(stop, first + rows)


def rows_per_block(recipe: Recipe) -> int:
    """Rows of one block: the batch divided among the particles of a row."""
    return max(1, recipe.batch_size // recipe.parts.strategy.particles)


def generate(
    recipe: Recipe,
    start: int,
    stop: int,
    isolated: bool = False,
    progress: Callable[[int], None] | None = None,
    artifacts: Mapping[str, Mapping[str, np.ndarray]] | None = None,
    states: States | None = None,
    served: Callable[[Spec, tuple[str, ...]], Callable[..., torch.Tensor]] | None = None,
    texts: Kept | None = None,
    tally: dict[str, float] | None = None,
    decoded: bool = True,
) -> dict[str, np.ndarray]:
    """Make the rows [start, stop) of a recipe.

    Args:
        recipe: what to make; checked.
        start: first sample index.
        stop: one past the last, at most 2^32.
        isolated: fill the places of a block that were not asked for with copies of one that was, so that a row which
            crashes its process cannot take its neighbours with it.
        progress: called with the number of rows done after every block.
        artifacts: the recipe's calibrations by key; made here when left out.
        states: where trajectories that begin alike leave their states; each row is the same with and without.
        served: gives the reward of a spec and of the model's prompts where it is scored somewhere else; one whose
            gradient is taken, or that depends on more of the row than its prompt, stays here. While one block waits for
            it, the next one computes.
        texts: where encoded prompts are kept between processes.
        tally: what rewards took is added to its ``reward_s`` (seconds of scoring, wherever that is) and
            ``reward_reused`` (calls that were answered from memory).
        decoded: False leaves clean states in ``x0``, for :func:`decode`.

    Returns:
        columns of equal length: ``sample_id``, ``label`` (-1 for none), ``nfe``, ``reward_calls``, ``decodes``
        (before rewards), ``seconds`` (of the device: the share of its batch, by evaluations), ``x0`` (decoded,
        (B, *sample_shape)), the strategy's and the model's own (prompt, prompt_id, group, …); where steps leave out
        blocks of the network, ``work``; where the solver asks for log-probabilities of whole token strings,
        ``energy_calls``. A strategy that decides as it goes gives the first three for each row; where the solver does,
        ``nfe`` is the mean of the batch, rounded up.

    Raises:
        NotFinite: some rows have no finite sample: the network's answer at a step is none, or decoding spoilt them.
        ValueError: there are more particles than memory has room for.
    """
    if not 0 <= start < stop <= MAX_INDEX:
        raise ValueError(f"sample indices must satisfy 0 <= start < stop <= {MAX_INDEX}, got [{start}, {stop}).")
    use_one_thread()
    device = recipe.device
    parts = calibration.bound(recipe, calibration.make_all(recipe) if artifacts is None else artifacts)
    grid, stock_steps = grid_of(parts)
    base = load_model(recipe)
    check_room(recipe)
    if texts is not None and hasattr(base, "remember"):
        base.remember(texts)
    size = rows_per_block(recipe)
    prefixes = () if states is None or isolated else keys(recipe)
    by_row = hasattr(parts.reward, "at") and not getattr(parts.reward, "by_prompt", False)
    stays = served is None or recipe.reward is None or bool(recipe.account.gradients) or by_row
    known = (
        remembered(recipe.reward, recipe.texts) if recipe.reward is not None and parts.strategy.uses_reward else None
    )

    lost: dict[int, str] = {}

    def block(span: tuple[int, int, int], lock: Any) -> dict[str, np.ndarray]:
        first, low, high = span
        use_one_thread()
        with Turn(lock) as turn:
            counted = CountedModel(base, recipe.batch_size)
            places = [i if low <= i < high or not isolated else low for i in range(first, first + size)]
            indices = torch.tensor(places, dtype=torch.int64, device=device)
            labels = torch.tensor([recipe.label(i) for i in places], device=device)
            cond = labels if base.num_classes else None
            sampler = Sampler(parts.guidance.wrap(counted), parts.solver, grid, cond, stock_steps, parts.initial)
            reward = None
            if known is not None:
                assert recipe.reward is not None
                scorer = known if served is None or stays else Elsewhere(served(recipe.reward, recipe.texts), turn)
                reward = CountedReward(scorer, recipe.reward["name"], indices)
            noise = RowNoise(recipe.seed, indices, dtype=getattr(torch, recipe.dtype))
            resume = Resume(prefixes, states, first, counted) if states is not None and prefixes else None
            sampler = replace(sampler, resume=resume)
            with torch.no_grad():
                result = parts.strategy(sampler, reward, noise)
                x0 = base.decode(result.x0, cond) if decoded else result.x0
            if device == "cuda":
                torch.cuda.synchronize()
        elapsed = turn.seconds + (0.0 if reward is None or stays else reward.seconds)
        keep, count = slice(low - first, high - first), high - low
        sample = x0[keep].cpu().numpy()
        lost.update(dict.fromkeys((low + _spoilt(sample)).tolist(), IN_DECODER))
        diverged = (low + _spoilt(result.x0[keep].cpu().numpy())).tolist()
        if diverged:
            watched = Watched(CountedModel(base, recipe.batch_size), size, grid)
            with turn, torch.no_grad():
                again = replace(sampler, model=parts.guidance.wrap(watched), resume=None)  # type: ignore[arg-type]
                parts.strategy(again, reward, noise)
            where = {first + row: f"{IN_NETWORK} {step}" for row, step in watched.found.items()}
            lost.update({row: where.get(row, IN_SOLVER) for row in diverged})
        columns: dict[str, np.ndarray] = {
            "sample_id": np.arange(low, high, dtype=np.int64),
            "label": np.where(recipe.has_labels, labels[keep].cpu().numpy(), -1).astype(np.int64),
            "nfe": np.full(count, -(-counted.rows // size), dtype=np.int32),
            "reward_calls": np.full(count, 0 if reward is None else reward.rows // size, dtype=np.int32),
            "decodes": np.full(count, counted.decoded // size, dtype=np.int32),
            "seconds": _shares(elapsed, size, result.columns.get("nfe"))[keep],
            "x0": sample,
        }
        if counted.work != counted.rows:
            columns["work"] = np.full(count, counted.work / size, dtype=np.float64)
        if counted.energies:
            columns["energy_calls"] = np.full(count, counted.energies // size, dtype=np.int32)
        if hasattr(base, "columns"):
            columns |= base.columns(columns["label"])
        columns |= {name: value[keep].cpu().numpy() for name, value in result.columns.items()}
        if resume is not None and states is not None:
            states.reused += resume.reused * count
        if tally is not None and reward is not None:
            tally["reward_s"] = tally.get("reward_s", 0.0) + reward.seconds
            tally["reward_reused"] = tally.get("reward_reused", 0) + round(reward.reused * count / size)
        return columns

    pieces: list[dict[str, np.ndarray]] = []
    for columns in in_turns(block, blocks(start, stop, size), overlap=not stays and states is None):
        pieces.append(columns)
        if progress is not None:
            progress(int(columns["sample_id"][-1]) + 1 - start)
    if lost:
        raise NotFinite(lost, recipe.key)
    return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}


def decode(recipe: Recipe, start: int, columns: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Rows whose clean states become samples: what ``generate`` alone would have made, bit for bit.

    The decoder is loaded without the network, so this may run where that has no room. Batches are those of
    ``generate``, with zeros where a block's rows are missing; ``seconds`` grows by the decoder's.

    Args:
        recipe: of the rows; its model decodes apart.
        start: first sample index.
        columns: the rows, as ``generate(…, decoded=False)`` gave them.

    Raises:
        NotFinite: the decoder spoilt some rows.
    """
    use_one_thread()
    decoder = recipe.parts.model.load_decoder(recipe.device)
    states, size = columns["x0"], rows_per_block(recipe)
    pieces, seconds = [], columns["seconds"].copy()
    for first, low, high in blocks(start, start + len(states), size):
        began = time.perf_counter()
        batch = np.zeros((size, *states.shape[1:]), dtype=states.dtype)
        batch[low - first : high - first] = states[low - start : high - start]
        with torch.no_grad():
            images = decoder(torch.from_numpy(batch).to(recipe.device))
        pieces.append(images[low - first : high - first].cpu().numpy())
        seconds[low - start : high - start] += (time.perf_counter() - began) / size
    samples = np.concatenate(pieces)
    if len(spoilt := _spoilt(samples)):
        raise NotFinite(dict.fromkeys((start + spoilt).tolist(), IN_DECODER), recipe.key)
    return {**columns, "x0": samples, "seconds": seconds}


def _spoilt(samples: np.ndarray) -> np.ndarray:
    """The places of rows that are not finite."""
    return np.flatnonzero(~np.isfinite(samples).reshape(len(samples), -1).all(axis=1))


def _shares(seconds: float, rows: int, nfe: torch.Tensor | None) -> np.ndarray:
    """A batch's time divided among its rows, in proportion to their evaluations where these differ; (B,) float32."""
    weights = np.ones(rows) if nfe is None else nfe.cpu().numpy().astype(np.float64)
    if not weights.sum():
        weights = np.ones(rows)
    return (seconds * weights / weights.sum()).astype(np.float32)


def score(
    scorer: Spec,
    samples: np.ndarray,
    labels: np.ndarray,
    start: int,
    batch_size: int,
    device: str,
    companion: np.ndarray | None = None,
    texts: tuple[str, ...] = (),
    served: Callable[[Spec, tuple[str, ...]], Callable[..., torch.Tensor]] | None = None,
) -> np.ndarray:
    """One scorer over the rows [start, start + len(samples)): (B,) or (B, D) float32.

    Batches are laid out by absolute index too, with empty places where rows are missing. ``companion`` holds the
    samples of the companion recipe at the same indices, for scorers that have one; ``texts`` the model's prompts by
    label, for rewards that read them. ``served`` gives the reward of a spec where it is scored somewhere else;
    features, and rewards that depend on more of the row than its prompt, are scored here.

    Raises:
        ValueError: a value that is not finite, with its index; or companions that are missing.
    """
    use_one_thread()
    plugin = reading(registry.scorer(scorer), texts)
    if hasattr(plugin, "companion") and (companion is None or companion.shape != samples.shape):
        found = "none" if companion is None else f"some of shape {companion.shape}"
        raise ValueError(
            f"scorer {scorer['name']} compares every sample with its companion's, {samples.shape}, but got {found}. "
            "It serves the metric trajectory alone."
        )
    elsewhere = None
    if served is not None and scorer["name"] in registry.rewards.names() and companion is None:
        elsewhere = served(scorer, texts)
    pieces = []
    stop = start + len(samples)
    with torch.no_grad():
        for first, low, high in blocks(start, stop, batch_size):
            batch = np.zeros((batch_size, *samples.shape[1:]), dtype=samples.dtype)
            cond = np.zeros(batch_size, dtype=np.int64)
            batch[low - first : high - first] = samples[low - start : high - start]
            cond[low - first : high - first] = np.maximum(labels[low - start : high - start], 0)
            given = [torch.from_numpy(batch).to(device), torch.from_numpy(cond).to(device)]
            if companion is not None:
                other = np.zeros((batch_size, *companion.shape[1:]), dtype=companion.dtype)
                other[low - first : high - first] = companion[low - start : high - start]
                given.append(torch.from_numpy(other).to(device))
            asked = elsewhere or plugin
            if hasattr(plugin, "at"):
                asked = plugin.at(torch.arange(first, first + batch_size, device=device))
            values = asked(*given)
            pieces.append(values[low - first : high - first].cpu().numpy())
    column = np.concatenate(pieces).astype(np.float32)
    bad = ~np.isfinite(column).reshape(len(column), -1).all(axis=1)
    if bad.any():
        raise ValueError(f"scorer {scorer['name']} is not finite at sample {start + int(np.argmax(bad))}.")
    return column

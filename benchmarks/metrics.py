"""Fréchet distance of two sets of features in 64 shards each, from files to the number, one thread for everybody.

fd_relative_error         largest relative difference from numpy's and torchmetrics' value
fd_shards_relative_error  the same distance from moments merged over 64 shards, against one pass over all rows
fd_speedup_numpy          over concatenating, np.mean, np.cov and np.linalg.eigvals of the product
fd_speedup_torchmetrics   over FrechetInceptionDistance with the features as a custom module
fd_again_numpy            the same two where the reference's moments are kept, as they are from a study's second
fd_again_torchmetrics     trial on; the others take the reference's features every time
fd_memory_ratio           peak memory of the process, over that of the numpy way

Each way runs in a process of its own. Features are positive, correlated, and of quickly falling variance, as those of
an Inception network are.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import reduce
from pathlib import Path

import numpy as np

from benchmarks.harness import ROOT, Figure, arguments, publish

SHARDS, CHUNK = 64, 4096
SETS = ("samples", "reference")


def draw(folder: Path, rows: int, dim: int) -> None:
    """Two sets of (rows, dim) float32 features that differ a little, in 64 files each."""
    rng = np.random.default_rng(0)
    rank = min(256, dim)
    loadings = rng.standard_normal((rank, dim), dtype=np.float32) * np.exp(-np.arange(rank) / 60.0)[:, None]
    for name, shift, scale in (("samples", 0.02, 1.1), ("reference", 0.0, 1.0)):
        for k, part in enumerate(np.array_split(np.arange(rows), SHARDS)):
            hidden = rng.standard_normal((len(part), rank), dtype=np.float32) @ loadings.astype(np.float32)
            noise = rng.standard_normal((len(part), dim), dtype=np.float32)
            np.save(folder / f"{name}-{k:02d}.npy", np.abs(0.4 + shift + scale * (0.05 * hidden + 0.02 * noise)))


def shards(folder: Path, name: str) -> Iterator[np.ndarray]:
    """The files of one set, in order."""
    return (np.load(folder / f"{name}-{k:02d}.npy") for k in range(SHARDS))


def chunks(folder: Path, name: str) -> Iterator[np.ndarray]:
    """The same rows, ``CHUNK`` at a time: how a study reads its columns."""
    held: list[np.ndarray] = []
    for shard in shards(folder, name):
        held.append(shard)
        if sum(map(len, held)) >= CHUNK:
            whole = np.concatenate(held)
            yield whole[:CHUNK]
            held = [whole[CHUNK:]]
    yield np.concatenate(held)


def ours(folder: Path) -> float:
    """Moments of every chunk, merged."""
    from tasks.moments import Moments, frechet_distance

    a, b = (reduce(Moments.merge, map(Moments.of, chunks(folder, name))) for name in SETS)
    np.savez(folder / "kept.npz", mean=b.mean, covariance=b.covariance)
    return frechet_distance(a.mean, a.covariance, b.mean, b.covariance)


def again(folder: Path) -> float:
    """Moments of every chunk of the samples; those of the reference were kept by ``ours``."""
    from tasks.moments import Moments, frechet_distance

    a = reduce(Moments.merge, map(Moments.of, chunks(folder, "samples")))
    kept = np.load(folder / "kept.npz")
    return frechet_distance(kept["mean"], kept["covariance"], a.mean, a.covariance)


def merged(folder: Path) -> float:
    """Moments of every shard, merged."""
    from tasks.moments import Moments, frechet_distance

    a, b = (reduce(Moments.merge, map(Moments.of, shards(folder, name))) for name in SETS)
    return frechet_distance(a.mean, a.covariance, b.mean, b.covariance)


def whole(folder: Path) -> float:
    """Moments of all rows in one call."""
    from tasks.moments import Moments, frechet_distance

    a, b = (Moments.of(np.concatenate(list(shards(folder, name)))) for name in SETS)
    return frechet_distance(a.mean, a.covariance, b.mean, b.covariance)


def usual(folder: Path) -> float:
    """The numpy way: all features in memory, np.cov, and the eigenvalues of the product of the covariances."""
    found = []
    for name in SETS:
        features = np.concatenate(list(shards(folder, name)))
        found.append((np.mean(features, axis=0, dtype=np.float64), np.cov(features, rowvar=False)))
    (mean_a, cov_a), (mean_b, cov_b) = found
    cross = np.sqrt(np.linalg.eigvals(cov_a @ cov_b).astype(np.complex128)).real.sum()
    return float(((mean_a - mean_b) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * cross)


def torchmetrics(folder: Path) -> float:
    """torchmetrics, with a module that returns what it is given in place of its network."""
    import torch
    from torchmetrics.image.fid import FrechetInceptionDistance

    class Given(torch.nn.Module):
        num_features = np.load(folder / "samples-00.npy", mmap_mode="r").shape[1]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    metric = FrechetInceptionDistance(feature=Given())
    for name in SETS:
        for shard in shards(folder, name):
            metric.update(torch.from_numpy(shard), real=name == "reference")
    return float(metric.compute())


WAYS = {way.__name__: way for way in (ours, again, merged, whole, usual, torchmetrics)}


def timed(way: str, folder: Path) -> dict[str, float]:
    """Value, seconds (without imports) and peak MB of one way, in a process of its own."""
    environment = os.environ | {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
    command = [sys.executable, "-m", "benchmarks.metrics", "--way", way, "--folder", str(folder)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT, env=environment)
    found = json.loads(done.stdout.splitlines()[-1])
    print(f"{way:<13} {found['value']:.12g}  {found['seconds']:7.2f} s  {found['mb']:6.0f} MB", flush=True)
    return found


def alone(way: str, folder: Path) -> None:
    """What the process of one way does."""
    import scipy.linalg  # noqa: F401

    if way == "torchmetrics":
        import torch
        import torchmetrics.image.fid  # noqa: F401

        torch.set_num_threads(1)
    began = time.perf_counter(), time.process_time()
    value = WAYS[way](folder)
    seconds = time.process_time() - began[1]  # of this one thread: the machine may be shared
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"value": value, "seconds": seconds, "wall": time.perf_counter() - began[0], "mb": peak}))


def main() -> None:
    """Draw the features once, then every way on the same files."""
    given = ("--way", {"choices": sorted(WAYS), "help": "run one way alone"}), ("--folder", {"type": Path})
    args = arguments(__doc__ or "", *given)
    if args.way:
        alone(args.way, args.folder)
        return
    rows, dim = (6_400, 256) if args.quick else (50_000, 2_048)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        draw(folder, rows, dim)
        found = {way: timed(way, folder) for way in WAYS}
    mine = found["ours"]
    others = [found[way]["value"] for way in ("usual", "torchmetrics")]
    assert abs(found["again"]["value"] - mine["value"]) < 1e-9 * mine["value"]
    error = max(abs(mine["value"] - other) / abs(other) for other in others)
    split = abs(found["merged"]["value"] - found["whole"]["value"]) / abs(found["whole"]["value"])
    sizes = f"{rows:,} x {dim:,}"
    figures = [
        Figure("fd_relative_error", error, "", "lower", f"wanted <= 1e-6, {sizes}"),
        Figure("fd_shards_relative_error", split, "", "lower", "wanted <= 1e-9"),
        Figure("fd_speedup_torchmetrics", found["torchmetrics"]["seconds"] / mine["seconds"], "x", "higher", ">= 3"),
        Figure("fd_speedup_numpy", found["usual"]["seconds"] / mine["seconds"], "x", "higher", "wanted >= 3"),
        Figure("fd_again_torchmetrics", found["torchmetrics"]["seconds"] / found["again"]["seconds"], "x", "higher"),
        Figure("fd_again_numpy", found["usual"]["seconds"] / found["again"]["seconds"], "x", "higher"),
        Figure("fd_memory_ratio", mine["mb"] / found["usual"]["mb"], "", "lower", "wanted <= 1/3"),
    ]
    publish(figures, args.json)


if __name__ == "__main__":
    main()

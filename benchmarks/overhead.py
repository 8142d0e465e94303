"""What the pipeline costs on top of the bare work.

in_process_ratio      samples/s of a study in this process against a bare loop: same model, solver and batch, PNG and
                      Parquet written
two_workers_ratio     a study of 60 s and more on two Ray workers against one in-process worker, start-up included
help_s                ``solvus --help``
rerun_1000_shards_s   running a finished study of 1,000 shards again
memory_growth         peak memory of the driver at 100,000 samples against 10,000
"""

from __future__ import annotations

import io
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.harness import Figure, options, publish

SOLVUS = [sys.executable, "-m", "orchestrator.cli"]


def bare_loop(num_samples: int, batch: int, steps: int, folder: Path) -> float:
    """Samples a second of DPM-Solver++ 2M written out by hand around the network."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    import torch
    from PIL import Image

    from tasks.checkpoint import WEIGHTS, Checkpoint

    torch.set_num_threads(1)
    checkpoint = Checkpoint(WEIGHTS / "digits")
    net, process = checkpoint.network("cpu"), checkpoint.process
    times = [1 - i / steps for i in range(steps)] + [0.0]
    alpha, sigma = [process.alpha(t) for t in times], [process.sigma(t) for t in times]
    lam = [process.lam(t) for t in times]
    label = torch.arange(batch) % 10
    began = time.perf_counter()
    rows = []
    with torch.no_grad():
        for _ in range(0, num_samples, batch):
            x, previous = torch.randn(batch, 1, 8, 8), None
            for i in range(steps):
                n = torch.full((batch,), process.model_time(times[i]))
                eps = net(x, n, label).sample
                x0 = (x - sigma[i] * eps) / alpha[i]
                direction = x0
                if previous is not None and i + 1 < steps:
                    ratio = (lam[i + 1] - lam[i]) / (lam[i] - lam[i - 1])
                    direction = x0 + 0.5 * ratio * (x0 - previous)
                k = sigma[i + 1] / sigma[i]
                x, previous = k * x + (alpha[i + 1] - alpha[i] * k) * direction, x0
            pixels = ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).numpy()[:, 0]
            for image, row in zip(pixels, x.numpy(), strict=True):
                buffer = io.BytesIO()
                Image.fromarray(image).save(buffer, format="PNG", compress_level=1)
                rows.append({"image": buffer.getvalue(), "x0": row.reshape(-1).astype(np.float32)})
    pq.write_table(pa.Table.from_pylist(rows), folder / "bare.parquet")
    return num_samples / (time.perf_counter() - began)


def study_in_process(num_samples: int, batch: int, steps: int, root: Path) -> float:
    """Samples a second of the same as a study, store and all."""
    from orchestrator import config
    from orchestrator.ledger import Ledger
    from orchestrator.loop import run
    from orchestrator.progress import Progress
    from orchestrator.registries import executors, trackers
    from orchestrator.store import Store

    data = config.compose(
        [
            "model=digits",
            "solver=dpmpp_2m",
            f"nfe={steps}",
            f"num_samples={num_samples}",
            f"batch_size={batch}",
            "tracker=none",
            f"root={root}",
        ]
    )
    study = config.study(data)
    began = time.perf_counter()
    watch = Progress(stream=io.StringIO())
    run(study, executors.build("local"), Store(study.root), trackers.build("none"), watch, Ledger(), [])
    return num_samples / (time.perf_counter() - began)


def command(*arguments: str) -> float:
    """Wall seconds of one command."""
    began = time.perf_counter()
    subprocess.run([*SOLVUS, *arguments], check=True, capture_output=True)
    return time.perf_counter() - began


def peak_memory_mb(num_samples: int, root: Path) -> float:
    """Peak resident memory of a driver that makes and measures that many samples of a mixture."""
    script = (
        "import resource, sys; from orchestrator.cli import main; code = main(sys.argv[1:]);"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss); sys.exit(code)"
    )
    arguments = ["run", "model=gmm", "metrics=[{name:frechet,features:identity}]", f"num_samples={num_samples}"]
    arguments += ["nfe=4", "tracker=none", f"root={root}", f"name=memory{num_samples}", "--json"]
    done = subprocess.run([sys.executable, "-c", script, *arguments], check=True, capture_output=True, text=True)
    return int(done.stdout.strip().splitlines()[-1]) / 1024


def main() -> None:
    """Measure everything in one run."""
    args = options(__doc__ or "")
    figures = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        samples, steps, repeats = (1024, 4, 1) if args.quick else (4096, 10, 5)
        bare_loop(256, 256, steps, root), study_in_process(256, 256, steps, root / "warm")
        ratios = []
        for i in range(repeats):
            bare = bare_loop(samples, 256, steps, root)
            ratios.append(study_in_process(samples, 256, steps, root / f"in{i}") / bare)
            print(f"bare loop {bare:,.0f} samples/s, study at {ratios[-1]:.3f} of it", flush=True)
        figures.append(Figure("in_process_ratio", statistics.median(ratios), "ratio", "higher", "wanted >= 0.95"))

        count = 2048 if args.quick else 65536
        common = ["run", "model=digits", "solver=dpmpp_2m", "nfe=20", f"num_samples={count}", "tracker=none"]
        one = command(*common, f"root={root / 'one'}")
        two = command(*common, f"root={root / 'two'}", "executor=ray", "executor.workers=2")
        print(f"{count} samples: one in-process worker {one:.1f} s, two Ray workers {two:.1f} s", flush=True)
        figures.append(Figure("two_workers_ratio", one / two, "ratio", "higher", "wanted >= 1.7"))

        helps = [command("--help") for _ in range(7)]
        figures.append(Figure("help_s", statistics.median(helps), "s", "lower", "wanted < 0.5"))

        shards = 100 if args.quick else 1000
        again = ["run", "model=gmm", "metrics=[{name:frechet,features:identity}]", "nfe=4", f"root={root / 'many'}"]
        again += [f"num_samples={shards * 32}", "shard_size=32", "batch_size=32"]
        command(*again)
        reruns = [command(*again) for _ in range(3)]
        figures.append(Figure("rerun_1000_shards_s", statistics.median(reruns), "s", "lower", "wanted < 5"))

        small, large = (1000, 10_000) if args.quick else (10_000, 100_000)
        growth = peak_memory_mb(large, root / "memory") / peak_memory_mb(small, root / "memory")
        figures.append(Figure("memory_growth", growth, "ratio", "lower", "wanted <= 1.1"))
    publish(figures, args.json)


if __name__ == "__main__":
    main()

"""Token samplers on the embedded digits: the table of all of them, and first hitting against a thousand steps.

    python -m benchmarks.discrete --part table --keep DIR [--samples 512] [--nfe 4,8] [--only "LSD;tau-leaping"]
                                  [--markdown FILE]
    python -m benchmarks.discrete --part fhs --keep DIR [--samples 128] [--json]

Both parts are studies under DIR, so a run that was stopped goes on where it was, and ``solvus report`` shows them.

``table``: solver x evaluations with class accuracy, Fréchet distance, perplexity under the autoregressive model and the
entropy of the tokens within a picture, each with its 95 % interval.

``fhs``: first hitting, one evaluation a token, against ancestral sampling with 1,000 steps. ``fhs_call_ratio`` counts
what the samplers ask of the model; ``fhs_categorical_ratio`` is processor time in drawing tokens, per sample. The model
ignores the time, so while the plain sampler is timed the network's answer is remembered until a row changes: so many
steps are then affordable, and every draw is still made. Quality is measured on the cached sampler, whose rows are the
same. The Fréchet distance needs more than 64 samples.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Figure, arguments, commit, publish
from orchestrator.api import run
from orchestrator.measure import influences, paired_difference
from orchestrator.store import Store
from tasks import registry, unmasking
from tasks.checkpoint import digits_reference
from tasks.data.digits import held_out
from tasks.intervals import Z95
from tasks.noise import RowNoise
from tasks.recipe import Recipe
from tasks.sampler import CountedModel, Sampler

NFES = (4, 8, 16, 32, 64)
COLD = "{name: temperature, temperature: 0.8}"
SOLVERS = {
    "ancestral": "ancestral",
    "ancestral, temperature 0.8": f"{{name: ancestral, filters: [{COLD}]}}",
    "ancestral, top-p 0.9": "{name: ancestral, filters: [{name: top_p, p: 0.9}]}",
    "first hitting": "first_hitting",
    "tau-leaping": "tau_leaping",
    "LSD": "{name: lsd, learn: coefficients, num_samples: 128}",
    "LSD+": "{name: lsd, learn: both, num_samples: 128}",
    "confidence (margin)": "{name: confidence, confidence: margin, quota: linear}",
    "confidence (drawn token)": "{name: confidence, quota: linear}",
    "remasking": "{name: remasking, schedule: rescale, eta: 0.1}",
    "remasking, confident": "{name: remasking, confident: true, eta: 0.1}",
    "EDLM": "{name: edlm, k: 4}",
}
VALUES = {
    "quality/class_accuracy": ("accuracy", "{:.3f}"),
    "quality/frechet": ("Fréchet distance", "{:.1f}"),
    "quality/perplexity": ("perplexity", "{:.2f}"),
    "quality/token_entropy": ("entropy, nats", "{:.3f}"),
}
METRICS = "metrics=[class_accuracy, frechet, perplexity, token_entropy]"


def measured(name: str, keep: str, samples: int, sampler: str, nfe: str) -> list[dict[str, Any]]:
    """The trials of a study of some samplers at some numbers of evaluations."""
    found = run(
        f"root={keep}", f"name={name}", "model=digits_tokens", "solver=ancestral", "guidance=none", METRICS,
        f"num_samples={samples}", "batch_size=32", "shard_size=32", "tracker=none", "search=grid",
        f"search.space={{sampler: [{sampler}], nfe: [{nfe}]}}",
    )  # fmt: skip
    rows = found.trials().to_pylist()
    for row in rows:
        if row["state"] != "complete":
            raise ValueError(f"trial {row['title']} is {row['state']}: {row['reason']}. Look at its report.")
    return rows


def cell(row: dict[str, Any], name: str) -> str:
    """A value with half of its 95 % interval."""
    form = VALUES[name][1]
    return f"{form.format(row[f'value/{name}'])} ± {form.format(Z95 * row[f'se/{name}'])}"


def table(args: Any) -> list[Figure]:
    """Measure every solver; print, and perhaps write, the table."""
    wanted = [name for name in SOLVERS if not args.only or name in args.only.split(";")]
    nfes = [4, 8] if args.quick else [int(n) for n in args.nfe.split(",")] if args.nfe else NFES
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    for name in wanted:
        slug = "".join(c if c.isalnum() else "-" for c in name).strip("-")
        trials = measured(
            f"tokens-{slug}", args.keep, args.samples, f"{{solver: {SOLVERS[name]}}}", ", ".join(map(str, nfes))
        )
        rows |= {(name, int(row["nfe"])): row for row in trials}
    lines = [
        f"| solver | NFE | {' | '.join(head for head, _ in VALUES.values())} |",
        "|---|---|" + "---|" * len(VALUES),
    ]
    for (name, nfe), row in rows.items():
        lines.append(f"| {name} | {nfe} | {' | '.join(cell(row, value) for value in VALUES)} |")
    lines.append(f"| *held-out digits* | | {' | '.join(_data())} |")
    figures = []
    about = "LSD against what it is made from, at equal evaluations on the same noise (difference, 95 % interval):"
    lines += ["", about, ""]
    lines += ["| solver | over | NFE | Fréchet distance | accuracy | perplexity |", "|---|---|---|---|---|---|"]
    for name, base in (("LSD", "tau-leaping"), ("LSD+", "tau-leaping"), ("LSD+", "ancestral")):
        for nfe in nfes:
            if (name, nfe) in rows and (base, nfe) in rows:
                values = "quality/frechet", "quality/class_accuracy", "quality/perplexity"
                found = [paired(args.keep, rows[name, nfe], rows[base, nfe], value) for value in values]
                shown = " | ".join(f"{d:+.3f} ± {Z95 * e:.3f}" for d, e in found)
                lines.append(f"| {name} | {base} | {nfe} | {shown} |")
                figures.append(Figure(f"{name} over {base}, {nfe} evaluations, Fréchet", -found[0][0], "", "higher"))
    text = (
        "# Token samplers on the embedded digits\n\n"
        f"Made by `python -m benchmarks.discrete --part table --keep DIR --markdown docs/tokens_table.md` at commit "
        f"{commit()}: {args.samples} conditional samples a cell, no guidance, ± half of a 95 % interval. Accuracy: the "
        "classifier sees the digit that was asked for. Fréchet distance: in the classifier's features, to all 1,797 "
        "digits. Perplexity: of the samples given their labels, under the autoregressive model. Entropy: of the tokens "
        "within a picture; a perplexity below that of the data at an entropy below that of the data is no quality.\n\n"
    ) + "\n".join(lines)
    print(text, flush=True)
    if args.markdown:
        Path(args.markdown).write_text(text + "\n")
    return figures or [Figure("cells", float(len(rows)), "", "higher")]


def paired(keep: str, a: dict[str, Any], b: dict[str, Any], name: str) -> tuple[float, float]:
    """a - b and its standard error on the same sample indices."""
    store, spec = Store(keep, create=False), registry.metrics.complete({"name": name.removeprefix("quality/")})
    recipes = [Recipe(**store.get_json("recipes", row["key"])) for row in (a, b)]
    return paired_difference(*(influences(r, spec, name, 0, a["num_samples"], store) for r in recipes))


def difference(a: dict[str, Any], b: dict[str, Any], name: str) -> tuple[float, float]:
    """a - b and its standard error, as of independent samples."""
    return a[f"value/{name}"] - b[f"value/{name}"], math.hypot(a[f"se/{name}"], b[f"se/{name}"])


def _data() -> list[str]:
    """What the held-out digits themselves have: accuracy, no distance, perplexity and entropy."""
    images, labels = (values[held_out()] for values in digits_reference())
    rows: dict[str, Any] = {"label": labels}
    found = []
    for name in VALUES:
        metric = registry.metrics.build(name.removeprefix("quality/"))
        if name == "quality/frechet":
            found.append("")
            continue
        known = metric.reference(registry.models.build("digits_tokens"), lambda *_: None)
        for spec in metric.needs():
            scorer = registry.scorer(spec)
            with torch.no_grad():
                values = scorer(torch.as_tensor(images), torch.as_tensor(labels))
            rows[registry.column(spec)] = values.numpy()
        found.append(VALUES[name][1].format(metric.compute(metric.summarize(rows), known)[name]))
    return found


# --- first hitting ---------------------------------------------------------------------------------------------------


class Remembering:
    """A model that ignores the time, evaluated only for rows that changed since it was asked last."""

    def __init__(self, model: Any) -> None:
        self._model, self._last = model, None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def denoise(self, x: Tensor, t: Any, cond: Tensor | None) -> Tensor:
        """As the model's."""
        if self._last is None:
            self._last = (x.clone(), self._model.denoise(x, t, cond))
        known, answer = self._last
        rows = (known != x).any(dim=1).nonzero()[:, 0]
        if len(rows):
            answer[rows] = self._model.denoise(x[rows], t, None if cond is None else cond[rows])
            known[rows] = x[rows]
        return answer.clone()


@contextmanager
def timed_draws() -> Iterator[list[float]]:
    """Within, the processor seconds of every draw of tokens are listed."""
    plain, seconds = unmasking.draw, []

    def draw(*args: Any, **kwargs: Any) -> Tensor:
        began = time.process_time()
        found = plain(*args, **kwargs)
        seconds.append(time.process_time() - began)
        return found

    unmasking.draw = draw
    try:
        yield seconds
    finally:
        unmasking.draw = plain


def timed(solver: dict[str, Any], steps: int, rows: int, remember: bool) -> tuple[float, float, Tensor]:
    """Model calls and seconds of drawing tokens, a sample; and the samples."""
    model = registry.models.build("digits_tokens").load("cpu")
    counted = CountedModel(Remembering(model) if remember else model, 64)
    times = tuple(1.0 - i / steps for i in range(steps)) + (0.0,)
    sampler = Sampler(counted, registry.solvers.build(solver), times, torch.arange(rows) % 10)
    with timed_draws() as seconds, torch.no_grad():
        x = sampler.run(RowNoise(0, torch.arange(rows))).x
    return counted.rows / rows, sum(seconds) / rows, x


def first_hitting(args: Any) -> list[Figure]:
    """Calls, time in drawing, and the differences of quality."""
    steps, rows = (100 if args.quick else 1000), (4 if args.quick else 64)
    plain = timed({"name": "ancestral"}, steps, rows, True)
    cached = timed({"name": "ancestral", "cache": True}, steps, rows, False)
    hitting = timed({"name": "first_hitting"}, 64, rows, False)
    print(f"| {rows} samples | model calls a sample | ms in drawing tokens a sample |\n|---|---|---|")
    for name, found in (("ancestral", plain), ("ancestral, cached", cached), ("first hitting", hitting)):
        print(f"| {name} | {found[0]:.1f} | {1e3 * found[1]:.2f} |")
    same = float((plain[2] == cached[2]).all(dim=1).double().mean())
    (a,) = measured("fhs-hitting", args.keep, args.samples, "{solver: first_hitting}", "64")
    (b,) = measured("fhs-cached", args.keep, args.samples, "{solver: {name: ancestral, cache: true}}", str(steps))
    print(
        f"\n| {args.samples} samples | {' | '.join(head for head, _ in VALUES.values())} |\n|---|"
        + "---|" * len(VALUES)
    )
    for name, row in (("first hitting, 64 calls", a), (f"ancestral, {steps} steps, cached", b)):
        print(f"| {name} | {' | '.join(cell(row, value) for value in VALUES)} |")
    apart = {value: difference(a, b, value) for value in VALUES}
    print("| difference | " + " | ".join(f"{d:+.3f} ± {Z95 * e:.3f}" for d, e in apart.values()) + " |")
    return [
        Figure("fhs_call_ratio", plain[0] / hitting[0], "x", "higher", ">= 10"),
        Figure("fhs_categorical_ratio", plain[1] / hitting[1], "x", "higher", ">= 10"),
        Figure("fhs_cached_call_ratio", cached[0] / hitting[0], "x", "higher"),
        Figure("fhs_quality_sigmas", max(abs(d) / e for d, e in apart.values()), "sigma", "lower", "< 3"),
        Figure("rows that the cache leaves the same", same, "", "higher", "1 up to rounding"),
    ]


def main() -> None:
    """Run one part."""
    args = arguments(
        __doc__,
        ("--part", {"choices": ["table", "fhs"], "default": "fhs", "help": "what to measure"}),
        ("--keep", {"required": True, "help": "folder of the studies; a run goes on where it was"}),
        ("--samples", {"type": int, "default": None, "help": "samples a cell (512 for the table, 128 for fhs)"}),
        ("--nfe", {"default": "", "help": "numbers of evaluations of the table (4,8,16,32,64)"}),
        ("--only", {"default": "", "help": "names of solvers of the table, separated by semicolons"}),
        ("--markdown", {"default": "", "help": "file to write the table to"}),
    )
    torch.set_num_threads(1)
    args.samples = args.samples or (512 if args.part == "table" else 128)
    publish(table(args) if args.part == "table" else first_hitting(args), args.json)


if __name__ == "__main__":
    main()

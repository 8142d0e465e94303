"""Does a search pay: better schedules than the published ones, for a fraction of the evaluations, on fresh seeds.

    python -m benchmarks.search [--part quality|trajectory|tpe|predictor|overhead] [--model NAME] [--nfe 3,4]
                                [--seeds 5] [--keep DIR] [--only-kept] [--quick] [--json]

Everything runs through studies as a user would write them. ``--keep DIR`` holds what was measured, one JSON line a cell
beside the studies themselves, so that a run which was stopped goes on where it was and two processes may share the work
(``--model`` divides it). The figures are medians over seeds and models; a seed changes the search and its samples.

excess_ratio_nfeN        held-out Fréchet distance of the searched schedule above the model's many-step value, over the
                         same of the best stock schedule (every preset with every stock grid)
trajectory_ratio_nfeN    held-out root mean square distance to the many-step solution, searched over best stock
evaluations_vs_tpe       evaluations until the search holds a schedule as good, on held-out samples, as plain TPE (fresh
                         samples and all of them for every trial, no baselines) has after 200 trials, over TPE's
predictor_rank_correlation  Spearman, between predicted and true quality of 40 schedules that it has not seen,
                         after a warm-up of 30 random ones; three of four are children of the best four, one is random.
                         5 evaluations, 512 samples, the same for all; a seed changes the search alone
predictor_saving         1 - trials of the predictor-guided evolution over 100, to the quality that the same without
                         predictor has after 100 (warm-ups counted; gmm, or the model that --model names)
trial_overhead_ms        ask, plan, tell and track of a trial, SQLite, 10 parameters, 500 trials, rows already there
"""

from __future__ import annotations

import io
import json
import math
import statistics
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import Figure, arguments, commit, publish
from orchestrator import config
from orchestrator.adapters.optuna_samplers import S3Sampler
from orchestrator.adapters.optuna_samplers.history import History, Point, best
from orchestrator.adapters.optuna_samplers.points import key_of
from orchestrator.executors.local import LocalExecutor
from orchestrator.ledger import Ledger
from orchestrator.loop import run as run_study
from orchestrator.measure import measure, scorers
from orchestrator.plan import shards
from orchestrator.progress import Progress
from orchestrator.registries import searches, trackers
from orchestrator.results import Results
from orchestrator.space import Space
from orchestrator.store import Store
from orchestrator.worker import perform

ALGORITHM = "turbo"
MODELS = ("digits", "digits_flow", "gmm")
SPACES = {"digits": "weights", "digits_flow": "velocity", "gmm": "weights"}  # the form that suits the process
# Of the mixture at more evaluations the best stock schedules are of the velocity form (seen on seed 0).
AT_COST = {("gmm", 5): "velocity", ("gmm", 6): "velocity"}
PATH_ALGORITHM, PATH_SPACE = "least_squares", "trajectory"  # for the trajectory error
# Few rows of the mixture, near where its parts meet, make most of its mean square error; it is cheap, so it has more.
PATH_SAMPLES = {"gmm": 4096}
PATH_TRIALS = {5: 3, 8: 4}  # times those asked for: 29 and 59 axes, each with derivatives twice
MORE_TRIALS = {"gmm": 4}  # the mixture is cheap, and its last bit of distance is small beside the noise
NFES = (3, 4, 5, 6, 8)
FRECHET, TRAJECTORY = "quality/frechet", "quality/trajectory_error"
HELD_OUT = 2048
PREDICTED_NFE, PREDICTED_SAMPLES = 5, 512
RACING = "{start: 256, factor: 2.0, error: 0.2, margin: 0.05}"
QUICK_RACING = "{start: 128, factor: 2.0, error: 0.3, margin: 0.02}"
PATH_RACING = "{start: 128, factor: 2.0, error: 0.05}"  # of the baselines alone
# What a user would start from who does not try every preset on every grid.
START = [
    f"{{solver: {{name: unified, preset: {preset}}}, times: uniform}}"
    for preset in ("velocity_2m", "unipc_bh1", "dpmpp_2m", "deis")
]


class Kept:
    """Measured cells in a file, so that a run can be stopped and go on."""

    def __init__(self, folder: Path, only: bool) -> None:
        self.folder, self.only = folder, only
        folder.mkdir(parents=True, exist_ok=True)
        self._file = folder / "cells.jsonl"

    def all(self) -> list[dict[str, Any]]:
        """Every cell."""
        if not self._file.exists():
            return []
        return [json.loads(line) for line in self._file.read_text().splitlines() if line]

    def find(self, **key: Any) -> dict[str, Any] | None:
        """The cell of a key."""
        return next((c for c in self.all() if all(c.get(k) == v for k, v in key.items())), None)

    def add(self, cell: dict[str, Any]) -> dict[str, Any]:
        """Keep one more."""
        with self._file.open("a") as file:
            file.write(json.dumps(cell) + "\n")
        return cell


def prepared(root: Path, *overrides: str, tracker: str = "none") -> Any:
    """A study as the command line would compose it."""
    return config.study(config.compose([*overrides, f"root={root}", f"tracker={tracker}"]))


def carry_out(study: Any, tracker: str = "none") -> list[Any]:
    """Run or continue a study in this process; its trials."""
    store, results, trials = Store(study.root), Results(study.root, study.name), []  # type: ignore[var-annotated]
    results.save_study(study)
    mirror = trackers.build(tracker).start(study)
    watch = Progress(stream=io.StringIO())
    results.save_search(run_study(study, LocalExecutor(), store, mirror, watch, Ledger(), trials))
    results.save_trials(trials)
    mirror.close({}, [])
    return trials


def run(root: Path, *overrides: str) -> list[dict[str, Any]]:
    """One study, run or continued; its trial table."""
    study = prepared(root, *overrides)
    carry_out(study)
    return Results(study.root, study.name).trials()


def metric_of(model: str, objective: str) -> str:
    """The metrics of a study of a model."""
    if objective == TRAJECTORY:
        return "metrics=[trajectory]"
    return "metrics=[{name: frechet, features: identity}]" if model == "gmm" else "metrics=[frechet]"


def common(model: str, seed: int, objective: str) -> list[str]:
    """What every study of a cell shares."""
    fit = ["model.fit=digits"] if model == "gmm" else []
    return [f"model={model}", *fit, f"seed={seed}", metric_of(model, objective), "shard_size=1024"]


def searched(model: str, nfe: int, seed: int, objective: str, trials: int, root: Path, full: int) -> dict[str, Any]:
    """The search and its answer on held-out samples."""
    space = AT_COST.get((model, nfe), SPACES[model]) if objective == FRECHET else PATH_SPACE
    algorithm = ALGORITHM if objective == FRECHET else PATH_ALGORITHM
    racing = f"search.racing={RACING if objective == FRECHET else PATH_RACING}"
    rows = run(
        root, *common(model, seed, objective), *search_of(trials, algorithm), f"space={space}",
        f"search.objective={objective}", racing, f"search.held_out={HELD_OUT if objective == FRECHET else full}",
        f"num_samples={full}", f"nfe={nfe}", "solver=dpmpp_2m", "reuse_gib=1.0",
        f"name=search-{objective[8:12]}-{model}-{nfe}-{seed}",
    )  # fmt: skip
    held = [row for row in rows if row["part"].endswith("held_out")]
    mine = next((row for row in held if not row["baseline"]), held[0])
    known = next((row for row in held if row["baseline"]), held[0])
    inner = [row for row in rows if row not in held]
    return {
        "searched": mine[f"value/{objective}"],
        "stock": known[f"value/{objective}"],
        "stock_name": known["baseline"],
        "selection": next(row[f"value/{objective}"] for row in inner if row["key"] == mine["key"]),
        "evaluations": sum(row["cost/nfe"] for row in {row["key"]: row for row in inner}.values()),
        "trials": len(inner),
    }


def search_of(trials: int, name: str = ALGORITHM) -> list[str]:
    """The algorithm."""
    return [f"search={name}", f"search.num_trials={trials}", "search.part=search"]


def many_step(model: str, seed: int, root: Path, kept: Kept) -> float:
    """The model's own value in 64 steps, on the held-out samples."""
    key = {"part": "many", "model": model, "seed": seed}
    found = kept.find(**key)
    if found is None:
        grid = "quadratic" if model == "digits" else "uniform"
        rows = run(
            root, *common(model, seed, FRECHET), "solver=dpmpp_2m", "nfe=64", f"times={grid}",
            f"num_samples={HELD_OUT}", f"first_index={2**30}", f"name=many-{model}-{seed}",
        )  # fmt: skip
        found = kept.add(key | {"value": rows[0][f"value/{FRECHET}"]})
    return float(found["value"])


def quality(models: Iterable[str], nfes: Iterable[int], seeds: int, kept: Kept, trials: int, full: int) -> None:
    """The Fréchet cells."""
    for seed in range(seeds):
        for model in models:
            root = kept.folder / model
            many = many_step(model, seed, root, kept)
            for nfe in nfes:
                key = {"part": "quality", "model": model, "nfe": nfe, "seed": seed}
                if kept.find(**key) is None:
                    began = time.perf_counter()
                    found = searched(model, nfe, seed, FRECHET, MORE_TRIALS.get(model, 1) * trials, root, full)
                    kept.add(key | found | {"many": many, "seconds": round(time.perf_counter() - began, 1)})
                    show(key, found | {"many": many})


def trajectory(models: Iterable[str], nfes: Iterable[int], seeds: int, kept: Kept, trials: int) -> None:
    """The trajectory cells: more trials."""
    for seed in range(seeds):
        for model in models:
            for nfe in nfes:
                key = {"part": "trajectory", "model": model, "nfe": nfe, "seed": seed}
                if kept.find(**key) is None:
                    found = searched(
                        model,
                        nfe,
                        seed,
                        TRAJECTORY,
                        PATH_TRIALS.get(nfe, 3) * trials,
                        kept.folder / model,
                        PATH_SAMPLES.get(model, 1024),
                    )
                    kept.add(key | found)
                    show(key, found)


def show(key: dict[str, Any], found: dict[str, Any]) -> None:
    """One cell, as it is measured."""
    values = {k: round(v, 4) if isinstance(v, float) else v for k, v in found.items()}
    print(json.dumps(key | values), flush=True)


# --- against plain TPE ------------------------------------------------------------------------------------------------


@searches.register("fresh_samples")
@dataclass(frozen=True)
class FreshSamples:
    """Another search whose trials each have samples of their own, as a script with a running seed gives them.

    Args:
        inner: spec of the search.
        samples: of every trial.
    """

    inner: dict[str, Any] = field(default_factory=dict)
    samples: int = 1024

    def start(self, context: Any) -> _Fresh:
        """The inner search."""
        return _Fresh(searches.build(self.inner).start(context), self.samples)


class _Fresh:
    def __init__(self, inner: Any, samples: int) -> None:
        self._inner, self._samples, self._asked = inner, samples, 0

    def ask(self) -> Any:
        """The inner search's, on the next samples."""
        found = self._inner.ask()
        if found is None:
            return None
        self._asked += 1
        fresh = {"first_index": self._asked * self._samples}
        return replace(found, overrides=dict(found.overrides) | fresh, handle=found)

    def tell(self, proposal: Any, values: Any) -> None:
        """To the inner search."""
        self._inner.tell(proposal.handle, values)


def held_out_value(recipe: Any, overrides: Mapping[str, Any], root: Path, metrics: list[Any]) -> float:
    """The true quality of a schedule: on held-out samples, charged to nobody."""
    store = Store(root)
    found = recipe.override({k: v for k, v in overrides.items() if k not in ("num_samples", "first_index")})
    return distance(found, metrics, (2**30, 2**30 + HELD_OUT), store)


def distance(recipe: Any, metrics: list[Any], span: tuple[int, int], store: Store) -> float:
    """The Fréchet distance of a range of samples."""
    for shard in shards(recipe, scorers(metrics), *span, 1024, store):
        perform(shard)
    return measure(recipe, metrics, *span, store)[0][FRECHET]


def against_tpe(nfe: int, seeds: Iterable[int], kept: Kept, plain_trials: int, trials: int, full: int) -> None:
    """Evaluations to the quality of plain TPE: our search with all it has, and TPE as people run it."""
    model = "digits_flow"
    for seed in seeds:
        key = {"part": "tpe", "model": model, "nfe": nfe, "seed": seed}
        if kept.find(**key) is not None:
            continue
        root = kept.folder / f"{model}-tpe"
        base = [*common(model, seed, FRECHET), f"num_samples={full}", f"nfe={nfe}", "solver=dpmpp_2m"]
        base += [f"space={SPACES[model]}", "search.held_out=0"]
        ours = prepared(
            root, *base, *search_of(trials), f"search.racing={QUICK_RACING}", f"name=tpe-{ALGORITHM}-{seed}"
        )
        tpe = {
            "name": "tpe",
            "space": ours.search["space"],
            "num_trials": plain_trials,
            "held_out": 0,
            "part": "search",
        }
        plain = replace(ours, name=f"tpe-plain-{seed}", search={"name": "fresh_samples", "inner": tpe, "samples": full})
        tried = carry_out(plain)
        best = min((t for t in tried if t.state == "complete"), key=lambda t: t.values[FRECHET])
        target = held_out_value(ours.recipe, best.proposal.overrides, root, ours.metrics)
        spent, reached, crown, value = 0.0, math.nan, math.inf, math.nan
        seen: dict[str, float] = {}
        for trial in carry_out(ours):
            spent += trial.cost["nfe"] - seen.get(trial.recipe.key, 0.0)
            seen[trial.recipe.key] = trial.cost["nfe"]
            if trial.stopped or trial.values[FRECHET] >= crown or not math.isnan(reached):
                continue
            crown = trial.values[FRECHET]
            value = held_out_value(ours.recipe, trial.proposal.overrides, root, ours.metrics)
            reached = spent if value <= target else math.nan
        cell = {"target": target, "value": value, "plain": sum(t.cost["nfe"] for t in tried), "ours": reached}
        show({}, kept.add(key | cell | {"spent": spent}))


# --- the predictor ----------------------------------------------------------------------------------------------------


class Truth:
    """True quality of points of a cell's space: Fréchet distance on the same samples for all, each measured once."""

    def __init__(self, model: str, kept: Kept) -> None:
        lines = [*common(model, 0, FRECHET), f"nfe={PREDICTED_NFE}", "solver=dpmpp_2m", "space=schedule", "search=s3"]
        study = prepared(kept.folder, *lines, "name=predictor")
        self.space = Space(study.search["space"], study.recipe)
        self._recipe, self._metrics, self._file = study.recipe, study.metrics, kept.folder / f"truth-{model}.jsonl"
        entries = self._file.read_text().splitlines() if self._file.exists() else []
        self._values: dict[str, float] = dict(json.loads(entry) for entry in entries)

    def __call__(self, params: Mapping[str, Any]) -> float:
        """The distance; infinite where a schedule blows up."""
        key = key_of(self.space, params)
        if key not in self._values:
            recipe = self._recipe.override(dict(self.space.decode(params)))
            with tempfile.TemporaryDirectory() as folder:
                value = distance(recipe, self._metrics, (0, PREDICTED_SAMPLES), Store(folder))
            self._values[key] = value if math.isfinite(value) else math.inf
            with self._file.open("a") as file:
                file.write(json.dumps([key, self._values[key]]) + "\n")
        return self._values[key]


def evolved(sampler: Any, truth: Truth, trials: int, target: float = -math.inf) -> list[Point]:
    """What a sampler finds, one trial after another, until one is as good as the target."""
    points: list[Point] = []
    losses: dict[str, float] = {}
    for position in range(trials):
        params = sampler.propose(History(tuple(points), losses, position))
        losses[key_of(truth.space, params)] = loss = truth(params)
        if math.isfinite(loss):
            points.append(Point(params, loss, position))
        if loss <= target:
            break
    return points


def predicted(models: Iterable[str], seeds: int, kept: Kept, warm_up: int, fresh: int) -> None:
    """Rank correlation on unseen schedules after the warm-up: of every four, three are children, one is random."""
    from scipy.stats import spearmanr

    for model in models:
        truth = Truth(model, kept)
        for seed in range(seeds):
            key = {"part": "predictor", "model": model, "nfe": PREDICTED_NFE, "seed": seed, "warm_up": warm_up}
            if kept.find(**key) is not None:
                continue
            sampler = S3Sampler(truth.space, seed, startup=warm_up, pool=2 * fresh)
            known = evolved(sampler, truth, warm_up)
            parents = [point.params for point in best(tuple(known), sampler.parents)]
            taken = {key_of(truth.space, point.params) for point in known}
            unseen: dict[str, tuple[Any, bool]] = {}
            for i, params in enumerate(sampler.children(parents, sampler.generator("unseen"), mixed=True)):
                if len(unseen) < fresh and (name := key_of(truth.space, params)) not in taken:
                    unseen.setdefault(name, (params, i % 4 != 3))
            began = time.process_time()
            guess = sampler.fitted(known, seed)([params for params, _ in unseen.values()])
            cell = {"unseen": len(unseen), "seconds": time.process_time() - began}
            found = np.array([truth(params) for params, _ in unseen.values()])
            is_child = np.array([flag for _, flag in unseen.values()])
            cell["correlation"] = float(spearmanr(guess, found).statistic)
            cell["among_children"] = float(spearmanr(guess[is_child], found[is_child]).statistic)
            show(key, kept.add(key | cell))


def saved(models: Iterable[str], seeds: int, kept: Kept, trials: int) -> None:
    """Evaluations to the quality of the evolution without predictor."""
    for model in models:
        truth = Truth(model, kept)
        for seed in range(seeds):
            key = {"part": "saving", "model": model, "nfe": PREDICTED_NFE, "seed": seed, "trials": trials}
            if kept.find(**key) is None:
                plain = best(tuple(evolved(S3Sampler(truth.space, seed, predictor=False), truth, trials)), 1)[0]
                mine = evolved(S3Sampler(truth.space, seed), truth, 2 * trials, plain.loss)
                reached = mine[-1].position + 1 if mine[-1].loss <= plain.loss else math.inf
                show(key, kept.add(key | {"target": plain.loss, "plain": plain.position + 1, "guided": reached}))


# --- overhead ---------------------------------------------------------------------------------------------------------


def overhead(num_trials: int) -> list[Figure]:
    """A study of trials whose rows are there already: what is left is asking, planning, telling and tracking."""
    space = {f"times.ratios.{i}": {"low": 0.1, "high": 0.9} for i in range(10)}
    with tempfile.TemporaryDirectory() as folder:
        lines = [
            "model=gmm", "solver=ddim", "times=ratios", f"times.ratios={[0.5] * 10}", "metrics=[]", "num_samples=8",
            "batch_size=8", "name=overhead", f"root={folder}",
        ]  # fmt: skip
        spec = {"name": "random", "space": space, "num_trials": num_trials, "objective": "cost/nfe", "held_out": 0}
        seconds = {}
        for tracked in ("mlflow", "none"):
            study = prepared(Path(folder), *lines, tracker=tracked)
            study = replace(study, name=f"overhead-{tracked}", search=spec | {"part": tracked})
            began = time.perf_counter()
            made = carry_out(study, tracked)
            work = sum(t.cost["generate_s"] for t in made)
            seconds[tracked] = (time.perf_counter() - began - work) / num_trials
    return [
        Figure("trial_overhead_ms", 1e3 * seconds["mlflow"], "ms", "lower", "<= 100"),
        Figure("trial_overhead_untracked_ms", 1e3 * seconds["none"], "ms", "lower"),
    ]


# --- the answer -------------------------------------------------------------------------------------------------------


def figures(kept: Kept) -> list[Figure]:
    """Medians over seeds and models of what was measured."""
    found: list[Figure] = []
    wanted = {3: 0.85, 4: 0.3, 5: 0.3, 6: 0.4}
    cells = kept.all()
    for nfe in NFES:
        ratios = [r for c in cells if c["part"] == "quality" and c["nfe"] == nfe if (r := excess(c)) is not None]
        if ratios:
            limit = f"<= {wanted[nfe]}" if nfe in wanted else ""
            found.append(Figure(f"excess_ratio_nfe{nfe}", statistics.median(ratios), "ratio", "lower", limit))
    for nfe in (5, 8):
        errors = [c["searched"] / c["stock"] for c in cells if c["part"] == "trajectory" and c["nfe"] == nfe]
        if errors:
            found.append(Figure(f"trajectory_ratio_nfe{nfe}", statistics.median(errors), "ratio", "lower", "<= 0.6"))
    tpe = [c["ours"] / c["plain"] if math.isfinite(c["ours"]) else math.inf for c in cells if c["part"] == "tpe"]
    if tpe:
        found.append(Figure("evaluations_vs_tpe", statistics.median(tpe), "ratio", "lower", "<= 0.2"))
    ranks = [c["correlation"] for c in cells if c["part"] == "predictor"]
    if ranks:
        found.append(Figure("predictor_rank_correlation", statistics.median(ranks), "rho", "higher", ">= 0.7"))
    spared = [1 - c["guided"] / c["trials"] for c in cells if c["part"] == "saving"]
    if spared:
        found.append(Figure("predictor_saving", statistics.median(spared), "share", "higher"))
    return found


def excess(cell: dict[str, Any]) -> float | None:
    """Searched over stock excess; None where the best stock schedule has none: it is as good as many steps."""
    above = cell["stock"] - cell["many"]
    return (cell["searched"] - cell["many"]) / above if above > 0.05 * cell["many"] else None


def table(kept: Kept) -> None:
    """The cells as Markdown: medians over seeds."""
    cells = kept.all()
    for part, title in (("quality", "Fréchet distance, held out"), ("trajectory", "trajectory error, held out")):
        mine = [c for c in cells if c["part"] == part]
        if not mine:
            continue
        print(f"\n### {title}, medians over seeds\n")
        heads = "model", "evaluations", "best stock", "searched", "searched / stock", "many steps", "excess ratio"
        print("| " + " | ".join([*heads, "best stock is"]) + " |")
        print("|---|---|---|---|---|---|---|---|")
        for model in MODELS:
            for nfe in NFES:
                group = [c for c in mine if (c["model"], c["nfe"]) == (model, nfe)]
                if not group:
                    continue
                middle = {k: statistics.median(c[k] for c in group) for k in ("stock", "searched")}
                each = statistics.median(c["searched"] / c["stock"] for c in group)
                ratios = [r for c in group if (r := excess(c)) is not None] if part == "quality" else []
                many = f"{statistics.median(c['many'] for c in group):.2f}" if part == "quality" else "0"
                over = f"{statistics.median(ratios):.2f} ({len(ratios)} of {len(group)})" if ratios else "–"
                names = statistics.mode(c["stock_name"].rsplit(",", 1)[0] for c in group)
                shown = [model, nfe, f"{middle['stock']:.4g}", f"{middle['searched']:.4g}", f"{each:.2f}", many, over]
                print("| " + " | ".join(map(str, [*shown, names])) + " |")


def main() -> None:
    """Measure what was asked for."""
    from tasks.run import use_one_thread

    use_one_thread()
    args = arguments(
        __doc__ or "",
        ("--part", {"choices": PARTS, "help": "measure only this"}),
        ("--model", {"choices": list(MODELS), "help": "only this model"}),
        ("--nfe", {"help": "numbers of evaluations, for example 3,4"}),
        ("--seeds", {"type": int, "default": 5, "help": "seeds of every cell (default 5)"}),
        ("--seed", {"type": int, "help": "of the comparison with TPE only this seed"}),
        ("--trials", {"type": int, "default": 60, "help": "proposals of a search (default 60)"}),
        ("--keep", {"help": "folder that keeps studies and cells"}),
        ("--only-kept", {"action": "store_true", "help": "print what the folder has, measure nothing"}),
    )
    folder = Path(args.keep) if args.keep else Path(tempfile.mkdtemp(prefix="solvus-search-"))
    kept = Kept(folder, args.only_kept)
    models = [args.model] if args.model else list(MODELS)
    nfes = tuple(int(n) for n in args.nfe.split(",")) if args.nfe else (4,) if args.quick else None
    seeds, trials, full = (1, 20, 512) if args.quick else (args.seeds, args.trials, 512)
    parts = [] if args.only_kept else [args.part] if args.part else list(PARTS)
    more: list[Figure] = []
    if "overhead" in parts:
        more += overhead(50 if args.quick else 500)
    if "trajectory" in parts:
        trajectory(models, nfes or (5, 8), seeds, kept, trials)
    if "quality" in parts:
        quality(models, nfes or (3, 4, 5, 6), seeds, kept, trials, full)
    if "tpe" in parts:
        against_tpe(
            4,
            [args.seed] if args.seed is not None else range(seeds),
            kept,
            20 if args.quick else 200,
            2 * trials,
            full if args.quick else 1024,
        )
    if "predictor" in parts:
        chosen = ["gmm"] if args.quick and not args.model else models
        predicted(chosen, seeds, kept, 30, 40)
        saved([args.model] if args.model else ["gmm"], seeds, kept, 30 if args.quick else 100)
    table(kept)
    print(f"\ncommit {commit()}")
    publish([*figures(kept), *more] or [Figure("cells", len(kept.all()), "cells", "higher")], args.json)


PARTS = ("overhead", "trajectory", "quality", "tpe", "predictor")

if __name__ == "__main__":
    main()

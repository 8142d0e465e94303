"""The verbs of the command line that only look: status, report, verify, gc, shard, list, show, doctor,
completion, and ``init``, which writes a first study."""

from __future__ import annotations

import inspect
import json
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

from orchestrator.exits import COMPLETE, FAILED, USAGE


def emit(args: Any, data: Any, text: str) -> None:
    print(json.dumps(data, default=str) if args.json else text)


def write_report(root: str, name: str) -> str:
    from dashboards.report import build

    return build.write(root, name)


def root_and_name(args: Any) -> tuple[str, str | None]:
    """The root and, if one was named, the study of a verb that only reads."""
    from orchestrator import config

    files = config.studies(args.config_dir)
    stored = [
        f"name={name}" if key == "study" and name not in files and _is_stored(args, name) else item
        for item in args.overrides for key, _, name in [item.partition("=")]
    ]  # fmt: skip
    data = config.compose(stored, args.config_dir)
    named = any(item.split("=")[0] in ("study", "name") for item in args.overrides)
    return config.root_of(data), str(data["name"]) if named else None


def _is_stored(args: Any, name: str) -> bool:
    """Whether a study of that name was run: its file need not be named again to read its results."""
    from orchestrator import config, results

    root = [item for item in args.overrides if item.startswith("root=")]
    return name in results.known(config.root_of(config.compose(root)))


def status(args: Any) -> int:
    """``solvus status``."""
    from orchestrator import results

    root, name = root_and_name(args)
    if args.follow:
        return _follow(args, root, name)
    found = []
    for study in [name] if name else results.known(root):
        folder = results.Results(root, study)
        folder.study()
        state = folder.state()
        trials = folder.trials()
        found.append(
            {
                "study": study,
                "state": state["state"],
                "trials": len(trials),
                "failed": sum(row["state"] == "failed" for row in trials),
                "quarantined": {
                    f"{row['key']}/{index}": why
                    for row in trials
                    for index, why in json.loads(row["quarantined"]).items()
                },
                "reasons": [row["reason"] for row in trials if row["state"] == "failed"],
                "summary": state["summary"],
                "report": f"{folder.folder}/report.html",
            }
        )
    lines = []
    for row in found:
        done = f"{row['trials']:>5} trials, {row['failed']} failed"
        going = row["summary"].get("progress") if row["state"] == "running" else None
        lines.append(f"{row['study']:<20} {row['state']:<12} {going or done}")
    for row in found if name else []:
        lines += [f"  failed: {reason}" for reason in row["reasons"][:20]]
        lines += [f"  quarantined {index}: {why}" for index, why in row["quarantined"].items()]
    emit(args, found, "\n".join(lines) or f"no studies in {root}")
    return COMPLETE


def _follow(args: Any, root: str, name: str | None) -> int:
    """Follow the study that was named, or the only one that runs.

    Raises:
        ValueError: none was named, and not exactly one runs.
    """
    from orchestrator import results
    from orchestrator.follow import follow

    if name is None:
        running = [study for study in results.known(root) if results.Results(root, study).state()["state"] == "running"]
        if len(running) != 1:
            which = f"these run: {', '.join(running)}" if running else "none runs"
            raise ValueError(f"--follow needs one study, and in {root} {which}. Say which: study=NAME.")
        (name,) = running
    folder = results.Results(root, name)
    folder.study()
    try:
        return follow(folder, args.json)
    except KeyboardInterrupt:  # the study goes on; only looking at it ended
        return COMPLETE


def report(args: Any) -> int:
    """``solvus report``."""
    root, name = root_and_name(args)
    if name is None:
        raise ValueError("report needs a study: solvus report study=NAME")
    path = write_report(root, name)
    emit(args, {"report": path}, path)
    return COMPLETE


def verify(args: Any) -> int:
    """``solvus verify``."""
    from orchestrator.store import Store

    root, _ = root_and_name(args)
    counts, wrong = Store(root, create=False).verify(withdraw=args.withdraw)
    text = f"{counts['files']:,} files, {counts['bytes'] / 1e6:,.1f} MB read, {len(wrong)} wrong"
    emit(args, counts | {"wrong": wrong}, "\n".join([text, *(f"  {line}" for line in wrong)]))
    return FAILED if wrong else COMPLETE


def gc(args: Any) -> int:
    """``solvus gc``."""
    from orchestrator.files import is_remote
    from orchestrator.store import Store

    root, _ = root_and_name(args)
    removed = Store(root, create=False).collect_garbage(args.older_than_s, args.dry_run, args.release)
    if args.states and not is_remote(root):
        from orchestrator.states import StateCache

        files, size = StateCache(root, 0).clear(args.dry_run)
        removed["files"] += files
        removed["bytes"] += size
    done = "would go" if args.dry_run else "gone"
    text = f"{removed['files']:,} orphans, {removed['bytes'] / 1e6:,.1f} MB {done}; {removed['released']} rows released"
    emit(args, removed, text)
    return COMPLETE


def shard(args: Any) -> int:
    """``solvus shard``."""
    import numpy as np

    from orchestrator import rows
    from orchestrator.store import Store
    from tasks.recipe import Recipe
    from tasks.run import generate
    from tasks.types import sample_shape

    names = [item for item in args.overrides if "=" not in item]
    args.overrides = [item for item in args.overrides if "=" in item]
    root, _ = root_and_name(args)
    store = Store(root, create=False)
    try:
        (name,) = names
        key, span = name.split("/")
        start, stop = (int(part) for part in span.split("-"))
    except ValueError:
        raise ValueError(f"a shard is named KEY/START-STOP, got {' '.join(names) or 'nothing'!r}.") from None
    spec = store.get_json("recipes", key) if key.isalnum() else None
    if spec is None:
        raise ValueError(f"no recipe {key!r} in {root}. Error messages and the trial table name them.")
    recipe = Recipe(**spec)
    recipe.check()
    began = time.perf_counter()
    columns = generate(recipe, start, stop)
    seconds = time.perf_counter() - began
    equal: bool | None
    try:
        shape = sample_shape(recipe.parts.model)
        stored = np.concatenate([rows.samples(t, shape) for t in store.read("rows", key, start, stop)])
        equal = bool(np.array_equal(stored, rows.as_stored(columns["x0"], recipe.parts.model.kind)))
    except KeyError:
        equal = None
    data = {"key": key, "start": start, "stop": stop, "seconds": seconds, "equal_to_stored": equal, "recipe": spec}
    told = {True: "equal, bit for bit", False: "DIFFERENT", None: "not in the store"}[equal]
    emit(args, data, f"{stop - start} rows in {seconds:.2f} s; compared with the stored ones: {told}")
    return FAILED if equal is False else COMPLETE


def _summary(cls: type) -> str:
    return (inspect.getdoc(cls) or "").splitlines()[0]


def listing(args: Any) -> int:
    """``solvus list``."""
    from orchestrator import config
    from orchestrator.registries import EVERY
    from tasks.registry import unknown

    kinds = [*EVERY, "study"]
    if args.kind is not None and args.kind.rstrip("s") not in [k.rstrip("s") for k in kinds]:
        raise unknown("kind", args.kind, kinds, "Kinds")
    data: dict[str, dict[str, str]] = {}
    for kind in kinds:
        if args.kind is None or kind.rstrip("s") == args.kind.rstrip("s"):
            if kind == "study":
                data[kind] = {name: _first_comment(path) for name, path in config.studies().items()}
            else:
                data[kind] = {name: _summary(EVERY[kind].get(name)) for name in EVERY[kind].names()}
    lines = []
    for kind, entries in data.items():
        lines += [kind, *(f"  {name:<18} {summary}" for name, summary in entries.items())]
    emit(args, data, "\n".join(lines))
    return COMPLETE


def _first_comment(path: Path) -> str:
    lines = [line for line in path.read_text().splitlines() if line.startswith("#") and "@package" not in line]
    return lines[0].lstrip("# ") if lines else ""


def show(args: Any) -> int:
    """``solvus show NAME`` and ``solvus show schedule FILE``."""
    from orchestrator.registries import EVERY
    from tasks.registry import type_name, unknown

    if args.name == "schedule":
        return _show_schedule(args)
    for what, value in (("a file", args.file), ("--html", args.html)):
        if value is not None:
            raise ValueError(f"{what} ({value!r}) belongs to `solvus show schedule FILE`, got name {args.name!r}.")
    found = {kind: registry.get(args.name) for kind, registry in EVERY.items() if args.name in registry.names()}
    if not found:
        raise unknown("plug-in", args.name, sorted({n for r in EVERY.values() for n in r.names()}))
    data, lines = {}, []
    for kind, cls in found.items():
        defaults = EVERY[kind].defaults(args.name)
        hints = inspect.get_annotations(cls, eval_str=True)
        described = {f.name: {"type": type_name(hints[f.name]), "default": defaults[f.name]} for f in fields(cls)}
        data[kind] = {"name": args.name, "fields": described, "doc": inspect.getdoc(cls)}
        lines += [f"{kind} {args.name}", "", inspect.getdoc(cls) or "", "", "Fields:"]
        lines += [f"  {kind}.{n}: {d['type']} = {json.dumps(d['default'])}" for n, d in described.items()] or ["  none"]
    emit(args, data, "\n".join(lines))
    return COMPLETE


def _show_schedule(args: Any) -> int:
    from orchestrator.config import read_schedule

    if args.file is None:
        raise ValueError("show schedule needs a file: solvus show schedule FILE [--html OUT]")
    found = read_schedule(args.file)
    data = json.loads(found.to_json()) | {"nfe": found.nfe, "stochastic": found.stochastic}
    text = found.read_aloud()
    if args.html is not None:
        try:
            found.figure().write_html(args.html, include_plotlyjs=True)
        except OSError as error:
            raise ValueError(f"--html {args.html!r} cannot be written: {error.strerror}. Give another place.") from None
        data, text = data | {"html": args.html}, f"{text}\n{args.html}"
    emit(args, data, text)
    return COMPLETE


def doctor(args: Any) -> int:
    """``solvus doctor``."""
    from orchestrator.doctor import examine, what_to_do

    findings = examine()
    lines = [
        f"{'ok ' if f['ok'] else 'no '} {f['what']:<22} {f['found']}{'' if f['ok'] else '  -> ' + f['fix']}"
        for f in findings
    ]
    emit(args, findings, "\n".join([*lines, "", *what_to_do(findings)]))
    return USAGE if any(f["needed"] and not f["ok"] for f in findings) else COMPLETE


def completion(args: Any) -> int:
    """``solvus completion SHELL``."""
    from orchestrator import cli
    from orchestrator.completion import INSTALL, SCRIPTS, candidates

    if args.line is not None:
        found = candidates(args.line, cli.verbs_of(cli.parser()), args.shell)
        emit(args, found, "\n".join(found))
        return COMPLETE
    script = f"# To have it in every {args.shell}: {INSTALL[args.shell]}\n{SCRIPTS[args.shell]}"
    if args.shell == "zsh":
        script = f"{SCRIPTS['zsh']}# To have it in every zsh: {INSTALL['zsh']}\n"  # '#compdef' must come first
    emit(args, {"shell": args.shell, "script": script}, script.rstrip())
    return COMPLETE


def init(args: Any) -> int:
    """``solvus init NAME``."""
    import shlex

    from orchestrator import first_study

    path = first_study.write(args.name, args.dir, args.model)
    again = shlex.join([f"study={args.name}", "--config-dir", args.dir])
    text = f"{path}: edit it, then\n  solvus plan {again}\n  solvus run {again}"
    emit(args, {"file": str(path), "plan": f"solvus plan {again}", "run": f"solvus run {again}"}, text)
    return COMPLETE

"""The command line: parse, call, print. Heavy imports stay inside the verbs, so ``--help`` answers at once."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence

from orchestrator.exits import COMPLETE, INTERRUPTED, TERMINATED, USAGE, Terminated

EPILOG = """\
overrides use Hydra's grammar: KEY=VALUE, GROUP=PLUGIN, DOTTED.PATH=VALUE. Keys: study model solver times initial
guidance strategy reward metrics search num_samples batch_size seed executor tracker root nfe prompts schedule and
below.

examples:
  solvus run study=quickstart
  solvus run study=tiny solver=heun times.num_steps=8 num_samples=2048
  solvus plan study=quickstart executor=ray executor.workers=4
  solvus run model=digits metrics=[frechet,class_accuracy] search=grid 'search.space={nfe:[4,8],solver:[ddim,heun]}'

exit status: 0 complete, 1 failed, 2 wrong usage, 3 finished but degraded.
"""


def parser() -> argparse.ArgumentParser:
    """All verbs with their options."""
    top = argparse.ArgumentParser(
        prog="solvus",
        description="Studies of how to sample from diffusion, flow and masked-diffusion models.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="store_true", help="print the version and exit")
    verbs = top.add_subparsers(dest="verb", metavar="VERB")

    def verb(name: str, help: str, overrides: bool = False) -> argparse.ArgumentParser:
        sub = verbs.add_parser(
            name, help=help, description=help, epilog=EPILOG if overrides else None,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        sub.add_argument("--json", action="store_true", help="print one JSON object on standard output")
        if overrides:
            sub.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="what to change")
            sub.add_argument("--config-dir", action="append", default=[], metavar="DIR",
                             help="a folder of your own with study/NAME.yaml files")  # fmt: skip
            sub.add_argument("--cfg", action="store_true", help="print the composed configuration and exit")
        return sub

    init = verb("init", "write a commented study of your own, to edit and to run")
    init.add_argument("name", help="of the study")
    init.add_argument("--dir", default=".", help="write DIR/study/NAME.yaml (default the current folder)")
    init.add_argument("--model", default="digits", help="the plug-in to start from (default digits)")
    run = verb("run", "run a study, or continue it: the same command again is the resume", True)
    run.add_argument("--frozen", metavar="FILE", help="a composed configuration as JSON instead of overrides")
    verb("plan", "dry run: trials, shards, samples, evaluations, time, money, and what the store already has", True)
    submit = verb("submit", "run a study as a job of a Ray cluster", True)
    submit.add_argument(
        "--address", help="the cluster's job address, http://HOST:8265; default $RAY_API_SERVER_ADDRESS"
    )
    submit.add_argument("--no-wait", action="store_true", help="return as soon as the job is accepted")
    submit.add_argument("--attach", action="store_true", help="if the study already runs there, follow it")
    status = verb("status", "where the studies of a root stand", True)
    status.add_argument("--follow", action="store_true", help="look at a running study until it ends: stages, speed, "
                        "best values, spending, time left, last errors")  # fmt: skip
    verb("report", "rebuild a study's report from the store", True)
    figure = verb("figure", "a finished study's figures and tables as files for a paper", True)
    figure.usage = "solvus figure [-h] [--json] [--format KINDS] STUDY --out DIR [KEY=VALUE ...]"
    figure.add_argument("--out", metavar="DIR", required=True, help="a folder; what is there is replaced")
    compare = verb("compare", "two finished studies, paired where they share samples", True)
    compare.usage = "solvus compare [-h] [--json] [--format KINDS] [--out DIR] A B [KEY=VALUE ...]"
    compare.add_argument("--out", metavar="DIR", help="also write the tables and figures here")
    for drawn in (figure, compare):
        drawn.add_argument("--format", default="pdf,svg", metavar="KINDS", help="of pdf, svg, png (default pdf,svg)")
    verify = verb("verify", "read every byte in the store and say what is wrong", True)
    verify.add_argument("--withdraw", action="store_true", help="withdraw what is damaged, so that it is made again")
    gc = verb("gc", "remove orphans from the store: what no commit record names", True)
    gc.add_argument("--dry-run", action="store_true", help="only say what would go")
    gc.add_argument("--older-than-s", type=float, default=3600.0, metavar="SECONDS",
                    help="spare younger files, which a worker may be about to commit (default 3600)")  # fmt: skip
    gc.add_argument(
        "--states", action="store_true", help="also drop all states that trials with equal beginnings share"
    )
    gc.add_argument("--release", action="store_true", help="also take rows out of quarantine, to try them again")
    chaos = verb("chaos", "inject faults into a small study and show that nothing is lost, doubled or changed")
    chaos.add_argument("--faults", type=int, default=220, help="faults without a cluster (default 220)")
    chaos.add_argument("--ray-kills", type=int, default=100, help="kills on a real Ray cluster of several nodes here "
                       "(default 100, which takes about a quarter of an hour; 0 leaves Ray out)")  # fmt: skip
    chaos.add_argument("--seed", type=int, default=0)
    chaos.add_argument("--keep", metavar="DIR", help="work here and keep it, instead of a temporary folder")
    shard = verb("shard", "make one shard again, here, and compare it with the stored one", True)
    shard.usage = "solvus shard [-h] [--json] KEY/START-STOP [KEY=VALUE ...]"
    listing = verb("list", "every registered plug-in, or those of one kind")
    listing.add_argument("kind", nargs="?", help="model, solver, times, guidance, strategy, reward, features, metric, "
                         "search, executor, tracker or study")  # fmt: skip
    show = verb("show", "a plug-in's summary, fields, defaults and reference; or `schedule FILE`, every step in words")
    show.add_argument("name", help="a plug-in, or the word schedule")
    show.add_argument("file", nargs="?", metavar="FILE", help="a solver schedule as JSON")
    show.add_argument("--html", metavar="OUT", help="also draw the schedule, as a page of its own")
    export = verb(
        "export",
        "a recipe, or trial=N (or trial=best) of a finished study, as a diffusers scheduler that is checked",
        True,
    )
    export.add_argument("--out", metavar="DIR", required=True, help="a new folder")
    embedded = (
        "digits, digits_flow, digits_classifier, digits_consistency, digits_dit, digits_tokens, digits_tokens_ar, "
        "digits_one_more_step, digits_dit_probes"
    )
    train = verb("train", f"train an embedded model again: {embedded}")
    train.add_argument("name")
    train.add_argument("--steps", type=int, help="optimiser steps")
    train.add_argument("--batch-size", type=int, help="images of a step")
    train.add_argument("--seed", type=int, default=0)
    train.add_argument("--out", metavar="DIR", help="where to save; the package's own weights when left out")
    likelihood = verb(
        "likelihood", "how likely a model finds its reference data, in nats and in bits per dimension", True
    )
    likelihood.add_argument("--exact", action="store_true", help="the exact trace, D directions instead of random ones")
    likelihood.add_argument("--probes", type=int, help="random directions of Hutchinson's estimator (default 1)")
    likelihood.add_argument("--steps", type=int, default=40, help="integration steps, even (default 40)")
    likelihood.add_argument("--t-min", type=float, metavar="T", help="where the ODE starts (default the process's own)")
    likelihood.add_argument("--bin-width", type=float, metavar="W", help="of the data (default 2/16 for the digits)")
    likelihood.add_argument("--as-is", action="store_true", help="the density at the data as they are, not dequantised")
    ui = verb("ui", "MLflow's pages and optuna-dashboard over a root, on this machine only", True)
    ui.add_argument("--port", type=int, default=5000, help="MLflow's port (default 5000)")
    ui.add_argument("--optuna-port", type=int, default=8080, help="optuna-dashboard's port (default 8080)")
    verb("doctor", "what is installed, which accelerator is seen, what is missing, and what to do next")
    completion = verb("completion", "a script with which a shell completes verbs, plug-ins, fields and studies")
    completion.add_argument("shell", choices=("bash", "zsh", "fish"), help="bash, zsh or fish")
    completion.add_argument("--line", metavar="TEXT", help="print what may follow this command line, for the script")
    return top


def verbs_of(top: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The parser of every verb."""
    (group,) = (action for action in top._actions if isinstance(action, argparse._SubParsersAction))
    return dict(group.choices)


def _refuse_unknown_verb(top: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """Say which verb was meant; argparse would only list them all."""
    from tasks.registry import unknown

    if argv and not argv[0].startswith("-") and argv[0] not in verbs_of(top):
        if "=" in argv[0]:
            top.error(f"a verb comes first: solvus run {shlex.join(argv)}")
        top.error(str(unknown("verb", argv[0], sorted(verbs_of(top)), "Verbs")))


def _unrecognized(stray: Sequence[str], verb: argparse.ArgumentParser) -> str:
    """What does not belong to a verb, with the nearest option; and options that look like settings, or the reverse."""
    from tasks.registry import unknown

    options = [option for action in verb._actions for option in action.option_strings]
    word = stray[0].split("=")[0]
    if word.startswith("-"):
        return str(unknown("option", word, sorted(options), "Options"))
    return f"unrecognized arguments: {' '.join(stray)}"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Expected errors print without a traceback."""
    top = parser()
    _refuse_unknown_verb(top, sys.argv[1:] if argv is None else argv)
    args, rest = top.parse_known_args(argv)
    if args.version:
        from importlib.metadata import version

        print(f"solvus {version('solvus')}")
        return COMPLETE
    if args.verb is None:
        top.print_help()
        return USAGE
    stray = [item for item in rest if item.startswith("-") or "=" not in item]
    if stray:
        top.error(_unrecognized(stray, verbs_of(top)[args.verb]))
    if rest:
        args.overrides = [*getattr(args, "overrides", []), *rest]
    from orchestrator import verbs

    try:
        return verbs.VERBS[args.verb](args)
    except ValueError as error:
        from orchestrator.redact import redact

        text = redact(str(error))
        if args.json:
            print(json.dumps({"error": text}))
        print(f"solvus: {text}", file=sys.stderr)
        return USAGE
    except KeyboardInterrupt as ended:
        command = shlex.join(["solvus", *(sys.argv[1:] if argv is None else argv)])
        print(f"\nsolvus: interrupted. Nothing finished is lost; continue with: {command}", file=sys.stderr)
        return TERMINATED if isinstance(ended, Terminated) else INTERRUPTED
    except BrokenPipeError:
        return COMPLETE


if __name__ == "__main__":
    sys.exit(main())

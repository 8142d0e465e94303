"""The command line: parse, call, say what went wrong. Heavy imports stay inside the verbs, so ``--help`` is quick."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence

from orchestrator.exits import COMPLETE, FAILED, INTERRUPTED, TERMINATED, USAGE, Terminated
from orchestrator.ports import ExecutorLost
from orchestrator.verbs import VERBS

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
    group = top.add_subparsers(dest="verb", metavar="VERB")
    for name, verb in VERBS.items():
        sub = group.add_parser(
            name,
            help=verb.help,
            usage=verb.usage,
            description=verb.help,
            epilog=EPILOG if verb.takes_settings else None,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.add_argument("--json", action="store_true", help="print one JSON object on standard output")
        if verb.takes_settings:
            sub.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="what to change")
            sub.add_argument("--config-dir", action="append", default=[], metavar="DIR",
                             help="a folder of your own with study/NAME.yaml files")  # fmt: skip
        if verb.composes:
            sub.add_argument("--cfg", action="store_true", help="print the composed configuration and exit")
        verb.options(sub)
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
    if "=" in stray[0]:
        return f"this verb takes no settings, got {' '.join(stray)}"
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
    verb = VERBS[args.verb]
    stray = [item for item in rest if item.startswith("-") or "=" not in item or not verb.takes_settings]
    if stray:
        top.error(_unrecognized(stray, verbs_of(top)[args.verb]))
    if rest:
        args.overrides = [*args.overrides, *rest]
    try:
        return verb.call(args)
    except ValueError as error:
        from orchestrator.redact import redact

        text = redact(str(error))
        if args.json:
            print(json.dumps({"error": text}))
        print(f"solvus: {text}", file=sys.stderr)
        return USAGE
    except ExecutorLost as error:
        print(f"solvus: {error}. {_continue(argv)}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt as ended:
        print(f"\nsolvus: interrupted. {_continue(argv)}", file=sys.stderr)
        return TERMINATED if isinstance(ended, Terminated) else INTERRUPTED
    except BrokenPipeError:
        return COMPLETE


def _continue(argv: Sequence[str] | None) -> str:
    command = shlex.join(["solvus", *(sys.argv[1:] if argv is None else argv)])
    return f"Nothing finished is lost; continue with: {command}"


if __name__ == "__main__":
    sys.exit(main())

"""What a verb of the command line is."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


def _none(parser: argparse.ArgumentParser) -> None:
    """No options of its own."""


@dataclass(frozen=True)
class Verb:
    """A verb.

    Attributes:
        help: what it does, in a line.
        call: takes the parsed arguments and returns the exit status.
        options: adds its arguments to its parser.
        takes_settings: whether it takes KEY=VALUE.
        composes: whether it works on the configuration that they make, which ``--cfg`` prints instead.
        usage: its usage line, where argparse's own would mislead.
    """

    help: str
    call: Callable[[Any], int]
    options: Callable[[argparse.ArgumentParser], None] = _none
    takes_settings: bool = False
    composes: bool = False
    usage: str | None = None

"""Completion of the command line by a shell: verbs, options, plug-ins, their fields, studies.

``solvus completion SHELL`` prints a script; that script asks ``solvus completion SHELL --line TEXT`` at every press of
the key. An answer may take no second, so plug-ins are read from their source files instead of being imported, which
would bring torch along.
"""

from __future__ import annotations

import argparse
import ast
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from orchestrator.keys import FILES, GROUPS, VALUES, files_of
from orchestrator.registries import EVERY

# What the shell is given as it is: bash breaks words at '=' and ':' and wants what follows, the others whole words.
SCRIPTS = {
    "bash": """\
_solvus() {
    local IFS=$'\\n'
    COMPREPLY=($(solvus completion bash --line "${COMP_LINE:0:COMP_POINT}" 2>/dev/null))
    if [[ ${#COMPREPLY[@]} -eq 1 && ${COMPREPLY[0]} == *[=.] ]]; then compopt -o nospace; fi
}
complete -o default -F _solvus solvus
""",
    "zsh": """\
#compdef solvus
_solvus() {
    local -a found
    found=("${(@f)$(solvus completion zsh --line "${(j: :)words[1,CURRENT]}" 2>/dev/null)}")
    compadd -Q -S ' ' -- ${found:#*[=.]}
    compadd -Q -S '' -- ${(M)found:#*[=.]}
}
compdef _solvus solvus
""",
    "fish": """\
complete -c solvus -f -a '(solvus completion fish --line (commandline -cp | string collect) 2>/dev/null)'
""",
}
INSTALL = {
    "bash": "echo 'eval \"$(solvus completion bash)\"' >> ~/.bashrc",
    "zsh": "echo 'eval \"$(solvus completion zsh)\"' >> ~/.zshrc   # after compinit",
    "fish": "solvus completion fish > ~/.config/fish/completions/solvus.fish",
}


def candidates(line: str, verbs: Mapping[str, argparse.ArgumentParser], shell: str = "zsh") -> list[str]:
    """What may stand where the cursor is.

    Args:
        line: the command line up to the cursor, with its first word.
        verbs: the parser of every verb.
        shell: bash gets only what follows the last ``=`` or ``:`` of a word.
    """
    try:
        words = shlex.split(line)
    except ValueError:  # a quote is still open
        words = line.replace("'", " ").replace('"', " ").split()
    here = "" if not line or line[-1].isspace() else words.pop()
    before = words[1:]
    found = sorted({word for word in _possible(before, here, verbs) if word.startswith(here)})
    if shell == "bash":
        cut = max(here.rfind("="), here.rfind(":")) + 1
        found = [word[cut:] for word in found]
    return found


def _possible(before: Sequence[str], here: str, verbs: Mapping[str, argparse.ArgumentParser]) -> Iterator[str]:
    if not before:
        yield from ("--help", "--version") if here.startswith("-") else verbs
        return
    verb = before[0]
    if verb not in verbs:
        return
    options = [option for action in verbs[verb]._actions for option in action.option_strings]
    if here.startswith("-"):
        yield from options
    elif verb == "list":
        yield from (*EVERY, "study")
    elif verb == "show":
        yield "schedule"
        for kind in EVERY:
            yield from plugins(kind)
    elif verb == "completion":
        yield from SCRIPTS
    elif "--config-dir" in options:
        if verb in ("figure", "compare") and "=" not in here:
            yield from _finished(before)
        yield from _overrides(before, here)


def _overrides(before: Sequence[str], here: str) -> Iterator[str]:
    dirs = [word for option, word in zip(before, before[1:], strict=False) if option == "--config-dir"]
    chosen = dict(word.split("=", 1) for word in before if "=" in word)
    head, is_value, _ = here.partition("=")
    if is_value:
        if head in GROUPS:
            yield from (f"{head}={name}" for name in plugins(head))
        elif head in FILES:
            yield from (f"{head}={name}" for name in files_of(head, dirs))
        elif head == "name":
            yield from (f"name={name}" for name in _finished(before))
    elif "." in head:
        group = head.split(".")[0]
        known = plugins(group) if group in GROUPS else {}
        names = [chosen[group]] if chosen.get(group) in known else list(known)
        yield from (f"{group}.{field}=" for name in names for field in known[name])
    else:
        yield from (f"{key}=" for key in (*GROUPS, *FILES, *VALUES))
        yield from (f"{group}." for group in GROUPS if here.startswith(group))


def _finished(before: Sequence[str]) -> list[str]:
    """Studies of the root, where that is a folder here."""
    roots = [word.removeprefix("root=") for word in before if word.startswith("root=")]
    folder = Path(roots[-1] if roots else os.environ.get("SOLVUS_ROOT", "runs")).expanduser() / "studies"
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def plugins(kind: str) -> dict[str, list[str]]:
    """The plug-ins of a kind and their fields, from their source files."""
    found: dict[str, list[str]] = {}
    for package in EVERY[kind].packages:
        spec = find_spec(package)
        folders = list(spec.submodule_search_locations or []) if spec else []
        files = [path for folder in folders for path in Path(folder).glob("*.py")]
        for path in files or ([Path(spec.origin)] if spec and spec.origin else []):
            found |= _registered(ast.parse(path.read_text(encoding="utf-8")))
    return dict(sorted(found.items()))


def _registered(module: ast.Module) -> dict[str, list[str]]:
    """Classes under ``@….register(NAME)`` with their fields."""
    found = {}
    for node in module.body:
        for decorator in node.decorator_list if isinstance(node, ast.ClassDef) else []:
            if isinstance(decorator, ast.Call) and getattr(decorator.func, "attr", "") == "register":
                name = decorator.args[0]
                if isinstance(name, ast.Constant) and isinstance(node, ast.ClassDef):
                    found[str(name.value)] = list(dict.fromkeys(_fields(node, module)))
    return found


def _fields(node: ast.ClassDef, module: ast.Module) -> list[str]:
    """Annotated names of a class, those of its bases first, as a dataclass has them."""
    inherited = [field for base in node.bases for field in _of_base(getattr(base, "id", ""), module)]
    own = [
        item.target.id for item in node.body
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
        and "ClassVar" not in ast.unparse(item.annotation)
    ]  # fmt: skip
    return [*inherited, *own]


def _of_base(name: str, module: ast.Module) -> list[str]:
    """Fields of a class that a module defines or imports by name."""
    for node in module.body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            is_dataclass = any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list)
            return _fields(node, module) if is_dataclass else []
        if isinstance(node, ast.ImportFrom) and any(alias.name == name for alias in node.names):
            spec = find_spec(node.module or "")
            if spec is not None and spec.origin is not None:
                return _of_base(name, ast.parse(Path(spec.origin).read_text(encoding="utf-8")))
    return []

"""name -> class, and spec <-> object. A spec is ``{"name": ..., **fields}``; building and describing are inverse."""

from __future__ import annotations

import difflib
import importlib
import math
import pkgutil
import threading
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import lru_cache
from typing import Any

Spec = dict[str, Any]


LISTED = 480  # characters of names that an error lists


def unknown(kind: str, name: object, known: list[str], label: str = "Registered") -> ValueError:
    """The error for a name that does not exist: the nearest one that does, and all of them or the nearest dozen."""
    near = difflib.get_close_matches(str(name), known, n=12, cutoff=0.0)
    is_near = near and difflib.SequenceMatcher(None, near[0], str(name)).ratio() >= 0.5
    hint = f", did you mean {near[0]!r}?" if is_near else "."
    listed = ", ".join(known) or "none"
    if len(listed) > LISTED:
        listed = f"{', '.join(near)} and {len(known) - len(near)} more"
    return ValueError(f"unknown {kind} {name!r}{hint} {label}: {listed}")


class Registry:
    """The plug-ins of one kind, found by importing every module of a package.

    Args:
        kind: the word for one of them in messages, e.g. "solver".
        packages: dotted names of packages that hold one module per plug-in, or of single modules.
    """

    def __init__(self, kind: str, *packages: str) -> None:
        self.kind, self.packages = kind, packages
        self._classes: dict[str, type] = {}
        self._loaded = False
        self._lock = threading.RLock()  # two tasks of one worker may ask first at the same time

    def register(self, name: str) -> Callable[[type], type]:
        """Class decorator: make a frozen dataclass known under ``name``."""

        def add(cls: type) -> type:
            if name in self._classes and self._classes[name].__qualname__ != cls.__qualname__:
                raise ValueError(f"{self.kind} {name!r} is registered twice: {self._classes[name]} and {cls}")
            cls.name = name  # type: ignore[attr-defined]
            self._classes[name] = cls
            return cls

        return add

    def _load(self) -> None:
        with self._lock:
            if self._loaded:
                return
            self._loaded = True  # modules that are being imported may ask too
            for name in self.packages:
                package = importlib.import_module(name)
                for module in pkgutil.iter_modules(getattr(package, "__path__", [])):
                    importlib.import_module(f"{name}.{module.name}")

    def names(self) -> list[str]:
        """All registered names, sorted."""
        self._load()
        return sorted(self._classes)

    def get(self, name: str) -> type:
        """The class of a name; the error offers the nearest one."""
        self._load()
        if name not in self._classes:
            raise unknown(self.kind, name, self.names())
        return self._classes[name]

    def defaults(self, name: str) -> Spec:
        """The spec of a plug-in with nothing overridden; fields without a default are None."""
        return {"name": name} | {f.name: to_data(_default(f)) for f in fields(self.get(name))}

    def complete(self, spec: Spec | str) -> Spec:
        """Fill a partial spec (or a bare name) with defaults and check every field."""
        return self.describe(self.build(spec))

    def build(self, spec: Spec | str) -> Any:
        """Make the object that a spec describes.

        Raises:
            ValueError: unknown name or field, wrong type, or a value that the plug-in refuses.
        """
        if not isinstance(spec, str | Mapping) or (isinstance(spec, Mapping) and "name" not in spec):
            raise ValueError(f"a {self.kind} needs a name, got {spec!r}. Registered: {', '.join(self.names())}")
        spec = {"name": spec} if isinstance(spec, str) else dict(spec)
        name = spec.pop("name")
        if not isinstance(name, str):
            raise unknown(self.kind, name, self.names())
        cls = self.get(name)
        hints = _hints(cls)
        known = [f.name for f in fields(cls)]
        for key in spec:
            if key not in known:
                raise unknown(f"field of {self.kind} {name!r}:", key, known, "Fields")
        for f in fields(cls):
            is_needed = _default(f) is None and not _optional(hints[f.name])
            if is_needed and spec.get(f.name) in (None, ""):  # a command line without it, or with nothing after the "="
                raise ValueError(
                    f"{self.kind} {name!r} needs {self.kind}.{f.name} (a {type_name(hints[f.name])}). Set "
                    f"{self.kind}.{f.name}=VALUE; `solvus show {name}` says what it may be."
                )
        values = {key: coerce(value, hints[key], f"{self.kind}.{key}") for key, value in spec.items()}
        return cls(**values)

    def describe(self, plugin: Any) -> Spec:
        """The spec of an object: the same dict that :meth:`build` takes, as plain JSON data."""
        return {"name": plugin.name} | {f.name: to_data(getattr(plugin, f.name)) for f in fields(plugin)}


@lru_cache(maxsize=512)
def _hints(cls: type) -> dict[str, Any]:
    """Types of a class's fields: evaluating the annotations is most of what building a plug-in costs."""
    return typing.get_type_hints(cls)


def _default(f: Any) -> Any:
    if f.default is not MISSING:
        return f.default
    return f.default_factory() if f.default_factory is not MISSING else None


def _optional(hint: Any) -> bool:
    return type(None) in typing.get_args(hint)


def to_data(value: Any) -> Any:
    """Plain JSON data: tuples become lists, dataclasses dicts."""
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_data(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(k): to_data(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [to_data(v) for v in value]
    return value


def type_name(hint: Any) -> str:
    """A type as a person would write it."""
    if hint is type(None):
        return "null"
    args = typing.get_args(hint)
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return " or ".join(type_name(a) for a in args)
    if typing.get_origin(hint) is tuple:
        return f"list of {type_name(args[0])}"
    return getattr(hint, "__name__", str(hint))


def coerce(value: Any, hint: Any, path: str) -> Any:
    """Check ``value`` against a field's type; lists become tuples, ints become floats where a float is due.

    Raises:
        ValueError: names the path, the value and the type that is allowed.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if isinstance(hint, types.UnionType) or origin is typing.Union:
        for option in args:
            try:
                return coerce(value, option, path)
            except ValueError:
                continue
    elif origin is tuple and isinstance(value, list | tuple):
        inner = args[0]
        return tuple(coerce(v, inner, f"{path}.{i}") for i, v in enumerate(value))
    elif (origin is dict or hint is dict) and isinstance(value, Mapping):
        return to_data(value)
    elif hint in (int, float) and isinstance(value, int | float) and not isinstance(value, bool):
        if math.isfinite(value) and (hint is float or int(value) == value):
            return hint(value)
    elif isinstance(hint, type) and isinstance(value, hint) and not (hint is not bool and isinstance(value, bool)):
        return value
    finite = "finite " if hint is float and isinstance(value, float) else ""
    raise ValueError(f"{path} must be a {finite}{type_name(hint)}, got {value!r} ({type(value).__name__}).")


models = Registry("model", "tasks.models")
solvers = Registry("solver", "tasks.solvers")
hooks = Registry("hook", "tasks.hooks")
filters = Registry("filter", "tasks.filters")
times = Registry("times", "tasks.times")
initials = Registry("initial", "tasks.initial")
guidance = Registry("guidance", "tasks.guidance")
strategies = Registry("strategy", "tasks.strategies")
rewards = Registry("reward", "tasks.rewards")
features = Registry("features", "tasks.features")
metrics = Registry("metric", "tasks.metrics")

ALL: dict[str, Registry] = {
    "model": models,
    "solver": solvers,
    "hook": hooks,
    "filter": filters,
    "times": times,
    "initial": initials,
    "guidance": guidance,
    "strategy": strategies,
    "reward": rewards,
    "features": features,
    "metric": metrics,
}


def model_identity(spec: Spec) -> Spec:
    """What of a model's spec enters a key: where its files lie does not, nor what changes no row (``unkeyed``)."""
    without = getattr(models.get(spec["name"]), "unkeyed", ("path",))
    return {key: value for key, value in spec.items() if key not in without}


def identity(spec: Spec) -> Spec:
    """What of a spec enters a key: fields that are null say nothing, so a field that is added later changes no key."""
    return {key: value for key, value in spec.items() if value is not None}


def scorer(spec: Spec) -> Any:
    """Build a reward or a feature extractor: both are scorers, and their names do not overlap."""
    return (rewards if spec["name"] in rewards.names() else features).build(spec)


def column(spec: Spec | str) -> str:
    """The name under which rows hold a scorer's column, of its name or its spec."""
    return spec if isinstance(spec, str) else str(spec["name"])

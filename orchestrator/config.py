"""Configuration: Hydra composes it once from the registries, ``configs/`` and the command line; then it is frozen."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from orchestrator.files import is_remote
from orchestrator.keys import FILES, GROUPS, VALUES, check_study_name, files_of
from orchestrator.measure import completed
from orchestrator.redact import redact_all
from orchestrator.registries import EVERY
from orchestrator.study import Study
from tasks.overrides import PLAIN, PLUGINS
from tasks.recipe import Recipe
from tasks.registry import unknown
from tasks.schedule import SolverSchedule


def compose(overrides: Sequence[str], config_dirs: Sequence[str] = ()) -> dict[str, Any]:
    """The composed configuration as plain data.

    Args:
        overrides: Hydra overrides, ``study=quickstart solver.eta=0.5``.
        config_dirs: further folders with ``study/NAME.yaml`` files.

    Raises:
        ValueError: an unknown group, plug-in, field or study (the nearest is offered), or a value that does not parse.
    """
    import hydra
    from hydra.core.config_store import ConfigStore
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    logging.getLogger("hydra").setLevel(logging.ERROR)
    store = ConfigStore.instance()
    for group in GROUPS:
        for name in EVERY[group].names():
            store.store(group=group, name=name, node=EVERY[group].defaults(name))
    overrides = [each for override in overrides for each in _apart(_quote_url(override))]
    dirs = [str(Path(d).absolute()) for d in config_dirs]
    for folder in dirs:
        if not Path(folder).is_dir():
            raise ValueError(f"--config-dir {folder!r} is not a folder. Give one with study/NAME.yaml files.")
    chosen = _check_names(overrides, dirs)
    extra = [f"hydra.searchpath=[{','.join('file://' + d for d in dirs)}]"] if dirs else []
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_module(version_base="1.3", config_module="configs"):
            config = hydra.compose(
                config_name="config", overrides=[*chain.from_iterable(map(_open, overrides)), *extra]
            )
        data = OmegaConf.to_container(config, resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(_explain(error, chosen)) from None
    except YAMLError as error:
        raise ValueError(f"a study's file is no YAML: {' '.join(str(error).split())}. Mend that line.") from None
    assert isinstance(data, dict)
    found_data = {str(key): value for key, value in data.items() if key in (*GROUPS, *VALUES)}
    for group, name in chosen.items():
        # A study's own fields stay where the plug-in chosen instead has them too, and go where it has not.
        known = EVERY[group].defaults(name)
        found_data[group] = {key: value for key, value in found_data[group].items() if key in known}
    if isinstance(found_data.get("schedule"), str):
        found_data["schedule"] = json.loads(
            read_schedule(found_data["schedule"]).to_json()
        )  # it travels with the study
    return found_data


def read_schedule(path: str) -> SolverSchedule:
    """The schedule in a JSON file.

    Raises:
        ValueError: no such file, or no schedule that can run.
    """
    try:
        text = Path(path).expanduser().read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the schedule {path!r}: {error}. Give a JSON file.") from None
    try:
        return SolverSchedule.from_json(text)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _quote_url(override: str) -> str:
    """A URL may hold characters that mean something in Hydra's grammar; nobody should have to know."""
    key, _, value = override.partition("=")
    bare = "://" in value and value[:1] not in ("'", '"', "[", "{") and "'" not in value
    return f"{key}='{value}'" if bare else override


def _apart(override: str) -> list[str]:
    """A plug-in together with its fields, ``times={name: explicit, values: [0.8, 0]}``, as one override each."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import Transformer
    from hydra.errors import HydraException

    group, _, value = override.partition("=")
    if group not in GROUPS or not value.strip().startswith("{"):
        return [override]
    try:
        (parsed,) = OverridesParser.create().parse_overrides([override])
    except HydraException:  # it is refused with the names
        return [override]
    spec: Any = parsed._value  # as it was written: quotes stay
    if not isinstance(spec, dict) or "name" not in spec:
        raise ValueError(
            f"{override} names no {group}. Write {group}={{name: NAME, FIELD: VALUE}}: solvus list {group}"
        )
    fields = [f"{group}.{key}={Transformer.str(said)}" for key, said in spec.items() if key != "name"]
    return [f"{group}={Transformer.str(spec['name'])}", *fields]


def _open(override: str) -> list[str]:
    """Let fields that are mappings, such as a search space, be replaced whole and take new keys."""
    path, _, value = override.partition("=")
    if path in (*GROUPS, *FILES) and value.strip() in ("null", ""):
        if path in ("reward", *FILES):
            return [f"~{path}"]
        raise ValueError(f"{path} cannot be {value.strip() or 'empty'}. Choose a plug-in: solvus list {path}")
    group, _, rest = path.partition(".")
    field = rest.split(".")[0]
    if group in GROUPS and field:
        for name in EVERY[group].names():
            if isinstance(EVERY[group].defaults(name).get(field), dict):
                return [f"~{path}", f"+{override}"] if path == f"{group}.{field}" else [f"++{override}"]
    return [override]


def freeze(data: dict[str, Any]) -> dict[str, Any]:
    """A configuration fit to travel to a cluster: absolute places, no secrets.

    Raises:
        ValueError: a relative root, which a cluster would throw away, or a password that would travel along.
    """
    root = str(data["root"])
    if not is_remote(root) and not Path(root).is_absolute():
        raise ValueError(
            f"root {root!r} is relative: on a cluster it lies in a folder that is thrown away. Set root to an absolute "
            "path on shared storage or an s3:// URL (or $SOLVUS_ROOT)."
        )
    frozen = data | {"root": root}
    if frozen["storage"] is not None and frozen["storage"] == os.environ.get("SOLVUS_STORAGE"):
        frozen["storage"] = None  # the cluster's own environment has it
    if redact_all(frozen) != frozen:
        raise ValueError(
            "the configuration carries a password. Leave it out, and set SOLVUS_STORAGE and MLFLOW_TRACKING_URI in the "
            "cluster's environment instead."
        )
    return frozen


def load(path: str) -> Study:
    """The study of a frozen configuration file."""
    try:
        data = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read the frozen study {path!r}: {error}.") from None
    if not isinstance(data, dict) or not set(data) <= {*GROUPS, *VALUES} or "name" not in data:
        raise ValueError(
            f"{path!r} is no frozen study. `solvus submit` and `solvus run --cfg --json` write such files."
        )
    if data.get("storage") is None:
        data["storage"] = os.environ.get("SOLVUS_STORAGE")
    return study(data)


def root_of(data: dict[str, Any]) -> str:
    """Where everything is written: an absolute folder, or a URL."""
    root = str(data["root"] or "")
    if not root:
        raise ValueError("root must be a folder or an s3:// URL, got nothing. Set root=DIR.")
    return root.rstrip("/") if is_remote(root) else str(Path(root).expanduser().absolute())


def studies(dirs: Sequence[str] = ()) -> dict[str, Path]:
    """All studies that can be named, with their files."""
    return files_of("study", dirs)


def _check_names(overrides: Sequence[str], dirs: Sequence[str]) -> dict[str, str]:
    """Refuse unknown groups, plug-ins and studies with the nearest name; return which plug-in was chosen where."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
    except HydraException as error:
        text = str(error).splitlines()[0]
        raise ValueError(f"cannot read the command line: {text}. Write KEY=VALUE, for example solver=heun.") from None
    chosen: dict[str, str] = {}
    for override in parsed:
        path, value = override.key_or_group, override.value()
        head = path.split(".")[0].split("/")[0].split("@")[0]
        if head == "hydra":
            continue
        if head not in (*GROUPS, *VALUES, *FILES):
            raise unknown("key", path, [*GROUPS, *VALUES, *FILES], "Allowed")
        if path in FILES and value is not None and str(value) not in files_of(path, dirs):
            raise unknown(path, value, sorted(files_of(path, dirs)), "Known")
        if path in GROUPS and value is not None:
            EVERY[path].get(str(value))
            chosen[path] = str(value)
        elif head in GROUPS and head in chosen and "." in path and not override.is_add():
            known = list(EVERY[head].defaults(chosen[head]))
            field = path.split(".")[1]
            if field not in known:
                raise unknown(f"field of {head} {chosen[head]!r}:", field, known[1:], "Fields")
    return chosen


def _explain(error: Exception, chosen: dict[str, str]) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[:2])
    where = re.search(r"Could not override '([\w.]+)'", str(error))
    if where:
        group, _, field = where.group(1).partition(".")
        names = [chosen[group]] if group in chosen else EVERY[group].names() if group in EVERY else []
        known = sorted({name for plugin in names for name in EVERY[group].defaults(plugin)} - {"name"})
        if owners := [plugin for plugin in names if field in EVERY[group].defaults(plugin)]:
            return (
                f"the study's {group} has no field {field!r}; it is one of {group}={', '.join(owners)}. Set "
                f"{group}=NAME first, or where a part of it is meant name that: {group}.parts.0.{field}=VALUE."
            )
        return str(unknown(f"field of {group}:", field, known, "Fields"))
    return f"the configuration cannot be composed: {text}"


def study(data: dict[str, Any]) -> Study:
    """The frozen study that a composed configuration describes.

    Raises:
        ValueError: a value of the wrong type or an impossible combination.
    """
    for name in ("num_samples", "batch_size", "shard_size", "seed", "first_index"):
        value = data[name]
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"{name} must be a whole number, got {value!r}.")
    for name in ("num_samples", "batch_size", "shard_size"):
        if data[name] < 1:
            raise ValueError(f"{name} must be at least 1, got {data[name]}.")
    name = str(data["name"])
    check_study_name(name)
    fields: dict[str, Any] = {key: data.get(key) for key in (*PLUGINS, *PLAIN)}
    recipe = Recipe(**fields).completed()
    if data.get("prompts") is not None:
        if (own := recipe.model.get("prompts")) not in (None, data["prompts"]):
            raise ValueError(f"prompts={data['prompts']} and model.prompts={own} name two files. Leave one out.")
        recipe = recipe.override({"prompts": data["prompts"]})
    if data.get("schedule") is not None:
        recipe = recipe.override({"schedule": data["schedule"]})
    if data["nfe"] is not None:
        recipe = recipe.override({"nfe": data["nfe"]})
    price = data["price_per_device_hour"]
    if isinstance(price, bool) or not isinstance(price, int | float) or not 0 <= price < float("inf"):
        raise ValueError(f"price_per_device_hour must be a number of at least 0, got {price!r}.")
    reuse = data.get("reuse_gib", 0.0)
    if isinstance(reuse, bool) or not isinstance(reuse, int | float) or not 0 <= reuse < float("inf"):
        raise ValueError(f"reuse_gib must be a number of at least 0, got {reuse!r}.")
    if reuse and is_remote(root_of(data)):
        raise ValueError(f"reuse_gib={reuse} needs a root that is a folder, got {data['root']}. Set reuse_gib=0.")
    group_by = data.get("group_by")
    if isinstance(group_by, bool) or not (group_by is None or isinstance(group_by, str | int)) or group_by == "":
        raise ValueError(
            f"group_by must be null, label, a column of the rows or a number of prompts, got {group_by!r}."
        )
    if isinstance(group_by, int) and group_by < 2:
        raise ValueError(f"group_by must be at least 2 where it is a number of prompts, got {group_by}.")
    for group in ("executor", "tracker"):
        EVERY[group].build(data[group])
    metrics = data["metrics"] or []
    if not isinstance(metrics, list):
        raise ValueError(f"metrics must be a list, for example [frechet, kid], got {metrics!r}.")
    return Study(
        name=name,
        recipe=recipe,
        metrics=completed(metrics),
        search=EVERY["search"].complete(data["search"]),
        num_samples=data["num_samples"],
        first_index=data["first_index"],
        shard_size=data["shard_size"],
        root=root_of(data),
        question=str(data["question"]),
        price_per_device_hour=float(price),
        storage=data["storage"],
        reuse_gib=float(reuse),
        group_by=group_by,
        config=data,
    )

"""What a study leaves for people in ``studies/NAME/``: the frozen study, the trial table, its state, its report."""

from __future__ import annotations

import difflib
import io
import json
import os
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from orchestrator.files import is_remote, join, open_files
from orchestrator.keys import check_study_name, is_study_name
from orchestrator.redact import redact, redact_all
from orchestrator.study import Study
from orchestrator.trial import Trial


class Results:
    """The folder of one study.

    Raises:
        ValueError: a name that is no folder's, such as one that leads out of the root.
    """

    def __init__(self, root: str, name: str) -> None:
        check_study_name(name)
        self.name, self._root, self._place = name, root, join(root, "studies", name)
        self.files = open_files(self._place)

    @property
    def folder(self) -> Path | str:
        """Where it lies: a path, or a URL."""
        return self._place if is_remote(self._place) else Path(self._place)

    def save_study(self, study: Study) -> None:
        """The composed configuration, as it was run."""
        self.files.write("study.json", json.dumps(redact_all(study.config), indent=1).encode())

    def save_trials(self, trials: Sequence[Trial]) -> None:
        """The trial table as Parquet: one row a trial, values as ``value/NAME`` and ``se/NAME``."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        names = sorted({name for trial in trials for name in trial.values})
        costs = sorted({name for trial in trials for name in trial.cost})
        rows = []
        for trial in trials:
            row: dict[str, Any] = {
                "number": trial.number,
                "part": trial.part,
                "state": trial.state,
                "reason": redact(trial.reason),
                "quarantined": json.dumps(trial.quarantined),
                "title": trial.title,
                "overrides": json.dumps(dict(trial.proposal.overrides)),
                "recipe": json.dumps(trial.described()),
                "times": json.dumps(list(trial.recipe.grid[0]) if trial.times is None else trial.times),
                "key": trial.recipe.key,
                "first_index": trial.first_index,
                "num_samples": trial.num_samples,
                "nfe": trial.nfe,
                "commit": trial.commit,
                "baseline": trial.proposal.baseline,
                "stopped": trial.stopped,
                "estimate": trial.estimate,
                "looks": json.dumps([asdict(look) for look in trial.looks]),
            }
            row |= {f"value/{name}": trial.values.get(name) for name in names}
            row |= {f"se/{name}": trial.errors.get(name) for name in names}
            row |= {f"cost/{name}": trial.cost.get(name) for name in costs}
            row |= {"seconds": trial.seconds, "exact": trial.recipe.account.exact}
            rows.append(row)
        sink = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows) if rows else pa.table({"number": pa.array([], pa.int64())}), sink)
        self.files.write("trials.parquet", sink.getvalue())

    def save_search(self, summary: Sequence[Mapping[str, Any]]) -> None:
        """What every search inside says of itself."""
        self.files.write("search.json", json.dumps(list(summary)).encode())

    def search(self) -> list[dict[str, Any]]:
        """The same again; empty where nothing was said."""
        try:
            return json.loads(self.files.read("search.json"))
        except (FileNotFoundError, ValueError):
            return []

    def save_state(self, state: str, summary: Mapping[str, Any]) -> None:
        """Where the study stands, for ``solvus status``."""
        data = {"state": state, "updated": time.time(), "pid": os.getpid(), "host": socket.gethostname()}
        self.files.write("state.json", json.dumps(data | {"summary": dict(summary)}).encode())

    def trials(self) -> list[dict[str, Any]]:
        """The rows of the trial table; empty when there is none."""
        import pyarrow.parquet as pq

        try:
            data = self.files.read("trials.parquet")
            return pq.ParquetFile(io.BytesIO(data)).read(use_threads=False).to_pylist()  # as the store reads
        except FileNotFoundError:
            return []

    def best(self) -> dict[str, Any]:
        """The winner of the study's last search: the best trial that went all the way, by its first objective.

        Raises:
            ValueError: the study has no search that finished a trial.
        """
        from orchestrator.measure import completed
        from tasks import registry

        better: dict[str, str] = {}
        for spec in completed(self.study().get("metrics") or []):
            better |= registry.metrics.build(spec).better
        for entry in reversed(self.search()):
            column = f"value/{entry['objectives'][0]}"
            rows = [
                row for row in self.trials()
                if row["part"] == entry["part"] and row["state"] in ("complete", "degraded")
                and not row.get("stopped") and row.get(column) is not None
            ]  # fmt: skip
            if rows:
                sign = 1 if better[entry["objectives"][0]] == "lower" else -1
                return min(rows, key=lambda row: (sign * row[column], row["number"]))
        raise ValueError(
            f"study {self.name} has no search with a finished trial, so it has no best one. Give a number."
        )

    def study(self) -> dict[str, Any]:
        """The frozen configuration.

        Raises:
            ValueError: there is no such study here.
        """
        try:
            return json.loads(self.files.read("study.json"))
        except FileNotFoundError:
            near = difflib.get_close_matches(self.name, known(self._root), n=1, cutoff=0.5)
            hint = f", did you mean {near[0]!r}?" if near else "."
            raise ValueError(
                f"no study in {self.folder}{hint} Run it first: solvus run study={self.name}, or set root=DIR."
            ) from None

    def state(self) -> dict[str, Any]:
        """The last state; "running" only while its process lives or wrote within two minutes."""
        try:
            data = json.loads(self.files.read("state.json"))
        except (FileNotFoundError, ValueError):
            return {"state": "unknown", "summary": {}}
        if data["state"] == "running":
            here = data["host"] == socket.gethostname()
            alive = is_alive(data["pid"]) if here else time.time() - data["updated"] < 120
            data["state"] = "running" if alive else "interrupted"
        return data


def is_alive(pid: int) -> bool:
    """Whether a process of this machine exists."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def known(root: str) -> list[str]:
    """Names of the studies below a root."""
    return [name for name in open_files(root).folders("studies") if is_study_name(name)]

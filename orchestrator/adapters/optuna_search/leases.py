"""Who works on which trial, across launches."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
import uuid
import weakref
from typing import Any

from orchestrator.adapters.optuna_search.storage import patiently
from orchestrator.results import is_alive

log = logging.getLogger("solvus")


class Leases:
    """Who works on which trial: a mark with an owner and an end, renewed by a thread while its owner lives."""

    ATTRIBUTE = "solvus.lease"
    GRACE_S = 15.0  # between asking for a trial and marking it

    def __init__(self, study: Any, lease_s: float = 120.0) -> None:
        self._study, self._lease_s = study, lease_s
        self._owner = {"host": socket.gethostname(), "pid": os.getpid(), "launch": uuid.uuid4().hex}
        self._held: dict[int, int] = {}
        self._lock = threading.Lock()
        done = threading.Event()
        weakref.finalize(self, done.set)  # the thread ends with the search that it serves
        arguments = (weakref.ref(self), done, lease_s / 4)
        threading.Thread(target=_keep_renewing, args=arguments, name="leases", daemon=True).start()

    def is_free(self, trial: Any) -> bool:
        """Whether nobody alive holds this RUNNING trial."""
        with self._lock:
            if trial.number in self._held:
                return False
        lease = trial.user_attrs.get(self.ATTRIBUTE)
        if lease is None:  # its launch marks it next, unless it died in between
            return time.time() - trial.datetime_start.timestamp() > self.GRACE_S
        if lease["until"] < time.time():
            return True
        if lease["host"] == self._owner["host"] and lease["launch"] != self._owner["launch"]:
            return not is_alive(lease["pid"]) or lease["pid"] == self._owner["pid"]
        return False

    def take(self, trial: Any) -> None:
        """Hold a trial from now on."""
        with self._lock:
            self._held[trial.number] = trial._trial_id
        self._mark(trial._trial_id)

    def drop(self, number: int) -> int | None:
        """Let go of a trial; its id in the storage, if it was held."""
        with self._lock:
            return self._held.pop(number, None)

    def _mark(self, trial_id: int) -> None:
        lease = self._owner | {"until": time.time() + self._lease_s}
        patiently(lambda: self._study._storage.set_trial_user_attr(trial_id, self.ATTRIBUTE, lease))

    def renew(self) -> None:
        """Mark all held trials anew."""
        with self._lock:
            held = list(self._held.values())
        for trial_id in held:
            try:
                self._mark(trial_id)
            except Exception as error:  # a finished trial takes no marks, a dead storage is somebody else's news
                log.debug("lease of trial %s not renewed: %s", trial_id, error)


def _keep_renewing(leases: weakref.ref[Leases], done: threading.Event, every_s: float) -> None:
    while not done.wait(every_s):
        held = leases()
        if held is not None:
            held.renew()
        del held

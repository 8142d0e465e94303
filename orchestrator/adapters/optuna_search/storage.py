"""Optuna's storage: opened for speed and safety, and waited for while it is away."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

log = logging.getLogger("solvus")


def open_storage(url: str) -> Any:
    """The storage behind a URL: SQLite, PostgreSQL, or ``journal:///FILE`` for a file on one machine.

    SQLite writes ahead and leaves the syncing of every transaction to the system: a program that dies loses nothing, a
    machine that does may lose the last trials, whose rows are in the store.

    Raises:
        ValueError: a journal without a file.
    """
    import optuna

    if url.startswith("journal:"):
        path = url.removeprefix("journal://")
        if not path or path == url:
            raise ValueError(f"storage {url!r} names no file. Write journal:///absolute/path.log.")
        from optuna.storages.journal import JournalFileBackend

        return optuna.storages.JournalStorage(JournalFileBackend(path))
    if not url.startswith("sqlite:"):
        return optuna.storages.get_storage(url)
    from sqlalchemy import event

    storage = optuna.storages.RDBStorage(url, engine_kwargs={"connect_args": {"timeout": 30}})

    @event.listens_for(storage.engine, "connect")
    def _fast(connection: Any, record: Any) -> None:
        cursor = connection.cursor()
        cursor.execute("PRAGMA journal_mode=WAL")
        cursor.execute("PRAGMA synchronous=NORMAL")
        cursor.close()

    storage.engine.dispose()  # what was opened before the listener
    return optuna.storages._CachedStorage(storage)


def patiently(call: Callable[[], Any], patience_s: float = 900.0, also: tuple[str, ...] = ()) -> Any:
    """Call the storage; while it is locked or away, try again (on the errors ``also`` for half a minute)."""
    began, wait = time.monotonic(), 0.2
    while True:
        try:
            return call()
        except Exception as error:
            names = {cls.__name__ for cls in type(error).__mro__}
            names |= {cls.__name__ for cls in type(error.__cause__).__mro__}
            away = names & {"OperationalError", "StorageInternalError", "InterfaceError", "DisconnectionError"}
            limit = patience_s if away else 30.0 if names & set(also) else 0.0
            if time.monotonic() - began + wait > limit:
                raise
            log.warning("the search storage is away, trying again in %.1f s: %s", wait, str(error).splitlines()[0])
            time.sleep(wait)
            wait = min(2 * wait, 15.0)

"""Passwords in URLs never reach a log, a saved study, a tracking server or a terminal."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

_USER_INFO = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*://)(?P<user>[^\s/:@]*):(?P<secret>\S+)@")
_QUERY = re.compile(r"(?i)([?&](?:password|passwd|token|secret|access_key|api_key)=)[^\s&#]+")


def redact(text: str) -> str:
    """The text with the password of every URL replaced by ``***``."""
    return _QUERY.sub(r"\1***", _USER_INFO.sub(r"\g<scheme>\g<user>:***@", text))


def redact_all(data: Any) -> Any:
    """The same for every string in plain data."""
    if isinstance(data, str):
        return redact(data)
    if isinstance(data, Mapping):
        return {key: redact_all(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [redact_all(value) for value in data]
    return data


class RedactingFilter(logging.Filter):
    """Redacts whole log records, arguments and all."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Always let the record through, without secrets."""
        record.msg, record.args = redact(record.getMessage()), None
        return True

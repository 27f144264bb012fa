"""Log lines of the form `event key=value`, and a limit on how often a fault repeats itself.

Owns the form of a line. It must not open files or start threads; `runtime` installs handlers.
"""

from __future__ import annotations

import logging
from datetime import UTC, datetime
from typing import Final

REPEATS_MAX: Final = 5
"""Lines of one event and level within WINDOW_S; the rest are counted and told with the next one."""

WINDOW_S: Final = 10.0

EVENTS_MAX: Final = 1024
"""Different events remembered; events are written by us, so this is never reached in earnest."""

Value = str | int | float | bool | bytes | None


class EventLog:
    """A logger whose lines are an event and its fields. Thread-safe as `logging` is."""

    __slots__ = ("_logger",)

    def __init__(self, name: str) -> None:
        self._logger = logging.getLogger(name)

    def debug(self, event: str, **fields: Value) -> None:
        """Flow, for developers."""
        self._write(logging.DEBUG, event, fields)

    def info(self, event: str, **fields: Value) -> None:
        """Something a person would act on or audit."""
        self._write(logging.INFO, event, fields)

    def warning(self, event: str, **fields: Value) -> None:
        """A fault that was dealt with."""
        self._write(logging.WARNING, event, fields)

    def error(self, event: str, *, exc: BaseException | None = None, **fields: Value) -> None:
        """A fault that needs a person. `exc` adds its traceback."""
        self._write(logging.ERROR, event, fields, exc)

    def _write(
        self,
        level: int,
        event: str,
        fields: dict[str, Value],
        exc: BaseException | None = None,
    ) -> None:
        if self._logger.isEnabledFor(level):
            line = " ".join((event, *(f"{key}={_shown(value)}" for key, value in fields.items())))
            # The event travels apart from the line, so that repeats are known by their event.
            self._logger.log(level, "%s", line, exc_info=exc, extra={"event": event})


def event_log(name: str) -> EventLog:
    """The log of one module; call with `__name__`."""
    return EventLog(name)


def _shown(value: Value) -> str:
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, float):
        return f"{value:.6g}"
    text = str(value)
    if text and text.isprintable() and not any(c in text for c in ' "='):
        return text
    return '"' + text.encode("unicode_escape").decode("ascii").replace('"', '\\"') + '"'


class LineFormatter(logging.Formatter):
    """`2026-01-31T12:00:00.123Z info ctxstore_daemon.node event key=value`."""

    def __init__(self) -> None:
        super().__init__(
            "%(asctime)s.%(msecs)03dZ %(levelname_lower)s %(name)s %(message)s%(repeats)s",
            datefmt="%Y-%m-%dT%H:%M:%S",
            defaults={"repeats": ""},
        )

    def format(self, record: logging.LogRecord) -> str:
        """One line, unless a traceback follows."""
        record.levelname_lower = record.levelname.lower()
        return super().format(record)

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:
        """UTC, whatever the machine's zone is."""
        moment = datetime.fromtimestamp(record.created, UTC)
        return moment.strftime(datefmt or "%Y-%m-%dT%H:%M:%S")


class RepeatFilter(logging.Filter):
    """Lets each fault through a few times a window, and says how many it kept back.

    State changes under the handler's lock only: install it on one handler.
    """

    def __init__(self) -> None:
        super().__init__()
        self._windows: dict[tuple[str, str, int], tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """False for a repeat too many."""
        event = getattr(record, "event", None)
        if event is None or record.levelno < logging.WARNING:
            return True
        key = (record.name, event, record.levelno)
        began, count = self._windows.get(key, (record.created, 0))
        kept_back = 0
        if not 0 <= record.created - began < WINDOW_S:
            kept_back = max(0, count - REPEATS_MAX)
            began, count = record.created, 0
        if len(self._windows) >= EVENTS_MAX:
            self._windows.clear()
        self._windows[key] = (began, count + 1)
        if kept_back:
            record.repeats = f" kept_back={kept_back}"
        return count < REPEATS_MAX

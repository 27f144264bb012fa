"""Log lines leave through a thread, so that a reader of stderr who stalls never stalls the daemon.

Owns the handlers of this process. It must not know what is logged.
"""

from __future__ import annotations

import logging
import queue
import sys
from logging.handlers import QueueHandler, QueueListener
from typing import Final

from ctxstore_daemon.telemetry.log import LineFormatter, RepeatFilter

QUEUE_LINES_MAX: Final = 4096


class _DroppingHandler(QueueHandler):
    """Drops lines when the reader is far behind, and says later how many."""

    dropped = 0

    def enqueue(self, record: logging.LogRecord) -> None:
        try:
            if self.dropped:
                lost, self.dropped = self.dropped, 0
                record.repeats = f"{getattr(record, 'repeats', '')} lines_dropped={lost}"
            self.queue.put_nowait(record)
        except queue.Full:
            self.dropped += 1


class LogOutput:
    """Logging of this process to stderr between construction and `close`."""

    def __init__(self, level: str) -> None:
        """`level` is a name of `logging`: debug, info, warning or error."""
        lines: queue.Queue[logging.LogRecord] = queue.Queue(QUEUE_LINES_MAX)
        stream = logging.StreamHandler(sys.stderr)
        stream.setFormatter(LineFormatter())
        self._handler = _DroppingHandler(lines)
        self._handler.addFilter(RepeatFilter())
        self._listener = QueueListener(lines, stream)
        root = logging.getLogger()
        root.addHandler(self._handler)
        root.setLevel(level.upper())
        logging.captureWarnings(True)
        self._listener.start()

    def close(self) -> None:
        """Write what is queued and end the thread. Idempotent."""
        logging.getLogger().removeHandler(self._handler)
        if self._listener._thread is not None:  # stop() of Python 3.11 fails the second time
            self._listener.stop()

"""Which shards may enter the nvme tier.

Owns the decision for shards of `durability=memory`; a `group` put is written in any case. It must
not queue or write anything.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ctxstore_daemon.engine.index import IndexState


class AdmissionPolicy(ABC):
    """Asked once for each committed shard, before it is queued for write-behind."""

    @abstractmethod
    def admit(self, index: IndexState, row: int) -> bool:
        """False: the shard stays in memory only and may be evicted without having been written."""


class AdmitAll(AdmissionPolicy):
    """Everything is written."""

    def admit(self, index: IndexState, row: int) -> bool:
        return True

"""The client library: what inference workers and tools use to reach a ctxstore node.

It never imports the daemon, Ray or CUDA; integrations with engines load their engine lazily.
"""

from ctxstore import __version__
from ctxstore.errors import (
    AuthenticationError,
    ClosedError,
    ConfigError,
    CtxStoreError,
    DeadlineExceeded,
    ForkedError,
    Overloaded,
    ProtocolError,
    StaleView,
    TransportError,
    UnknownNamespace,
)
from ctxstore.wire.messages import Lookup, PutResult, StatTier
from ctxstore_client.async_store import AsyncStore, AsyncTicket, connect_async
from ctxstore_client.ops.control import ShardStat
from ctxstore_client.store import Store, connect
from ctxstore_client.tickets import Ticket

__all__ = [
    "AsyncStore",
    "AsyncTicket",
    "AuthenticationError",
    "ClosedError",
    "ConfigError",
    "CtxStoreError",
    "DeadlineExceeded",
    "ForkedError",
    "Lookup",
    "Overloaded",
    "ProtocolError",
    "PutResult",
    "ShardStat",
    "StaleView",
    "StatTier",
    "Store",
    "Ticket",
    "TransportError",
    "UnknownNamespace",
    "__version__",
    "connect",
    "connect_async",
]

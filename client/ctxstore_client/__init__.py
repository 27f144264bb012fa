"""The client library: what inference workers and tools use to reach a ctxstore node.

It never imports the daemon, Ray or CUDA; integrations with engines load their engine lazily.
"""

from ctxstore import __version__
from ctxstore.errors import (
    AuthenticationError,
    ChecksumMismatch,
    ClosedError,
    ConfigError,
    CtxStoreError,
    DeadlineExceeded,
    DeviceError,
    ForkedError,
    LocalProtocolError,
    OutOfSpace,
    Overloaded,
    ProtocolError,
    RemoteProtocolError,
    StaleView,
    StorageError,
    TransportError,
    UnknownNamespace,
    VersionMismatch,
    WrongCluster,
)
from ctxstore.wire.messages import Lookup, PutResult, StatTier
from ctxstore_client.async_store import AsyncStore, AsyncTicket, connect_async
from ctxstore_client.chains import prefix_chain
from ctxstore_client.ops.control import ShardStat
from ctxstore_client.store import Store, connect
from ctxstore_client.tickets import Ticket

__all__ = [
    "AsyncStore",
    "AsyncTicket",
    "AuthenticationError",
    "ChecksumMismatch",
    "ClosedError",
    "ConfigError",
    "CtxStoreError",
    "DeadlineExceeded",
    "DeviceError",
    "ForkedError",
    "LocalProtocolError",
    "Lookup",
    "OutOfSpace",
    "Overloaded",
    "ProtocolError",
    "PutResult",
    "RemoteProtocolError",
    "ShardStat",
    "StaleView",
    "StatTier",
    "StorageError",
    "Store",
    "Ticket",
    "TransportError",
    "UnknownNamespace",
    "VersionMismatch",
    "WrongCluster",
    "__version__",
    "connect",
    "connect_async",
    "prefix_chain",
]

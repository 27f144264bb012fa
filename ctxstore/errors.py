"""Every exception of ctxstore, with its wire code and whether trying again can help.

Owns the one hierarchy that all packages raise from. It must not import anything of the project:
the wire maps codes to classes through `error_from_code`, foreign errors are mapped at the seams.
A miss or a time-out of a data operation is a value (`Lookup`, `PutResult`), never an exception.
"""

from __future__ import annotations

from typing import ClassVar


class CtxStoreError(Exception):
    """Base of all errors. `code` travels on the wire; `retryable` tells whether the same call may
    work later."""

    code: ClassVar[int] = 1
    retryable: ClassVar[bool] = False


class ConfigError(CtxStoreError, ValueError):
    """A setting is unknown, malformed, or does not fit another one."""

    code = 2


class ProtocolError(CtxStoreError):
    """The bytes on a connection break the wire protocol."""

    code = 10


class LocalProtocolError(ProtocolError):
    """This side tried to send something the protocol forbids; the connection is still good."""

    code = 11


class RemoteProtocolError(ProtocolError):
    """The other side sent something the protocol forbids; the connection must be closed."""

    code = 12


class VersionMismatch(ProtocolError):
    """No protocol version is spoken by both sides."""

    code = 13


class AuthenticationError(CtxStoreError):
    """The daemon does not accept the token, or listening needs credentials that are not there."""

    code = 20


class UnknownNamespace(CtxStoreError):
    """The namespace named in the hello is not configured on this node."""

    code = 21


class WrongCluster(CtxStoreError):
    """The node belongs to another cluster than the one the client asked for."""

    code = 22


class TransportError(CtxStoreError):
    """A connection could not be made, or broke."""

    code = 30
    retryable = True


class DeadlineExceeded(CtxStoreError, TimeoutError):
    """The caller's deadline passed; the outcome of the operation is unknown."""

    code = 31
    retryable = True


class Overloaded(CtxStoreError):
    """A bound is reached; nothing was done. Try again after `retry_after_s`."""

    code = 32
    retryable = True

    def __init__(self, message: str, *, retry_after_s: float = 0.05) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ClosedError(CtxStoreError):
    """The store, connection or node was closed by its owner."""

    code = 33


class ForkedError(CtxStoreError):
    """The object belongs to the parent process and cannot be used in this child."""

    code = 34


class StorageError(CtxStoreError):
    """The local disk or arena failed."""

    code = 40


class ChecksumMismatch(StorageError):
    """Stored bytes are not the bytes that were put."""

    code = 41


class OutOfSpace(StorageError):
    """The disk, or a cap set on it, has no room."""

    code = 42


class DeviceError(StorageError):
    """The device answered an input/output error."""

    code = 43


class DataDirError(StorageError):
    """The data directory cannot be used: missing, read-only, locked, or written by a newer
    format."""

    code = 44


class ManifestError(StorageError):
    """The bytes of a manifest are damaged, oversized, or of a newer version."""

    code = 45


class PlacementError(CtxStoreError):
    """The request reached a node that cannot answer it for its view of the cluster."""

    code = 50
    retryable = True


class StaleEpoch(PlacementError):
    """The request was fenced: it carries an older epoch than the node's view."""

    code = 51


class LeaseExpired(PlacementError):
    """The lease was ended by the daemon (`lease_s_max`), its slots may be reused."""

    code = 52


class NotOwner(PlacementError):
    """The key is not placed on this node in the view the node holds."""

    code = 53


class StaleView(CtxStoreError):
    """A zero-copy view's slot was reused, or its connection died, before the view was closed."""

    code = 60


def _subclasses(cls: type[CtxStoreError]) -> list[type[CtxStoreError]]:
    found = [cls]
    for child in cls.__subclasses__():
        found.extend(_subclasses(child))
    return found


def error_from_code(code: int, message: str) -> CtxStoreError:
    """The exception a wire error code stands for; an unknown code becomes a plain CtxStoreError."""
    for cls in _subclasses(CtxStoreError):
        if cls.code == code:
            return cls(message)
    return CtxStoreError(f"error {code}: {message}")

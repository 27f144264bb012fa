"""Both faces of the client behind one set of coroutines, so that one suite tests all of them.

Owns the four ways to a store: sync or asyncio, over shared memory or TCP. It must not add
behaviour: what a face raises or returns passes through.
"""

from __future__ import annotations

from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ctxstore_client import connect, connect_async

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable


@dataclass(frozen=True)
class Way:
    """One way to reach a store."""

    asynchronous: bool
    shm: str

    def __str__(self) -> str:
        face = "async" if self.asynchronous else "sync"
        return f"{face}-{'shm' if self.shm == 'require' else 'tcp'}"


WAYS = [Way(asynchronous, shm) for asynchronous in (False, True) for shm in ("require", "off")]


class _Ticket:
    def __init__(self, ticket: Any) -> None:
        self._ticket = ticket

    def done(self) -> bool:
        return bool(self._ticket.done())

    async def wait(self, timeout_s: float | None = None) -> Any:
        return self._ticket.wait(timeout_s)

    async def cancel(self) -> bool:
        return bool(self._ticket.cancel())


class SyncAsAsync:
    """The sync face, awaited."""

    def __init__(self, store: Any) -> None:
        self.store = store

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self.store, name)

        async def call(*arguments: Any, **options: Any) -> Any:
            result = method(*arguments, **options)
            background = name.startswith("submit_") or name == "prefetch"
            return _Ticket(result) if background else result

        return call

    @asynccontextmanager
    async def view(self, *arguments: Any, **options: Any) -> AsyncIterator[Any]:
        with self.store.view(*arguments, **options) as views:
            yield views

    @asynccontextmanager
    async def alloc(self, *arguments: Any, **options: Any) -> AsyncIterator[Any]:
        with self.store.alloc(*arguments, **options) as staged:
            yield staged


@asynccontextmanager
async def open_store(way: Way, url: str, **options: Any) -> AsyncIterator[Any]:
    """A store reached that way, closed at the end."""
    if way.asynchronous:
        async with connect_async(url, shm=way.shm, **options) as store:
            yield store
    else:
        with connect(url, shm=way.shm, **options) as sync_store:
            yield SyncAsAsync(sync_store)

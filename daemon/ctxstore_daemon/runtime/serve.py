"""`ctxstore serve`: one node in a process of its own, from locking its directory to leaving it.

Owns the order of start and stop of everything the process has: lock, sockets, memory, threads,
loop, signals, published addresses. It must not know requests or shards.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import uvloop

from ctxstore import __version__
from ctxstore.config import DirectIO, describe
from ctxstore.errors import ConfigError, CtxStoreError, StorageError
from ctxstore.wire import messages as wire
from ctxstore_daemon.node import Node, Seams
from ctxstore_daemon.runtime import host
from ctxstore_daemon.runtime.arena import Arena
from ctxstore_daemon.runtime.clock import SystemClock, system_rng
from ctxstore_daemon.runtime.datadir import (
    DataDirLock,
    Endpoints,
    publish_endpoints,
    withdraw_endpoints,
)
from ctxstore_daemon.runtime.datathreads import DataConnection
from ctxstore_daemon.runtime.disk import RealDisk
from ctxstore_daemon.runtime.http import HttpServerState
from ctxstore_daemon.runtime.listener import Gate, Listener
from ctxstore_daemon.runtime.logs import LogOutput
from ctxstore_daemon.runtime.memfd import page_ladder
from ctxstore_daemon.runtime.mover import ThreadMover
from ctxstore_daemon.runtime.pages import pages
from ctxstore_daemon.runtime.sockets import address_of, bind_tcp, bind_unix, remove_socket
from ctxstore_daemon.runtime.staging import StagingPool
from ctxstore_daemon.telemetry.log import event_log

if TYPE_CHECKING:
    import socket

    from ctxstore.config import Address, DaemonConfig

MOVER_THREADS_MAX: Final = 4
DESCRIPTORS_EACH: Final = 2
"""A connection has its socket, and Python keeps a descriptor of the staging's map."""

POPULATE_RETRY_S: Final = 5.0
"""Pause after a shortage of pages before the arena tries to grow again."""

DATA_JOIN_S: Final = 5.0
FAREWELL_S_MAX: Final = 2.0

_log = event_log(__name__)


def serve(config: DaemonConfig) -> int:
    """Run a node until SIGTERM or SIGINT; the exit code: 0 ended cleanly, 1 failed, 2 usage."""
    output = LogOutput(config.node.log_level.value)
    try:
        host.check_memory(config.memory.cap_bytes)
        descriptors = host.raise_descriptor_limit()
        if descriptors < DESCRIPTORS_EACH * config.limits.connections_max:
            _log.warning("few_descriptors", limit=descriptors, effect="fewer connections")
        _log.info("config", version=__version__, pid=os.getpid())
        for line in describe(config):
            _log.info("config_value", setting=line)
        with contextlib.ExitStack() as stack:
            directory = Path(config.node.data_dir).absolute()
            lock = DataDirLock(directory, create=True)
            stack.callback(lock.release)
            withdraw_endpoints(directory)
            daemon = _Daemon(config, directory, stack)
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(daemon.run())
    except CtxStoreError as error:
        _log.error("cannot_serve", error=str(error))
        sys.stderr.write(f"ctxstore: {error}\n")
        return 2 if isinstance(error, ConfigError) else 1
    except BaseExceptionGroup as group:
        _log.error("node_failed", exc=group)
        return 1
    finally:
        output.close()
    return 0


class _Daemon:
    """Everything of the process that one run of the loop needs."""

    def __init__(self, config: DaemonConfig, directory: Path, stack: contextlib.ExitStack) -> None:
        self._config = config
        self._directory = directory
        self._stack = stack
        self._control = self._tcp(config.listen.control, "control")
        self._data = self._tcp(config.data_address, "data")
        self._http = self._tcp(config.http_address, "http")
        self._arena = Arena(config.arena_bytes, kinds=page_ladder(config.memory.pages))
        stack.callback(self._arena.close)
        self._mover = ThreadMover(max(2, min(MOVER_THREADS_MAX, host.processors() // 4)))
        stack.callback(self._mover.close)
        self._disk = RealDisk(
            directory,
            threads=config.disk.io_threads,
            direct=config.disk.direct_io is not DirectIO.OFF,
        )
        stack.callback(self._disk.close)
        self._staging = StagingPool()
        stack.callback(self._staging.close)
        self._populate = ThreadPoolExecutor(1, thread_name_prefix="ctxstore-populate")
        stack.callback(self._populate.shutdown)
        self._streams: dict[int, DataConnection] = {}
        self._huge_bytes = 0
        self._stop = asyncio.Event()
        self._node = Node(
            config,
            Seams(
                clock=SystemClock(),
                disk=self._disk,
                mover=self._mover,
                arena=self._arena,
                rng=system_rng(),
                token_bytes=os.urandom,
                about_arena=self._about_arena,
                about_disk=self._disk.about,
            ),
        )

    async def run(self) -> None:
        """Start, serve until a signal or a failure, stop."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signalled, number)
        http = HttpServerState(pages(self._node))
        web = await loop.create_server(http.protocol, sock=self._http)
        try:
            await loop.run_in_executor(self._populate, self._populate_step)
            await self._node.start()
            # What recovery made stays for the life of the process: no collection needs to look.
            gc.collect()
            gc.freeze()
            host.release_free_memory()
            _log.info(
                "arena",
                bytes=self._arena.bytes_total,
                pages=self._arena.kind.value,
                huge_bytes=self._huge_bytes,
            )
            try:
                if not self._stop.is_set():
                    await self._serve()
            finally:
                await self._shut_down()
        finally:
            web.close()
            http.close()
            await web.wait_closed()

    async def _serve(self) -> None:
        unix = self._bind_unix()
        server = self._node.server
        server.address_data = address_of(self._data)
        server.unix_path = "" if unix is None else str(unix[1])
        gate = Gate(server, self._staging, self._arena.fd, self._open_stream)
        listeners = [
            Listener(self._control, gate, role=wire.Role.CONTROL),
            Listener(self._data, gate, role=wire.Role.DATA),
        ]
        if unix is not None:
            listeners.append(Listener(unix[0], gate, role=wire.Role.CONTROL))
        work = [asyncio.create_task(listener.run()) for listener in listeners]
        work.append(asyncio.create_task(self._grow_arena()))
        work.append(asyncio.create_task(self._node.wait_failed()))
        stop = asyncio.create_task(self._stop.wait())
        try:
            self._announce(server.unix_path)
            done, _ = await asyncio.wait([*work, stop], return_when=asyncio.FIRST_COMPLETED)
        finally:
            withdraw_endpoints(self._directory)
            for task in (*work, stop):
                task.cancel()
            await asyncio.wait([*work, stop])
            if unix is not None:
                remove_socket(unix[1])
        for task in done:
            task.result()  # raises what ended the node

    def _announce(self, unix_path: str) -> None:
        endpoints = Endpoints(
            control=address_of(self._control),
            data=address_of(self._data),
            http=address_of(self._http),
            unix=unix_path or None,
            pid=os.getpid(),
            node_id=self._node.node_id.hex(),
            version=__version__,
        )
        publish_endpoints(self._directory, endpoints)
        _log.info("ready", control=endpoints.control, data=endpoints.data, http=endpoints.http)
        with contextlib.suppress(BrokenPipeError):
            sys.stdout.write(
                f"ctxstore {__version__} ready: control {endpoints.control}, "
                f"data {endpoints.data}, http {endpoints.http}, "
                f"unix {endpoints.unix or 'none'}, data dir {self._directory}\n"
            )
            sys.stdout.flush()

    async def _shut_down(self) -> None:
        await self._node.stop(self._config.node.shutdown_deadline_s)
        loop = asyncio.get_running_loop()
        for stream in list(self._streams.values()):
            stream.end("the node stops")
        while self._streams:
            stream = next(iter(self._streams.values()))
            await loop.run_in_executor(self._populate, stream.join, DATA_JOIN_S)
            await asyncio.sleep(0)  # the thread's last event runs on this loop
        # Clients read their last words, and their staging is returned.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FAREWELL_S_MAX):
                await self._node.server.wait_empty()

    def _signalled(self, number: int) -> None:
        _log.info("signal", signal=signal.Signals(number).name)
        self._stop.set()

    async def _grow_arena(self) -> None:
        """Populate the rest of the arena in the background, then wait for ever."""
        loop = asyncio.get_running_loop()
        while not self._arena.complete:
            try:
                await loop.run_in_executor(self._populate, self._populate_step)
                self._node.arena_grew()
            except StorageError as error:
                _log.warning("arena_waits_for_pages", error=str(error))
                await asyncio.sleep(POPULATE_RETRY_S)
        _log.info("arena_populated", huge_bytes=self._huge_bytes)
        await asyncio.Event().wait()

    def _populate_step(self) -> None:
        """In a thread: the kernel's list of mappings is read here too, which takes a while."""
        self._arena.populate_step()
        self._huge_bytes = self._arena.huge_bytes()

    def _open_stream(self, conn: int, accepted: socket.socket) -> None:
        stream = DataConnection(
            conn,
            accepted,
            executor=self._node.executor,
            arena=self._arena.data,
            clock=SystemClock(),
            loop=asyncio.get_running_loop(),
            on_closed=self._stream_closed,
        )
        self._streams[conn] = stream
        self._node.executor.open_stream(conn, stream)
        stream.start()

    def _stream_closed(self, stream: DataConnection) -> None:
        del self._streams[stream.conn]
        self._node.server.stream_closed(stream.conn)

    def _about_arena(self) -> dict[str, Any]:
        return {"pages": self._arena.kind.value, "huge_page_bytes": self._huge_bytes}

    def _bind_unix(self) -> tuple[socket.socket, Path] | None:
        found = bind_unix(self._config.listen.unix, self._node.node_id)
        if found is None and self._config.listen.unix != "off":
            _log.warning("no_unix_socket", effect="clients on this host use TCP")
        return found

    def _tcp(self, address: Address, what: str) -> socket.socket:
        bound = bind_tcp(address, what=what)
        self._stack.callback(bound.close)
        return bound

"""Links at the end of their connection, without a daemon."""

from __future__ import annotations

import contextlib
import socket
from typing import TYPE_CHECKING

import pytest

from ctxstore.errors import LeaseExpired, TransportError
from ctxstore.wire import messages as wire
from ctxstore.wire.connection import ControlConnection, Side
from ctxstore_client.links import LinkKind, SocketLink
from ctxstore_client.ops.shared import defer_release

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def ended_link() -> Iterator[SocketLink]:
    """A link whose daemon has answered a ping and, in the same breath, said goodbye."""
    near, far = socket.socketpair()
    client, server = ControlConnection(Side.CLIENT), ControlConnection(Side.SERVER)
    (hello,) = server.receive(
        client.send(
            wire.Hello(
                rid=client.next_rid(),
                version_min=wire.VERSION_MIN,
                version_max=wire.VERSION_MAX,
                role=wire.Role.CONTROL,
                cluster_id="",
                namespace="default",
                token="",
                client="test",
                capabilities=0,
                shm=False,
                staging_bytes=0,
            )
        )
    )
    answer = wire.HelloOk(
        rid=hello.rid,
        version=wire.VERSION,
        capabilities=0,
        node_id=bytes(16),
        boot_id=bytes(16),
        cluster_id="ctxstore",
        session=bytes(16),
        ns_id=1,
        incarnation=0,
        arena_bytes=0,
        staging_bytes=0,
        shard_bytes_max=4096,
        lease_bytes_max=4096,
        lease_s_max=1.0,
        batch_keys_max=16,
        unix_path="",
        data_address="",
        server="test",
    )
    client.receive(server.send(answer))
    link = SocketLink(near, client, answer, kind=LinkKind.CONTROL)
    server.receive(link.encode(wire.Ping(link.next_rid())))
    pong = server.send(wire.CountReply(2, 0))
    link.inbox.extend(client.receive(pong + server.fail(LeaseExpired("too late"))))
    with contextlib.closing(far), contextlib.closing(link):
        yield link


def test_a_request_on_an_ended_connection_is_a_transport_error(ended_link: SocketLink) -> None:
    """Not a protocol error of ours: a get that goes on over the next piece must be a miss."""
    with pytest.raises(TransportError):
        ended_link.encode(wire.Ping(7))


def test_a_lease_of_an_ended_connection_needs_no_release(ended_link: SocketLink) -> None:
    defer_release(ended_link, 5)

    assert ended_link.take_deferred() == b""

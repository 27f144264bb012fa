"""One sample of every control message, with the exact frame it must make on the wire.

Owns data only. The frames are literals on purpose: a change of the wire format must show here.
"""

from __future__ import annotations

import struct

from ctxstore.wire.connection import ControlConnection, Side
from ctxstore.wire.messages import (
    CountReply,
    Durability,
    Exists,
    Explain,
    Failure,
    Flush,
    Get,
    GetReply,
    Hello,
    HelloOk,
    Hold,
    MaskReply,
    Match,
    Message,
    Ping,
    Prefetch,
    Put,
    PutReply,
    Release,
    Remove,
    Report,
    Role,
    Stat,
    StatReply,
    Stats,
    TextReply,
    Touch,
    Verify,
    VerifyReply,
)

KEY = bytes(range(16))
KEY_HEX = "c410 000102030405060708090a0b0c0d0e0f"

HELLO = Hello(
    rid=1,
    version_min=1,
    version_max=2,
    role=Role.CONTROL,
    cluster_id="c",
    namespace="default",
    token="t",
    client="py",
    capabilities=15,
    shm=True,
    staging_bytes=1 << 20,
)

DATA_HELLO = Hello(
    rid=1,
    version_min=1,
    version_max=1,
    role=Role.DATA,
    cluster_id="",
    namespace="default",
    token="",
    client="",
    capabilities=0,
    shm=False,
    staging_bytes=0,
    session=b"S" * 16,
)

HELLO_OK = HelloOk(
    rid=1,
    version=1,
    capabilities=3,
    node_id=b"N" * 16,
    boot_id=b"B" * 16,
    cluster_id="c",
    session=b"S" * 16,
    ns_id=2**63,
    incarnation=1,
    arena_bytes=1 << 30,
    staging_bytes=1 << 20,
    shard_bytes_max=1 << 26,
    lease_bytes_max=1 << 28,
    lease_s_max=60.0,
    batch_keys_max=65536,
    unix_path="/run/c.sock",
    data_address="h:7601",
    server="ctxstore 0.1.0",
)

ENTRY = struct.Struct("<QQIIBB6x")

PUT = Put(
    rid=8,
    timeout_us=1,
    durability=Durability.GROUP,
    keys=KEY,
    lengths=struct.pack("<I", 300),
    offsets=struct.pack("<Q", 4096),
    ttl_ms=struct.pack("<Q", 1000),
    priority=struct.pack("<h", -1),
    depth=struct.pack("<I", 3),
    cost=struct.pack("<f", 0.5),
)

GOLDEN: list[tuple[Message, str]] = [
    (
        HELLO,
        "1e000000 9d 01 01 01 02 00 a163 a764656661756c74 a174 a27079 0f c3 ce00100000 c400",
    ),
    (
        DATA_HELLO,
        "26000000 9d 01 01 01 01 01 a0 a764656661756c74 a0 a0 00 c2 00"
        "c410 53535353535353535353535353535353",
    ),
    (
        HELLO_OK,
        "8d000000 dc0013 02 01 01 03 c410 4e4e4e4e4e4e4e4e4e4e4e4e4e4e4e4e"
        "c410 42424242424242424242424242424242 a163 c410 53535353535353535353535353535353"
        "cf8000000000000000 01 ce40000000 ce00100000 ce04000000 ce10000000 cb404e000000000000"
        "ce00010000 ab2f72756e2f632e736f636b a6683a37363031 ae63747873746f726520302e312e30",
    ),
    (
        Failure(rid=0, code=32, message="full", retry_after_ms=50),
        "0a000000 95 03 00 20 a466756c6c 32",
    ),
    (
        Get(rid=7, timeout_us=5_000_000, keys=KEY + KEY),
        "2a000000 94 10 07 ce004c4b40 c420"
        "000102030405060708090a0b0c0d0e0f 000102030405060708090a0b0c0d0e0f",
    ),
    (
        GetReply(
            rid=7,
            lease=9,
            entries=ENTRY.pack(4096, 0, 300, 5, 0, 0) + ENTRY.pack(0, 0xABCD, 2, 0, 0, 1),
            inline=b"hi",
        ),
        "4a000000 95 40 07 09 c440"
        "0010000000000000 0000000000000000 2c010000 05000000 00 00 000000000000"
        "0000000000000000 cdab000000000000 02000000 00000000 00 01 000000000000 c402 6869",
    ),
    (Release(rid=0, leases=struct.pack("<Q", 9)), "0d000000 93 11 00 c408 0900000000000000"),
    (
        PUT,
        f"41000000 9b 12 08 01 02 {KEY_HEX} c404 2c010000 c408 0010000000000000"
        "c408 e803000000000000 c402 ffff c404 03000000 c404 0000003f",
    ),
    (PutReply(rid=8, results=bytes([0, 1])), "07000000 93 41 08 c402 0001"),
    (Exists(rid=9, timeout_us=0, keys=KEY), f"16000000 94 13 09 00 {KEY_HEX}"),
    (Match(rid=10, timeout_us=0, keys=KEY), f"16000000 94 14 0a 00 {KEY_HEX}"),
    (Stat(rid=11, timeout_us=0, keys=KEY), f"16000000 94 15 0b 00 {KEY_HEX}"),
    (
        Prefetch(rid=12, timeout_us=0, keys=KEY, by_us=1000),
        f"19000000 95 16 0c 00 {KEY_HEX} cd03e8",
    ),
    (Hold(rid=13, timeout_us=0, keys=KEY, ttl_ms=60_000), f"19000000 95 17 0d 00 {KEY_HEX} cdea60"),
    (Touch(rid=14, timeout_us=0, keys=KEY, ttl_ms=0), f"17000000 95 18 0e 00 {KEY_HEX} 00"),
    (Remove(rid=15, timeout_us=0, keys=KEY), f"16000000 94 19 0f 00 {KEY_HEX}"),
    (Flush(rid=16, timeout_us=0), "04000000 93 1a 10 00"),
    (Explain(rid=17, timeout_us=0, keys=KEY), f"16000000 94 1b 11 00 {KEY_HEX}"),
    (Stats(rid=18, timeout_us=0), "04000000 93 1c 12 00"),
    (Ping(rid=2**32 - 1), "07000000 92 1d ceffffffff"),
    (
        Report(rid=0, keys=KEY, sums=struct.pack("<Q", 2**64 - 1)),
        f"1f000000 94 1e 00 {KEY_HEX} c408 ffffffffffffffff",
    ),
    (Verify(rid=20, timeout_us=0, bytes_per_s=0), "05000000 94 1f 14 00 00"),
    (MaskReply(rid=9, mask=b"\x01\x00"), "07000000 93 42 09 c402 0100"),
    (CountReply(rid=10, count=300), "06000000 93 43 0a cd012c"),
    (
        StatReply(rid=11, entries=struct.pack("<QIBB2x", 1500, 300, 2, 3)),
        "15000000 93 44 0b c410 dc05000000000000 2c010000 02 03 0000",
    ),
    (TextReply(rid=17, text="{}"), "06000000 93 45 11 a27b7d"),
    (
        VerifyReply(
            rid=20, done=True, shards=3, checked_bytes=70_000, damaged=1, unreadable=0, total=3
        ),
        "0d000000 98 46 14 c3 03 ce00011170 01 00 03",
    ),
]


def open_pair(
    hello: Hello = HELLO, hello_ok: HelloOk = HELLO_OK
) -> tuple[ControlConnection, ControlConnection]:
    """Client and server end of a connection past its hello."""
    client, server = ControlConnection(Side.CLIENT), ControlConnection(Side.SERVER)
    server.receive(client.send(hello))
    client.receive(server.send(hello_ok))
    return client, server

"""Wire protocol v1, sans I/O: bytes in, messages out, and the other way round.

Owns framing, messages, their encoding and every bound on what a peer may send. It never opens a
socket, never waits and never asks for the time. `ctxstore.wire.messages` is its public face.
"""

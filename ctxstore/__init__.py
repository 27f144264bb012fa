"""The shared core of ctxstore: keys, layouts, placement, wire protocol, settings.

Everything here is pure: bytes and values in, bytes and values out. It never opens a file or a
socket, never asks for the time, never starts a thread; ``ctxstore.testing`` is the one exception.
"""

__version__ = "0.1.0"

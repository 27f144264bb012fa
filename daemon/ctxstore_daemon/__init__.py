"""The node daemon: keeps shards in memory and on NVMe and serves them to clients.

Owns arena, segments, index and sockets of one node. It never imports the client, and it reaches
the clock, the disk and the network only through ``ctxstore_daemon.runtime``.
"""

from ctxstore import __version__

__all__ = ["__version__"]

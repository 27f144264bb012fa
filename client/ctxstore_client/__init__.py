"""The client library: what inference workers and tools use to reach a ctxstore node.

It never imports the daemon, Ray or CUDA; integrations with engines load their engine lazily.
"""

from ctxstore import __version__

__all__ = ["__version__"]

"""Keeps the contexts of Hugging Face transformers models in a store.

Owns nothing but its public names; importing it imports neither torch nor transformers. Full
attention models only; see `ContextSession`.
"""

from ctxstore_client.integrations.transformers.load import LoadResult
from ctxstore_client.integrations.transformers.offload import OffloadStats
from ctxstore_client.integrations.transformers.session import (
    CallStats,
    ContextSession,
    Generation,
)

__all__ = ["CallStats", "ContextSession", "Generation", "LoadResult", "OffloadStats"]

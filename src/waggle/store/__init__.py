"""The rows of the model, and which of them changed. No I/O, no clock."""

from waggle.store.store import Changes, Store

__all__ = ["Changes", "Store"]

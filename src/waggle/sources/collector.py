"""Python's cyclic garbage collector, kept out of the way of bulk decoding.

A first list makes hundreds of thousands of containers that all live on; every collection meanwhile walks all of them
and finds nothing. Structs are exempt by themselves (`gc=False`), their lists and dicts are not.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

_pauses = 0
_was_enabled = False
_freeze_at_end = False


@contextmanager
def paused_collector(*, freeze: bool = False) -> Iterator[None]:
    """No automatic collection inside; nests, also across tasks, and restores what was set before the first.

    With `freeze`, what lives at the end of the outermost pause leaves the collector's sight for good, which spares
    the full walk that would follow otherwise. Frozen objects are still freed with their last reference; only garbage
    in cycles would stay, so one collection runs first, while there is little to walk.
    """
    global _pauses, _was_enabled, _freeze_at_end
    if _pauses == 0:
        if freeze:
            gc.collect()
        _was_enabled = gc.isenabled()
        gc.disable()
    _pauses += 1
    try:
        yield
        _freeze_at_end |= freeze
    finally:
        _pauses -= 1
        if _pauses == 0:
            if _freeze_at_end:
                gc.freeze()
                _freeze_at_end = False
            if _was_enabled:
                gc.enable()

"""Python's garbage collector, out of the way while a million objects are made."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def paused() -> Iterator[None]:
    """Leave the collector off inside, as it was afterwards. It is one for the whole process.

    It looks through all objects again whenever a quarter more are there: three quarters of the time
    that planning for a thousand ranks takes, and nothing of that plan is garbage.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()

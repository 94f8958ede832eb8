"""Python's garbage collector, out of the way while a million objects are made."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def paused() -> Iterator[None]:
    """Leave the collector off inside, and afterwards as it was. Does nothing on other threads.

    It looks through all objects again whenever a quarter more are there: three quarters of the time
    that planning for a thousand ranks takes, and nothing of that plan is garbage. There is one for
    the process: a background save must not undo what the main thread does to it meanwhile.
    """
    if threading.current_thread() is not threading.main_thread() or not gc.isenabled():
        yield
        return
    try:
        gc.disable()
        yield
    finally:
        gc.enable()

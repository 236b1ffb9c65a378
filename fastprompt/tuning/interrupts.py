# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C at a moment of our choosing."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def hold_interrupts() -> Iterator[None]:
    """Delay Ctrl-C to the end of the block, so that a step is taken wholly or not at all.

    Outside the main thread, where Python never raises KeyboardInterrupt by itself, this does nothing.

    Example:
        >>> try:
        ...     with hold_interrupts():
        ...         signal.raise_signal(signal.SIGINT)
        ...         done = True
        ... except KeyboardInterrupt:
        ...     done
        True
    """
    # A handler that was not set from Python reads as None and cannot be put back.
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is None:
        yield
        return
    held: list[int] = []
    previous = signal.signal(signal.SIGINT, lambda number, frame: held.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
        if held:
            signal.raise_signal(signal.SIGINT)

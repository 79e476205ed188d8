"""Ctrl-C and SIGTERM ask a run to stop at its next step instead of tearing it apart."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from types import FrameType

import jax
from jax.experimental import multihost_utils


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop, and has saved; the message says how to go on.

    Attributes:
        signal: which signal asked; a program ends with 128 plus its number, as a shell has it.
    """

    signal: int = signal.SIGINT


@contextmanager
def _stop_together() -> Iterator[Callable[[], bool]]:
    steps = count()
    before = None
    if threading.current_thread() is threading.main_thread():
        before = signal.signal(signal.SIGINT, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    try:
        yield lambda: multihost_utils.reached_preemption_sync_point(next(steps))
    except Interrupted as stopped:
        stopped.signal = signal.SIGTERM
        raise
    finally:
        if before is not None:
            signal.signal(signal.SIGINT, before)


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Gives a function that says whether SIGINT or SIGTERM has come.

    An `Interrupted` that leaves the block is told which of them came first. A second Ctrl-C
    interrupts at once. Outside the main thread, where Python allows no handlers, signals keep
    their usual effect.

    Of several processes, one that was asked stops them all at the same step: JAX takes SIGTERM
    and settles which one, and all have to ask equally often.
    """
    if jax.process_count() > 1:
        with _stop_together() as asked:
            yield asked
        return
    came: list[int] = []

    def ask(number: int, frame: FrameType | None) -> None:
        del frame
        came.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def asked() -> bool:
        return bool(came)

    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    except Interrupted as stopped:
        stopped.signal = came[0] if came else signal.SIGINT
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

"""Stops a run at its next step after Ctrl-C or SIGTERM, so that it can save first."""

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
    """The run was stopped by a signal and has saved; the message explains how to resume.

    Attributes:
        signal: number of the signal. A program ends with status 128 plus this number, the
            convention of shells.
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
    """Context manager that yields a function: whether SIGINT or SIGTERM was received.

    An `Interrupted` that leaves the block gets the number of the first signal. A second Ctrl-C
    interrupts at once. Outside the main thread Python allows no signal handlers, so signals keep
    their usual effect there.

    In a run of several processes, a signal to one of them stops all at the same step. JAX receives
    SIGTERM and agrees on the step, so all processes must call the function equally often.
    """
    if jax.process_count() > 1:
        with _stop_together() as stop_requested:
            yield stop_requested
        return
    received: list[int] = []

    def on_signal(number: int, frame: FrameType | None) -> None:
        del frame
        received.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def stop_requested() -> bool:
        return bool(received)

    if threading.current_thread() is not threading.main_thread():
        yield stop_requested
        return
    before = {
        number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield stop_requested
    except Interrupted as stopped:
        stopped.signal = received[0] if received else signal.SIGINT
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

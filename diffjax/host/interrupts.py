"""Stops a run after Ctrl-C or SIGTERM: at its next step, so that it can save first, or at once."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from types import FrameType
from typing import Any, TypeVar, cast

import jax
from jax.experimental import multihost_utils

T = TypeVar("T")
_LONGEST_NAP_SECONDS = 0.05


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


def stopped_at(step: int, num_steps: int, where: Any) -> str:
    """The message of a training that was stopped at a step, its state saved in a folder.

    Example:
        >>> stopped_at(3, 6, "runs/a")
        'stopped at step 3 of 6 and saved in runs/a; the same command goes on from there'
    """
    saved = f"stopped at step {step} of {num_steps} and saved in {where}"
    return f"{saved}; the same command goes on from there"


@contextmanager
def stop_at_once(message: str) -> Iterator[None]:
    """Within it, a signal that `stop_signals` awaits raises `Interrupted` at once.

    For work without steps, such as sampling, that loses nothing by it or whose caller saves then.
    In a run of several processes, and outside the main thread, it changes nothing.

    Args:
        message: the message of the error: what was stopped, and how it goes on.

    Example:
        >>> with stop_signals() as should_stop, stop_at_once("stopped while drawing"):
        ...     should_stop()
        False
    """
    numbers = (signal.SIGINT, signal.SIGTERM)
    before: dict[int, Any] = {number: signal.getsignal(number) for number in numbers}

    def on_signal(number: int, frame: FrameType | None) -> None:
        before[number](number, frame)
        raise Interrupted(message)

    alone = jax.process_count() == 1
    in_main = threading.current_thread() is threading.main_thread()
    # Not functions are the system's own ways: SIGTERM then ends the process.
    changed = [n for n in numbers if callable(before[n])] if alone and in_main else []
    for number in changed:
        signal.signal(number, on_signal)
    try:
        yield
    finally:
        for number in changed:
            if signal.getsignal(number) is on_signal:
                signal.signal(number, before[number])


def wait_for(tree: T) -> T:
    """Waits until arrays are computed, in naps: Python handles signals between two of them.

    Reading an array would wait within XLA, which handles none.

    Example:
        >>> int(wait_for(jax.numpy.ones(3)).sum())
        3
    """
    began = time.monotonic()
    for leaf in jax.tree.leaves(tree):
        while not is_ready(leaf):
            time.sleep(min(0.02 * (time.monotonic() - began), _LONGEST_NAP_SECONDS))
    return tree


def is_ready(value: Any) -> bool:
    """Whether an array is computed; NumPy's always are."""
    return not isinstance(value, jax.Array) or cast(Any, value).is_ready()


def interruptible(work: Callable[[], T]) -> T:
    """The result of `work`, computed in a thread, so that signals are handled meanwhile.

    For what is compiled: XLA handles no signals. `work` may not depend on contexts of JAX, which
    are those of a thread. If a signal raises an error, the thread goes on until it has finished.

    Example:
        >>> interruptible(lambda: 1 + 1)
        2
    """
    found: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            found.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="interruptible", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(_LONGEST_NAP_SECONDS)
    if errors:
        raise errors[0]
    return found[0]

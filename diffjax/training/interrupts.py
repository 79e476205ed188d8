"""Ctrl-C and SIGTERM ask a run to stop at its next step instead of tearing it apart."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop, and has saved; the message says how to go on.

    Attributes:
        signal: which signal asked; a program ends with 128 plus its number, as a shell has it.
    """

    signal: int = signal.SIGINT


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Gives a function that says whether SIGINT or SIGTERM has come.

    An `Interrupted` that leaves the block is told which of them came first. A second Ctrl-C
    interrupts at once. Outside the main thread, where Python allows no handlers, signals keep
    their usual effect.
    """
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

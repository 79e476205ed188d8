"""Executables: they parse flags, report errors in one line, and call the library."""

import itertools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def announce_imports(
    sleep: Callable[[float], Any] = time.sleep, out: Callable[[str], Any] | None = None
) -> None:
    """Prints after five seconds, and then every ten, that libraries are still being imported.

    On a machine that has not read them yet, or is busy, that takes as long. It returns once
    `experiments.flags.cli`, which executables import last, is there.

    Args:
        sleep: waits for so many seconds.
        out: takes each line; None is stderr.
    """
    seconds = 0
    for wait in itertools.chain([5], itertools.repeat(10)):
        sleep(wait)
        seconds += wait
        if hasattr(sys.modules.get("experiments.flags.cli"), "run"):
            return
        line = f"importing JAX and other libraries, {seconds} s so far"
        print(line, file=sys.stderr, flush=True) if out is None else out(line)


def end_at_once(*_signal: object) -> None:
    """Handles Ctrl-C while libraries are imported: one line, and the exit status 130.

    An exception would be raised in the middle of a library, whose C++ code turns it into another
    one or aborts. Nothing is open yet, so the process can end without clean-up.
    """
    os.write(2, b"interrupted\n")
    os._exit(128 + signal.SIGINT)


# While `python -m` imports this package, "-m" is the name of the program; later that of a file.
if Path(next(iter(sys.argv), "")).stem in ("-m", "diffjax"):
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, end_at_once)  # until `experiments.flags.cli.run` begins
    threading.Thread(target=announce_imports, name="imports", daemon=True).start()

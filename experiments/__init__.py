"""Executables: they parse flags, report errors in one line, and call the library."""

import itertools
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


# While `python -m` imports this package, "-m" is the name of the program; later that of a file.
if Path(next(iter(sys.argv), "")).stem in ("-m", "diffjax"):
    threading.Thread(target=announce_imports, name="imports", daemon=True).start()

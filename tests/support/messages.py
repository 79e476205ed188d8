"""What a refused command prints."""

import re

_PROGRESS = re.compile(r", \d\d:\d\d so far$")


def error_line(printed: str) -> str:
    """The one line of an error on stderr.

    On a busy machine lines about what takes long come before it; they are passed over.
    """
    lines = [line for line in printed.strip().splitlines() if not _PROGRESS.search(line)]
    assert len(lines) == 1, printed
    return lines[0]

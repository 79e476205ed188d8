"""The one exception that a user can cause, and what reads the words and numbers of a user."""

import difflib
from collections.abc import Iterable
from typing import Any

_MOST_NAMED = 100


class UserError(ValueError):
    """A mistake that the user can mend: one line with what is wrong, where, and what to do.

    The executables turn it into that line on stderr and exit status 2; in a notebook it is an
    ordinary exception.
    """


def whole_number(text: str) -> int | None:
    """The whole number from 0 that a text is, or None.

    It returns None for digits of other alphabets, and for more than 18 digits: no count is that
    large, and Python refuses to read more than 4,300.

    Example:
        >>> whole_number("12"), whole_number("-1"), whole_number("²"), whole_number("9" * 5000)
        (12, None, None, None)
    """
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 18 else None


def nearest(name: Any, known: Iterable[str]) -> str:
    """Ends an error message with the known name closest to `name`, or with all of them.

    Args:
        name: what the user gave, which may be no text.
        known: what would have been right.

    Example:
        >>> nearest("dppm", ["ddpm", "flow"])
        "did you mean 'ddpm'?"
        >>> nearest("sit", ["DiT", "SiT"])
        "did you mean 'SiT'?"
        >>> nearest("xyz", ["ddpm", "flow"])
        'known: ddpm, flow'
    """
    known = sorted(known)
    close = difflib.get_close_matches(str(name), known, n=1)
    in_capitals = [other for other in known if other.lower() == str(name).lower()]
    if found := in_capitals or close:
        return f"did you mean {found[0]!r}?"
    more = f" and {len(known) - _MOST_NAMED} more" if len(known) > _MOST_NAMED else ""
    return f"known: {', '.join(known[:_MOST_NAMED]) or 'none'}{more}"

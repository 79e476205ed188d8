"""The shapes that the library's functions state, checked at each call.

Of the hints of a function those alone are checked that say a shape: `Float[Array, "batch *event"]`.
The others are for `pyright`: protocols can't be checked at run time, and callers may hand in what
merely behaves as the class that is named.
"""

import inspect
from collections.abc import Callable
from typing import Any, get_args

from beartype import beartype
from jaxtyping import AbstractArray


def checked(function: Callable) -> Callable:
    """`beartype`, for hints that state shapes; what `jaxtyping.install_import_hook` applies.

    It applies it to two functions in place of each: the first is called with the arguments and
    returns anything, the second returns what the function did. So the second need not look at the
    arguments again: jaxtyping remembers their sizes.
    """
    hints = function.__annotations__
    if hints.get("return", Any) is not Any:
        hints = {"return": hints["return"]}
    hints = {name: hint for name, hint in hints.items() if _says_shape(hint)}
    if not hints:
        return function
    function.__annotations__ = hints
    return beartype(function)


def _says_shape(hint: Any) -> bool:
    if inspect.isclass(hint) and issubclass(hint, AbstractArray):
        return True
    return any(_says_shape(part) for part in get_args(hint))

"""Libraries that only some tests need: they are imported by these, not by all who collect them."""

from importlib import import_module
from importlib.util import find_spec
from typing import Any

import pytest


class Later:
    """A module that is imported when something of it is first used: torch takes two seconds."""

    def __init__(self, name: str):
        self._name = name

    def __getattr__(self, name: str) -> Any:
        return getattr(import_module(self._name), name)


def needs(name: str) -> pytest.MarkDecorator:
    """Skips a test where a library is not installed."""
    return pytest.mark.skipif(find_spec(name) is None, reason=f"needs {name}")

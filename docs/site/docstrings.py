"""How Griffe reads this library's docstrings: "Example:" is a section of code, not a note."""

from typing import Any

import griffe


class ExampleSections(griffe.Extension):
    """Gives the heading its name in Google's style, under which code is recognised."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = obj.docstring.value.replace("Example:\n", "Examples:\n")

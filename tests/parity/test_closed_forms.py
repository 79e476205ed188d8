"""What the page of other libraries' errors shows is what their versions print."""

import contextlib
import io
import re
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.support.later import needs
from tests.support.peers import k_diffusion

PAGE = Path(__file__).parents[2] / "docs" / "closed_forms.md"
SNIPPET = re.compile(r"^```py\n(.*?)^```\n\n```text\n(.*?)^```\n", re.DOTALL | re.MULTILINE)
pytestmark = [pytest.mark.parity, needs("diffusers"), needs("torch"), needs("k_diffusion")]


def test_snippets_print_what_the_page_shows():
    """Of another release there may be nothing to show: the page is then written again."""
    page = PAGE.read_text("utf-8")
    for package in ("diffusers", "k-diffusion"):
        shown = re.search(rf"^{package} (\d+\.\d+)", page, re.MULTILINE)
        assert shown
        if not version(package).startswith(f"{shown[1]}."):
            pytest.skip(f"the page is of {package} {shown[1]}, installed is {version(package)}")
    import_module("diffusers.schedulers")  # looks for libraries that `k_diffusion` stands in for
    snippets, names = SNIPPET.findall(page), {}
    assert len(snippets) == 7
    with k_diffusion():
        for code, shown in snippets:
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(compile(code, str(PAGE), "exec"), names)
            without = re.compile(r"^(diffusers|k-diffusion) .*$", re.MULTILINE)
            assert without.sub("", printed.getvalue()) == without.sub("", shown)

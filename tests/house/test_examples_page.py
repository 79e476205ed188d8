"""The page of configs has each of them."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_config_is_on_the_page():
    """In the table at its beginning or that of the accelerators, as `name`."""
    page = (ROOT / "docs" / "examples.md").read_text("utf-8")
    rows = "\n".join(line for line in page.splitlines() if line.startswith("|"))
    named = set(re.findall(r"`(\w+)`", rows))
    assert {file.stem for file in (ROOT / "configs").glob("*.py")} <= named

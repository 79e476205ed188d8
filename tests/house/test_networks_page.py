"""The table of published sizes is that of the networks."""

import pytest

from tests.pages.networks import HEAD, PAGE, line_of, rows, start_of

LINES = PAGE.read_text("utf-8").removeprefix(HEAD).splitlines()
AGAIN = "run python -m tests.pages.networks"


def test_sizes_and_parameters_are_those_of_the_networks():
    starts = [start_of(row) for row in rows()]
    assert PAGE.read_text("utf-8").startswith(HEAD), AGAIN
    assert len(LINES) == len(starts), AGAIN
    for line, start in zip(LINES, starts, strict=True):
        assert line.startswith(start), AGAIN


WITNESSES = ("SiT-B/2", "taesd")  # one that attends and one that convolves
ALL = [
    pytest.param(
        line, marks=[] if name in WITNESSES else pytest.mark.thorough(tenth=False), id=name
    )
    for line in LINES
    for name in [line.split("`")[1]]
]


@pytest.mark.parametrize("line", ALL)
def test_operations_are_those_of_the_networks(line):
    row = next(row for row in rows() if f"| `{row.name}` |" in line)
    assert line == line_of(row), AGAIN

"""Writes the table of FLOPs of a training step in docs/objectives.md, from compiled programs.

python -m tests.pages.costs          # objectives that are new
python -m tests.pages.costs --all    # and all others again
"""

import sys
from pathlib import Path

from diffjax import choices
from diffjax.performance.objective_costs import PLAIN, cost_line, setup_of, training_flops

PAGE = Path(__file__).parents[2] / "docs" / "objectives.md"
BEGIN, END = "<!-- FLOPs of a step -->\n", "<!-- end -->\n"
HEAD = "| objective | FLOPs of a step |\n|---|---|\n"
NAMES = [
    *(f"objective={name}" for name in choices.OBJECTIVES),
    *(f"objective={name},derivative=central" for name in ("mean_flow", "imf", "flow_map", "scm")),
    *(f"objective=flow_map,loss=flow_map_{rule}" for rule in ("eulerian", "progressive")),
]


def table_of(page: str) -> str:
    """The lines of the table in the page."""
    return page.partition(BEGIN)[2].partition(END)[0].removeprefix(HEAD)


def main(again: bool) -> None:
    """Writes the table; a line that is there is kept, unless all are counted again."""
    page = PAGE.read_text("utf-8")
    known = {} if again else {line.split("`")[1]: line for line in table_of(page).splitlines()}
    plain, lines = training_flops(setup_of(PLAIN)), []
    for name in NAMES:
        kept = known.get(name.removeprefix("objective="))
        line = f"{kept}\n" if kept else cost_line(name, training_flops(setup_of(name)) / plain)
        lines.append(line)
    before, _, rest = page.partition(BEGIN)
    PAGE.write_text(before + BEGIN + HEAD + "".join(lines) + END + rest.partition(END)[2], "utf-8")


if __name__ == "__main__":
    main(again="--all" in sys.argv[1:])

"""Where runs of earlier versions are, and the folder of the first release's."""

from pathlib import Path

OLD_RUNS = Path(__file__).parents[1] / "runs" / "old_runs"
OLD_RUN = OLD_RUNS / "0.1.0"

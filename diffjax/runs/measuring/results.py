"""Where results of a run are: evaluations of several steps, and a folder beside the run's own."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from diffjax.errors import UserError
from diffjax.host.run_files import read_json
from diffjax.host.storage import make_writable
from diffjax.runs import workdirs
from diffjax.runs.load import Run

AnyRun = TypeVar("AnyRun", bound=Run)
_OF_THE_RUN = (workdirs.CONFIG, workdirs.RUN, workdirs.METRICS)


def file_of(workdir: Path, name: str, step: int) -> Path:
    """The file of a result of a step, such as an evaluation.

    That of the newest checkpoint is `evaluation.json`, that of an earlier one, as of step 400,
    `evaluation_00000400.json`.
    """
    newest = max(workdirs.checkpoint_steps(workdir), default=step)
    return workdir / name if step >= newest else _of_step(workdir / name, step)


def keep_earlier(workdir: Path, step: int) -> None:
    """Renames `evaluation.json` if it is of another step than this one, which takes its place."""
    path = workdir / workdirs.EVALUATION
    if file_of(workdir, workdirs.EVALUATION, step) != path:
        return
    before = (read_json(path) or {}).get("step", step)
    if isinstance(before, int) and before != step and not _of_step(path, before).exists():
        path.replace(_of_step(path, before))


def _of_step(path: Path, step: int) -> Path:
    return path.with_stem(f"{path.stem}_{step:08d}")


def elsewhere(run: AnyRun, folder: str | Path) -> AnyRun:
    """The same run, whose results are written to another folder: for one that is read-only.

    The folder gets copies of what the page shows of the run: config, record and metrics, and of the
    grids that were found.

    Args:
        run: stays as it is.
        folder: created if it does not exist.

    Raises:
        UserError: the folder has another run or its results, or it can't be written to.
    """
    folder = Path(folder)
    if folder.resolve() == run.workdir.resolve():
        return run
    there = read_json(folder / workdirs.CONFIG)
    others: Any = there is not None and there != read_json(run.workdir / workdirs.CONFIG)
    if others or workdirs.checkpoint_steps(folder):
        raise UserError(f"{folder} has another run, or its results: choose another folder")
    make_writable(folder)
    for name in _OF_THE_RUN:
        if (run.workdir / name).is_file():
            shutil.copyfile(run.workdir / name, folder / name)
    if (run.workdir / "grids").is_dir():
        shutil.copytree(run.workdir / "grids", folder / "grids", dirs_exist_ok=True)
    return replace(run, workdir=folder)

"""A frozen teacher: the weights of another run, or of a file, that an objective learns from."""

from pathlib import Path
from typing import Any

from diffjax.errors import UserError
from diffjax.host.run_files import read_json
from diffjax.runs import workdirs
from diffjax.runs.initial import Initial, find_initial_weights
from diffjax.runs.parts import Parts
from diffjax.training.averages import Averages
from diffjax.training.state import FIRST_AVERAGE, LIVE, is_kept, teacher_name


def teacher_of(parts: Parts) -> str:
    """The name of the run's own weights that the objective learns from; `live` for a frozen one.

    Raises:
        UserError: an average that is not kept, or an objective without a teacher.
    """
    named = parts.config.teacher
    name = teacher_name(named, Averages.of(parts.config)) if is_kept(named) else LIVE
    if named != FIRST_AVERAGE and not parts.wired.objective.traits.has_teacher:
        raise UserError(
            f"config.teacher={named!r}: this objective learns from no teacher; leave it at "
            f"{FIRST_AVERAGE!r}"
        )
    return name


def find_teacher(parts: Parts) -> Initial | None:
    """Finds the frozen teacher of `config.teacher`, and compares its shapes with the network's.

        config.teacher = "runs/digits"              # the weights that this run is evaluated with
        config.teacher = "runs/digits:ema-0.999"    # or an average
        config.teacher = "weights.safetensors"      # or a file of torch.save

    Returns:
        What reads it; None where the teacher is one of the run's own weights.

    Raises:
        UserError: there is no such run or file, or its parameters are not those of this network.
    """
    named = parts.config.teacher
    if is_kept(named):
        return None
    return find_initial_weights(
        named, parts.abstract.weights(LIVE), "config.teacher", parts.denoiser
    )


def read_teacher(parts: Parts, workdir: Path) -> Any:
    """The parameters of the frozen teacher; None where the teacher is one of the run's own weights.

    The name of the weights goes into `run.json`; of a frozen teacher its folder or file, and its
    SHA-256.

    Raises:
        UserError: as `find_teacher`, or the teacher has changed since this run began.
    """
    found = find_teacher(parts)
    if found is None:
        workdirs.record(workdir, teacher={"weights": teacher_of(parts)})
        return None
    params, source = found()
    known = (read_json(workdir / workdirs.RUN) or {}).get("teacher", {})
    if known and known.get("sha256") != source["sha256"]:
        raise UserError(
            f"config.teacher={parts.config.teacher} has other weights than when this run began: "
            "bring the old ones back, or train in another --workdir"
        )
    workdirs.record(workdir, teacher=source)
    return params

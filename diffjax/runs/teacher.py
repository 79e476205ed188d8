"""A frozen teacher: the weights of another run, or of a file, that an objective learns from."""

from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from diffjax.config_upgrade import upgrade
from diffjax.errors import UserError
from diffjax.host.run_files import read_json
from diffjax.runs import workdirs
from diffjax.runs.initial import Initial, find_initial_weights, is_run, without
from diffjax.runs.parts import Parts
from diffjax.spec import TARGET
from diffjax.training.averages import Averages
from diffjax.training.state import FIRST_AVERAGE, LIVE, is_kept, teacher_name


def teacher_of(parts: Parts) -> str:
    """The name of the run's own weights that the objective learns from; `live` for a frozen one.

    Raises:
        UserError: an average that is not kept, an objective without a teacher, or one that distils
            another run and has none.
    """
    named, traits = parts.config.teacher, parts.wired.objective.traits
    if traits.distils and is_kept(named):
        raise UserError(
            f"config.teacher={named!r}: this objective distils a trained denoiser: name its run, "
            "as --config.teacher=runs/digits"
        )
    name = teacher_name(named, Averages.of(parts.config)) if is_kept(named) else LIVE
    if named != FIRST_AVERAGE and not traits.has_teacher:
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
        UserError: there is no such run or file, its parameters are not those of this network, or
            it is distilled and has another path or preconditioning.
    """
    named = parts.config.teacher
    if is_kept(named):
        return None
    if parts.wired.objective.traits.distils:
        _check_same_denoiser(named, parts)
    like, own_names = parts.abstract.weights(LIVE), parts.wired.own_names
    if parts.wired.objective.traits.guides_teacher:
        like = without(like, parts.wired.embedding_names)
    return find_initial_weights(named, like, "config.teacher", parts.denoiser, own_names)


def _check_same_denoiser(named: str, parts: Parts) -> None:
    """Refuses a run that is a denoiser on another path or with another preconditioning.

    Of a file nothing of the kind is known.
    """
    folder = next((each for each in (named, named.rpartition(":")[0]) if is_run(Path(each))), None)
    if folder is None:
        return
    theirs = ConfigDict(upgrade(read_json(Path(folder) / "config.json") or {}))
    ours = parts.config
    for part in ("path", "precond"):
        there = theirs.get(part)
        # Config dicts that are locked differ from those that are not.
        if there is None or there.to_dict() != ours[part].to_dict():
            raise UserError(
                f"config.teacher={named}: its config.{part} is {_short(there)}, this "
                f"run's {_short(ours[part])}: distil with the same, or train a teacher with these"
            )


def _short(part: Any) -> str:
    """A part of a config in one line, as `Precond(target=F(sigma_data=0.5), …)`."""
    if not isinstance(part, ConfigDict):
        return str(part)
    fields = ", ".join(f"{name}={_short(x)}" for name, x in part.items() if name != TARGET)
    return f"{str(part.get(TARGET, '')).rpartition(':')[2]}({fields})"


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

"""A trained run measured beside its samples, on held-out images: `probes.json` in its folder."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffjax.comparison.results import PROBES
from diffjax.data import DataSet, all_examples
from diffjax.errors import UserError
from diffjax.host.files import write_json
from diffjax.host.progress import progress
from diffjax.objectives.base import Progress
from diffjax.runs.load import Run, load
from diffjax.runs.measuring.results import elsewhere
from diffjax.runs.teacher import find_teacher, teacher_of
from diffjax.studies import probes
from diffjax.training.state import LIVE


def probe_run(
    workdir: Path,
    *,
    num_images: int = 256,
    seed: int = 0,
    data_path: str | None = None,
    out: str | Path | None = None,
    allowed_packages: Sequence[str] = ("diffjax",),
) -> Path:
    """Measures a trained run on held-out images and writes `probes.json` into its folder.

    Args:
        workdir: the folder of the run.
        num_images: the number of images of the test set, evenly spaced.
        seed: the seed of noise, log-SNRs and examples.
        data_path: where the data lie now, if they have moved.
        out: folder for the result, in the place of the run's own.
        allowed_packages: whose callables the saved config may name.

    Returns:
        the path of the file.

    Raises:
        UserError: no trained run there, or it has diverged.
    """
    with progress(f"probing {workdir}"):
        run = load(workdir, allowed_packages=tuple(allowed_packages))
        if out is not None:
            run = elsewhere(run, out)
        dataset = run.dataset(data_path)
        batch = all_examples(dataset.test, num_images)
        images, cond = batch["image"], run.parts.wired.condition.of_batch(batch)
        content = _provenance(run, dataset, len(images), seed) | probes.probe(
            _probed(run), images, cond, seed=seed
        )
    path = run.workdir / PROBES
    try:
        write_json(path, content)
    except OSError as error:
        raise UserError(f"can't write {path}: {error.strerror}") from error
    return path


def _probed(run: Run) -> probes.Probed:
    wired, state, frozen = run.parts.wired, run.state, find_teacher(run.parts)
    return probes.Probed(
        objective=wired.objective,
        apply=wired.apply,
        predict=run.model().predict() if not wired.objective.traits.needs_source else None,  # pyright: ignore[reportArgumentType]
        params=state.weights(LIVE),
        teacher_params=frozen()[0] if frozen else state.weights(teacher_of(run.parts)),
        progress=Progress(state.step, state.memory, run.config.num_steps),
        condition=wired.condition,
        condition_dropout=wired.condition_dropout,
    )


def _provenance(run: Run, dataset: DataSet, num_images: int, seed: int) -> dict[str, Any]:
    return {
        "step": run.step,
        "weights": run.config.weights,
        "data": dataset.name,
        "split": "test",
        "test_sha256": dataset.test.fingerprint(),
        "num_images": num_images,
        "seed": seed,
    }

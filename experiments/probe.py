r"""Measure a trained run beside its samples: loss by log-SNR, effective weight, gradient noise.

  python -m experiments.probe --workdir=runs/digits

On held-out images, the same for all runs, with the same noise. Writes probes.json into the run's
folder, from which experiments.report draws its plots.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from absl import flags

import diffjax
from diffjax.data import DataSet, all_images
from diffjax.errors import UserError
from diffjax.evaluation import probes
from diffjax.evaluation.sweep_files import PROBES
from diffjax.files import write_json
from diffjax.objectives.base import Progress
from diffjax.training.load import Run
from experiments import cli

FLAGS = flags.FlagValues()
flags.DEFINE_string("workdir", None, "folder of the run", flag_values=FLAGS)
flags.DEFINE_integer("num_images", 256, "of the test set", lower_bound=2, flag_values=FLAGS)
flags.DEFINE_integer("seed", 0, "of noise, log-SNRs and examples", flag_values=FLAGS)
flags.DEFINE_string("data_path", None, "where the data lie now, if moved", flag_values=FLAGS)
flags.DEFINE_list(
    "allowed_packages", [], "of your own, that the saved config may name", flag_values=FLAGS
)


def main(args: SimpleNamespace) -> None:
    """Measures the run and names the file."""
    cli.require(args, "workdir")
    allowed = ("diffjax", *args.allowed_packages)
    path = probe_run(
        Path(args.workdir),
        num_images=args.num_images,
        seed=args.seed,
        data_path=args.data_path,
        allowed_packages=allowed,
    )
    print(path)


def probe_run(
    workdir: Path,
    *,
    num_images: int = 256,
    seed: int = 0,
    data_path: str | None = None,
    allowed_packages: Sequence[str] = ("diffjax",),
) -> Path:
    """Measures a trained run on held-out images and writes `probes.json` into its folder.

    Args:
        workdir: of the run.
        num_images: of the test set, evenly spaced.
        seed: of noise, log-SNRs and examples.
        data_path: where the data lie now, if they have moved.
        allowed_packages: whose callables the saved config may name.

    Returns:
        the path of the file.

    Raises:
        UserError: no trained run there, or it has diverged.
    """
    run = diffjax.load(workdir, allowed_packages=tuple(allowed_packages))
    dataset = run.dataset(data_path)
    images, labels = all_images(dataset.test, num_images)
    content = _provenance(run, dataset, len(images), seed) | probes.probe(
        _probed(run), images, labels, seed=seed
    )
    path = Path(workdir) / PROBES
    try:
        write_json(path, content)
    except OSError as error:
        raise UserError(f"can't write {path}: {error.strerror}") from error
    return path


def _probed(run: Run) -> probes.Probed:
    wired, state = run.setup.wired, run.state
    return probes.Probed(
        objective=wired.objective,
        apply=wired.apply,
        predict=run.predict() if not wired.objective.needs_source else None,  # pyright: ignore[reportArgumentType]
        params=state.params,
        ema_params=next(iter(state.ema.values()), state.params),
        progress=Progress(state.step, state.memory),
        num_classes=wired.num_classes,
        label_dropout=wired.label_dropout,
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


USAGE = __doc__ or ""

if __name__ == "__main__":
    sys.exit(cli.run(main, FLAGS, usage=USAGE))

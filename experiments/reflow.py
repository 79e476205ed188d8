r"""Draw pairs of noise and sample from a trained run, to train the next run on (reflow).

  python -m experiments.reflow --workdir=runs/digits --num_pairs=20000 --out=pairs.npz
  python -m experiments.train --config=configs/digits_reflow.py --config.data.path=pairs.npz

Flags that are not set have the values of the run's config. The solver must be deterministic.
Paper: Liu et al. 2023 (arXiv:2209.03003).
"""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from absl import flags

import diffjax
from diffjax.errors import UserError
from diffjax.host.files import write_npz
from diffjax.host.progress import progress
from diffjax.host.storage import make_writable
from diffjax.host.watchdog import watched
from diffjax.runs.measuring.evaluated_samples import labels_in_mix, wanted_samples
from diffjax.runs.samples.model import Request
from diffjax.runs.samples.recipes import Chosen, named_recipe
from experiments.flags import cli, shared

FLAGS = flags.FlagValues()
flags.DEFINE_string("workdir", None, "folder of the run", flag_values=FLAGS)
cli.define_step(FLAGS)
flags.DEFINE_integer("num_pairs", 10_000, "number of pairs", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_string("out", "pairs.npz", "file to write", flag_values=FLAGS)
flags.DEFINE_integer("seed", 1, "seed of the noise", flag_values=FLAGS)
flags.DEFINE_string("solver", None, "name of the solver", flag_values=FLAGS)
flags.DEFINE_string("grid", None, "name of the time grid", flag_values=FLAGS)
flags.DEFINE_integer("num_steps", None, "solver steps", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_float("guidance_scale", None, "guidance scale; 1 is off", flag_values=FLAGS)
flags.DEFINE_string("weights", None, "live, or an average such as ema-0.999", flag_values=FLAGS)
flags.DEFINE_integer("batch_size", 500, "pairs at a time", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_string(
    "labels", None, "data (in its proportions), balanced, or classes in turn, as 3,7",
    flag_values=FLAGS,
)  # fmt: skip
flags.DEFINE_string("data_path", None, "where the data lie now, if moved", flag_values=FLAGS)
flags.DEFINE_list(
    "allowed_packages", [], "your packages that the saved config may name", flag_values=FLAGS
)
shared.define_watchdog(FLAGS)


def main(args: SimpleNamespace) -> None:
    """Draws pairs, saves them, and prints their recipe."""
    cli.require(args, "workdir")
    out = Path(args.out)
    if out.suffix != ".npz":
        raise UserError(f"--out={out} should end in .npz")
    allowed = ("diffjax", *args.allowed_packages)
    run = diffjax.load(args.workdir, step=args.step, weights=args.weights, allowed_packages=allowed)
    wired = run.parts.wired
    if wired.objective.traits.starts_at_source:
        raise UserError(f"{args.workdir} makes images from images; reflow pairs start from noise")
    make_writable(out.parent)  # Fails before the work, if it does.
    named = named_recipe(run, Chosen(args.solver, args.grid, args.num_steps, args.guidance_scale))
    recipe = named.recipe
    if recipe.solver.fresh_noise:
        raise UserError(
            f"{named.solver} adds noise during sampling, so its images are not determined by the "
            "noise at the start: use a deterministic solver, such as heun"
        )

    labels = labels_in_mix(run, args.num_pairs, args.labels, args.data_path)
    samples = wanted_samples(wired, lambda: run.dataset(args.data_path), labels)
    request, model = Request(samples.condition, args.seed), run.model(args.weights)
    with (
        watched(shared.watchdog(args), Path(args.workdir), what="batch") as begun,
        progress(f"drawing {args.num_pairs} pairs", args.num_pairs) as drawing,
    ):

        def begins(number: int) -> None:
            begun(number)
            drawing.at((number - 1) * args.batch_size)

        parts = model.latent_batches(recipe, request, args.batch_size, begins)
        images = np.concatenate([*parts])  # Latents, where the run has a codec.
    noise = request.noise(wired.image_shape)
    how = {
        "step": run.step,
        "weights": args.weights or run.config.weights,
        "solver": named.solver,
        "grid": named.grid,
        "num_steps": recipe.num_steps,
        "guidance_scale": recipe.guidance_scale,
        "seed": args.seed,
    }
    try:
        given = wired.condition.arrays(samples.condition)  # Without labels, which are there anyway.
        given = {name: rows for name, rows in given.items() if name not in ("label", "labels")}
        write_npz(out, image=images, source=noise, label=samples.labels, **given, **how)
    except OSError as error:
        raise UserError(f"can't write {out}: {error.strerror}") from error
    print(", ".join(f"{name}={value}" for name, value in how.items()))
    print(f"{len(images):,} pairs in {out}")


USAGE = f"""{__doc__}
Solvers:
{cli.describe_solvers()}"""

if __name__ == "__main__":
    sys.exit(cli.run(main, FLAGS, usage=USAGE))

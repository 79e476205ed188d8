r"""Edit images of the test set, or yours, with a trained model: no training, any solver.

  python -m experiments.edit --workdir=runs/digits --task=vary --strength=0.6
  python -m experiments.edit --workdir=runs/digits --task=inpaint --method=pseudoinverse
  python -m experiments.edit --workdir=runs/digits --task=upscale --factor=4 --method=posterior
  python -m experiments.edit --workdir=runs/digits --task=outpaint --method=repaint --solver=ddpm
  python -m experiments.edit --workdir=runs/digits --task=invert --num_steps=50 --solver=unipc
  python -m experiments.edit --pretrained=FOLDER --input=photo.png --prompts="a red apple" \
      --task=inpaint --mask=mask.png --out=apple.png

Writes a picture: for each image the original, the observation, and the result; of --input the
results alone. Beside it an .npz has the arrays: images (the results), original, observed and anew
(the mask).
Prints the root mean square difference between original and result, in units of [-1, 1].
"""

import sys
from pathlib import Path as File
from types import SimpleNamespace

import numpy as np
from absl import flags

from diffjax import choices
from diffjax.errors import UserError
from diffjax.host.files import write_npz
from diffjax.host.storage import make_writable
from diffjax.reports.pictures import save_png
from diffjax.runs.samples.condition_files import read
from diffjax.runs.samples.edits import METHODS, TASKS, How, unmasked
from experiments.flags import cli, published

FLAGS = flags.FlagValues()
flags.DEFINE_string("workdir", None, "folder of the run", flag_values=FLAGS)
published.define(FLAGS)
cli.define_step(FLAGS)
flags.DEFINE_list("input", None, "image files, in the place of test images", flag_values=FLAGS)
flags.DEFINE_list("labels", None, "with --input: what they are to show", flag_values=FLAGS)
flags.DEFINE_string("prompts", None, "the same: one text, or @FILE of texts", flag_values=FLAGS)
flags.DEFINE_string(
    "mask", None, "inpaint: image whose white part is made anew; else the lower half",
    flag_values=FLAGS,
)  # fmt: skip
flags.DEFINE_string("task", "vary", "one of the tasks above", flag_values=FLAGS)
flags.DEFINE_float(
    "strength", None, "share of the solver steps in (0, 1]: vary 0.6, inpaint and outpaint 1",
    flag_values=FLAGS,
)  # fmt: skip
flags.DEFINE_string(
    "method", None, "how samples are conditioned on the observation, one of the above",
    flag_values=FLAGS,
)  # fmt: skip
flags.DEFINE_integer(
    "factor", 2, "upscale: factor in each dimension", lower_bound=2, flag_values=FLAGS
)
flags.DEFINE_float("blur", 1.0, "deblur: standard deviation in pixels", flag_values=FLAGS)
flags.DEFINE_integer("jump", 5, "repaint: repeated steps", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer("times", 3, "repaint: number of repeats", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer("num_images", 10, "number of test images", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_string("solver", None, "name of the solver", flag_values=FLAGS)
flags.DEFINE_string("grid", None, "name of the time grid", flag_values=FLAGS)
flags.DEFINE_integer(
    "num_steps", None, "solver steps; 20, or of --pretrained its own", lower_bound=2,
    flag_values=FLAGS,
)  # fmt: skip
flags.DEFINE_float(
    "guidance_scale", None, "guidance scale; 1 (off), or of --pretrained its own",
    flag_values=FLAGS,
)  # fmt: skip
flags.DEFINE_string("guidance", None, "guidance rules, joined by +", flag_values=FLAGS)
flags.DEFINE_string("against", None, "weaker model of the guidance", flag_values=FLAGS)
flags.DEFINE_integer("seed", 0, "seed of the noise", flag_values=FLAGS)
flags.DEFINE_string("weights", None, "live, or an average such as ema-0.999", flag_values=FLAGS)
flags.DEFINE_string(
    "out", None, "the picture, with an .npz (WORKDIR/samples/TASK.png)", flag_values=FLAGS
)
flags.DEFINE_string("data_path", None, "new path of the data, if moved", flag_values=FLAGS)
flags.DEFINE_list(
    "allowed_packages", [], "your packages that the saved config may name", flag_values=FLAGS
)


def main(args: SimpleNamespace) -> None:
    """Edits images, saves the picture, and prints the root mean square difference."""
    _check(args)
    names = ("task", "strength", "method", "factor", "blur", "jump", "times")
    how = {name: getattr(args, name) for name in names}
    How(**how)  # which refuses before anything is loaded
    run = published.opened(args, args.weights)
    folder = run.workdir.with_suffix("") if run.workdir.is_file() else run.workdir
    out = File(args.out or folder / "samples" / f"{args.task}.png")
    make_writable(out.parent)
    shown = args.labels if args.prompts is None else [args.prompts]
    made = run.edit(
        args.input,
        None if shown is None else read(unmasked(run.parts.wired.condition), shown),
        mask=args.mask,
        num_images=args.num_images,
        solver=args.solver,
        grid=args.grid,
        num_steps=args.num_steps,
        guidance_scale=args.guidance_scale,
        guidance=args.guidance,
        against=args.against,
        seed=args.seed,
        weights=args.weights,
        data_path=args.data_path,
        **how,
    )
    arrays = {"original": made.original, "observed": made.observed, "images": made.images}
    rows = np.stack([*arrays.values()], axis=1)
    try:
        if args.input:
            save_png(out, made.images)
        else:
            save_png(out, rows.reshape(-1, *rows.shape[2:]), columns=15)
        more = {} if made.anew is None else {"anew": made.anew}
        write_npz(out.with_suffix(".npz"), **arrays, **more)
    except OSError as error:
        raise UserError(f"can't write {out}: {error.strerror}") from error
    print(f"{args.task}: root mean square difference from the image {made.difference:.4f}")
    what = "results" if args.input else "images with their originals and observations"
    print(f"{len(rows)} {what} in {out} and {out.with_suffix('.npz')}")


def _check(args: SimpleNamespace) -> None:
    """Refuses flags that do not go together, before anything is loaded."""
    if args.out is not None and File(args.out).suffix != ".png":
        raise UserError(
            f"--out={args.out} should end in .png; arrays are written next to it as .npz"
        )
    if args.mask is not None and args.task != "inpaint":
        raise UserError(f"--mask={args.mask} goes with --task=inpaint, not {args.task}")
    if args.pretrained is not None and not args.input:
        raise UserError("--input is missing: a published network has no test images to edit")
    if args.prompts is not None and args.labels is not None:
        raise UserError("--prompts and --labels are both given: leave one out")
    for name in ("prompts", "labels"):
        if getattr(args, name) is not None and not args.input:
            raise UserError(f"--{name} goes with --input: test images have their own conditions")
    for name in (*(args.input or ()), *([args.mask] if args.mask else ())):
        if not File(name).is_file():
            raise UserError(f"there is no image file {name}")


USAGE = f"""{__doc__}
Tasks: {", ".join(TASKS)}
Methods: {", ".join(METHODS)}; for inpaint and outpaint replace, repaint and fixed_noise as well
Solvers:
{cli.describe_solvers()}
Grids: {", ".join(choices.GRIDS)}
{cli.AGAINST}"""

if __name__ == "__main__":
    sys.exit(cli.run(main, FLAGS, usage=USAGE))

r"""Edit images of the test set, or yours, with a trained model: no training, any solver.

  python -m experiments.edit --workdir=runs/digits --task=vary --strength=0.6
  python -m experiments.edit --workdir=runs/digits --task=inpaint --method=pseudoinverse
  python -m experiments.edit --workdir=runs/digits --task=upscale --factor=4 --method=posterior
  python -m experiments.edit --workdir=runs/digits --task=outpaint --method=repaint --solver=ddpm
  python -m experiments.edit --workdir=runs/digits --task=invert --num_steps=50 --solver=unipc
  python -m experiments.edit --pretrained=FOLDER --input=photo.png --prompts="a red apple" \
      --task=inpaint --mask=mask.png --method=replace --out=apple.png

Writes a picture: for each image the original, the observation, and the result; of --input the
results alone.
Prints the root mean square difference between original and result, in units of [-1, 1].
"""

import sys
from dataclasses import replace
from pathlib import Path as File
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from absl import flags
from jax import Array

from diffjax import choices
from diffjax.conditions import Images
from diffjax.conditions.base import len_of
from diffjax.conditions.classes import Unconditional
from diffjax.data import all_examples
from diffjax.errors import UserError
from diffjax.process.paths import Path
from diffjax.reports.pictures import save_png
from diffjax.runs.condition_files import read
from diffjax.runs.load import Run
from diffjax.runs.model import Model, Request
from diffjax.runs.recipes import Chosen, named_recipe
from diffjax.sampling import editing
from diffjax.sampling.restart import resampled
from diffjax.sampling.sample import Recipe, sample
from diffjax.sampling.solvers import Denoise, Solver
from diffjax.spec import choose
from diffjax.wiring import check_recipe
from experiments import cli, published

FLAGS = flags.FlagValues()
flags.DEFINE_string("workdir", None, "folder of the run", flag_values=FLAGS)
published.define(FLAGS)
cli.define_step(FLAGS)
flags.DEFINE_list("input", None, "image files, in the place of test images", flag_values=FLAGS)
flags.DEFINE_string(
    "prompts", None, "with --input: a text or label, or @FILE of several", flag_values=FLAGS
)
flags.DEFINE_string(
    "mask", None, "inpaint: image whose white part is made anew; else the lower half",
    flag_values=FLAGS,
)  # fmt: skip
flags.DEFINE_string("task", "vary", "one of the tasks above", flag_values=FLAGS)
flags.DEFINE_float("strength", 0.6, "vary: share of the solver steps in (0, 1]", flag_values=FLAGS)
flags.DEFINE_string(
    "method", "pseudoinverse", "how samples are conditioned on the observation, one of the above",
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
flags.DEFINE_string("against", None, "weaker model of the guidance", flag_values=FLAGS)
flags.DEFINE_integer("seed", 0, "seed of the noise", flag_values=FLAGS)
flags.DEFINE_string("weights", None, "live, or an average such as ema-0.999", flag_values=FLAGS)
flags.DEFINE_string("out", None, "the picture (WORKDIR/samples/TASK.png)", flag_values=FLAGS)
flags.DEFINE_string("data_path", None, "new path of the data, if moved", flag_values=FLAGS)
flags.DEFINE_list(
    "allowed_packages", [], "your packages that the saved config may name", flag_values=FLAGS
)
METHODS = {
    "pseudoinverse": editing.pseudoinverse_guidance,
    "posterior": editing.posterior_sampling,
}


class Edit(NamedTuple):
    """Images to be edited, and what edits them.

    Attributes:
        model: of a run that makes samples from noise.
        recipe: solver, grid and guidance.
        request: as many samples as there are images, with their conditions.
        images: `[n, H, W, C]`; latents, of a run that has a codec.
        mask: `[H, W, 1]`, 1 where an image is known; None if nobody says where.
    """

    model: Model
    recipe: Recipe
    request: Request
    images: Array
    mask: Array | None = None

    def draw(self, model: Model | None = None, solver: Solver | None = None) -> Array:
        """Samples from noise, in one batch, by the model and the solver or by others.

        Raises:
            UserError: the model can't be sampled by this solver.
        """
        recipe = replace(self.recipe, solver=solver or self.recipe.solver)
        times = recipe.times(self.model.wired.path)
        return (model or self.model).walk(sample, recipe, self.request, times)

    def draw_given(self, method: str, seen: editing.Observed) -> Array:
        """Samples conditioned on the observation."""
        how, path = choose(METHODS, method, "method"), self.model.wired.path
        return self.draw(self.model.through(lambda predict: how(predict, path, seen)))


def main(args: SimpleNamespace) -> None:
    """Edits images, saves the picture, and prints the root mean square difference."""
    task = choose(TASKS, args.task, "task")
    _check(args)
    run = published.opened(args, args.weights)
    folder = run.workdir.with_suffix("") if run.workdir.is_file() else run.workdir
    out = File(args.out or folder / "samples" / f"{args.task}.png")
    if run.parts.wired.objective.traits.starts_at_source:
        raise UserError(f"{args.workdir} makes images from images; editing starts from noise")
    scale, num_steps = args.guidance_scale, args.num_steps
    if args.pretrained is None:
        scale, num_steps = 1.0 if scale is None else scale, num_steps or 20
    chosen = Chosen(args.solver, args.grid, num_steps, scale, against=args.against)
    recipe = named_recipe(run, chosen).recipe
    check_recipe(recipe, run.parts.wired)
    model = run.model(args.weights)
    images, condition = _of_files(args, model) if args.input else _of_test_set(args, run)
    mask = None if args.mask is None else _known(args.mask, model)
    request = Request(condition, args.seed)
    edit = Edit(model, recipe, request, jnp.asarray(images), mask)
    seen, made = task(args, edit)
    if not np.isfinite(made).all():
        raise UserError(
            f"the result of --task={args.task} is not finite: this solver can't integrate these "
            "times; use --solver=ddim, or --solver=rk4 with more steps"
        )
    shown = [edit.model.decoded(np.asarray(each)) for each in (images, seen, made)]
    rows = np.stack(shown, axis=1)
    try:
        if args.input:
            save_png(out, rows[:, 2])
        else:
            save_png(out, rows.reshape(-1, *rows.shape[2:]), columns=15)
    except OSError as error:
        raise UserError(f"can't write {out}: {error.strerror}") from error
    change = float(np.sqrt(np.mean((rows[:, 2] - rows[:, 0]) ** 2)))
    print(f"{args.task}: root mean square difference from the image {change:.4f}")
    if args.input:
        print(f"{len(images)} results: {out}")
    else:
        print(f"original, observation and result of {len(images)} images: {out}")


def _check(args: SimpleNamespace) -> None:
    """Refuses flags that do not go together, before anything is loaded."""
    if args.out is not None and File(args.out).suffix != ".png":
        raise UserError(f"--out={args.out} should end in .png")
    if args.mask is not None and args.task != "inpaint":
        raise UserError(f"--mask={args.mask} goes with --task=inpaint, not {args.task}")
    if args.pretrained is not None and not args.input:
        raise UserError("--input is missing: a published network has no test images to edit")
    if args.prompts is not None and not args.input:
        raise UserError("--prompts goes with --input: test images have conditions of their own")
    for name in (*(args.input or ()), *([args.mask] if args.mask else ())):
        if not File(name).is_file():
            raise UserError(f"there is no image file {name}")


def _of_test_set(args: SimpleNamespace, run: Run) -> tuple[np.ndarray, Any]:
    """Images, or latents, of the test set and their conditions."""
    batch = all_examples(run.dataset(args.data_path).test, args.num_images)
    return batch["image"], run.parts.wired.condition.of_batch(batch)


def _of_files(args: SimpleNamespace, model: Model) -> tuple[np.ndarray, Any]:
    """Images of files, encoded, and what they are to show; the fewer of both in turn."""
    wired = model.wired
    kind = wired.condition
    if args.prompts is not None:
        condition = read(kind, [args.prompts])
    elif isinstance(kind, Unconditional):
        condition = kind.null(len(args.input))
    else:
        raise UserError("--prompts is missing: what the image of --input is to show")
    shape = model.codec.image_shape(wired.image_shape)
    images = model.encoded(np.asarray(Images(shape).parse(args.input)))
    rows = np.arange(max(len(images), len_of(condition)))
    return images[rows % len(images)], kind.take(condition, rows % len_of(condition))


def _known(path: str, model: Model) -> Array:
    """Where nothing of an image is to be made anew: where it is not white, `[H, W, 1]`."""
    rows, columns, _ = model.wired.image_shape
    height, width, _ = model.codec.image_shape(model.wired.image_shape)
    white = np.asarray(Images((height, width, 1)).parse([path])) >= 0
    return editing.known_cells(white[0, ..., 0], rows, columns)


def vary(args: SimpleNamespace, edit: Edit) -> tuple[Array, Array]:
    """SDEdit: adds noise to images and samples from there (Meng et al. 2022)."""
    wired = edit.model.wired
    times = editing.later_times(edit.recipe.times(wired.path), args.strength)
    noise = edit.request.noise(wired.image_shape)
    begin = wired.path.alpha(times[0]) * edit.images + wired.objective.noise_scale(times[0]) * noise

    def walk_on(denoise: Denoise, solver: Solver, path: Path, times: Array, keys: Array, x: Array):
        del x  # which is noise alone
        return sample(denoise, solver, path, times, keys, begin)

    return begin, edit.model.walk(walk_on, edit.recipe, edit.request, times)


def inpaint(args: SimpleNamespace, edit: Edit) -> tuple[Array, Array]:
    """Generates the white part of a mask, or the lower half of images from the upper half."""
    if edit.mask is not None:
        return _complete(args, edit, edit.mask[None])
    height = edit.images.shape[1]
    mask = (jnp.arange(height) < height // 2).astype(jnp.float32)[None, :, None, None]
    return _complete(args, edit, mask)


def outpaint(args: SimpleNamespace, edit: Edit) -> tuple[Array, Array]:
    """Generates the border of images from their centre."""
    rows, columns = (abs(np.arange(n) + 0.5 - n / 2) < n / 4 for n in edit.images.shape[1:3])
    mask = jnp.asarray(rows[:, None] & columns, jnp.float32)[None, :, :, None]
    return _complete(args, edit, mask)


def _complete(args: SimpleNamespace, edit: Edit, mask: Array) -> tuple[Array, Array]:
    seen = mask * edit.images
    if args.method in METHODS:
        return seen, edit.draw_given(args.method, editing.Observed(lambda x: mask * x, seen))
    kept = editing.keep_known(edit.recipe.solver, edit.images, mask)
    solvers = {"replace": kept, "repaint": resampled(kept, args.jump, args.times)}
    solver = choose({**METHODS, **solvers}, args.method, "method")
    return seen, seen + (1.0 - mask) * edit.draw(solver=solver)


def _check_pixels(args: SimpleNamespace, edit: Edit) -> None:
    """Refuses a task on latents whose observation is one of pixels."""
    if not edit.model.codec.pixels:
        raise UserError(
            f"--task={args.task} observes pixels, and this run has latents (codec "
            f"{edit.model.codec.name}): take vary, inpaint, outpaint or invert"
        )


def upscale(args: SimpleNamespace, edit: Edit) -> tuple[Array, Array]:
    """Generates images from their means over squares of pixels."""
    _check_pixels(args, edit)
    k = args.factor
    batch, height, width, channels = edit.images.shape
    if height % k or width % k:
        raise UserError(f"--factor={k} does not divide images of {height}x{width}")

    def means(x: Array) -> Array:
        squares = x.reshape(batch, height // k, k, width // k, k, channels)
        return squares.mean(axis=(2, 4))

    seen = means(edit.images)
    made = edit.draw_given(args.method, editing.Observed(means, seen, gain=1.0 / k**2))
    return jnp.repeat(jnp.repeat(seen, k, axis=1), k, axis=2), made


def deblur(args: SimpleNamespace, edit: Edit) -> tuple[Array, Array]:
    """Generates images from their Gaussian blur."""
    _check_pixels(args, edit)
    if args.blur <= 0:
        raise UserError(f"--blur={args.blur:g} must be above 0: it is a width in pixels")
    seen = editing.blurred(edit.images, args.blur)
    return seen.y, edit.draw_given(args.method, seen)


def colour(args: SimpleNamespace, edit: Edit) -> tuple[Array, Array]:
    """Generates colours of images from their grey values."""
    _check_pixels(args, edit)
    channels = edit.images.shape[-1]
    if channels == 1:
        raise UserError("--task=colour needs a run on colour images; this run has one channel")

    def grey(x: Array) -> Array:
        return x.mean(axis=-1, keepdims=True)

    seen = editing.Observed(grey, grey(edit.images), gain=1.0 / channels)
    return jnp.repeat(seen.y, channels, -1), edit.draw_given(args.method, seen)


def invert(args: SimpleNamespace, edit: Edit) -> tuple[Array, Array]:
    """Inverts images to noise along the flow, and samples them again."""

    def there_and_back(
        denoise: Denoise, solver: Solver, path: Path, times: Array, keys: Array, x: Array
    ):
        del keys, x  # Neither solver nor start has noise.
        return editing.invert(denoise, solver, path, times, edit.images)

    times = edit.recipe.times(edit.model.wired.path)
    return edit.model.walk(there_and_back, edit.recipe, edit.request, times)


TASKS = {
    "vary": vary,
    "inpaint": inpaint,
    "outpaint": outpaint,
    "upscale": upscale,
    "deblur": deblur,
    "colour": colour,
    "invert": invert,
}
USAGE = f"""{__doc__}
Tasks: {", ".join(TASKS)}
Methods: {", ".join(METHODS)}; for inpaint and outpaint replace and repaint as well
Solvers:
{cli.describe_solvers()}
Grids: {", ".join(choices.GRIDS)}
{cli.AGAINST}"""

if __name__ == "__main__":
    sys.exit(cli.run(main, FLAGS, usage=USAGE))

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
from dataclasses import replace
from functools import partial
from pathlib import Path as File
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from absl import flags
from jax import Array

from diffjax import choices
from diffjax.codecs.base import scale_of
from diffjax.conditions import Condition, Images, MaskedImages, Several
from diffjax.conditions.base import len_of
from diffjax.conditions.classes import Unconditional
from diffjax.conditions.images import read_image
from diffjax.conditions.masked_images import NO_LATENT, nearest
from diffjax.data import all_examples
from diffjax.errors import UserError
from diffjax.host.files import write_npz
from diffjax.host.progress import progress
from diffjax.process.paths import Path
from diffjax.reports.pictures import save_png
from diffjax.runs.load import Run
from diffjax.runs.samples.condition_files import read
from diffjax.runs.samples.model import Model, Request
from diffjax.runs.samples.recipes import Chosen, named_recipe
from diffjax.sampling import editing
from diffjax.sampling.restart import resampled
from diffjax.sampling.sample import Recipe, sample
from diffjax.sampling.solvers import Denoise, Solver
from diffjax.spec import choose
from diffjax.wiring import check_recipe
from experiments.flags import cli, published

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
        anew: `[1, H, W, 1]`, 1 at the pixels that are to be made anew; None of tasks without.
    """

    model: Model
    recipe: Recipe
    request: Request
    images: Array
    anew: np.ndarray | None = None

    @property
    def noise(self) -> np.ndarray:
        """The standard normal noise that each sample is made from."""
        return self.request.noise(self.model.wired.image_shape)

    def begun(self, strength: float) -> tuple[Array, Array]:
        """The times of the last steps, and the images with the noise of the first of them."""
        wired = self.model.wired
        times = editing.later_times(self.recipe.times(wired.path), strength)
        a, s = wired.path.alpha(times[0]), wired.objective.noise_scale(times[0])
        return times, a * self.images + s * self.noise

    def draw_from(self, times: Array, begin: Array, solver: Solver | None = None) -> Array:
        """Samples from images with noise, in one batch."""
        recipe = replace(self.recipe, solver=solver or self.recipe.solver)
        return self.model.walk(sample, recipe, self.request, times, begin)

    def draw(self, strength: float | None = None, solver: Solver | None = None) -> Array:
        """Samples from noise, or by the last steps from images with noise, in one batch.

        Raises:
            UserError: the model can't be sampled by this solver.
        """
        if strength not in (None, 1.0):
            return self.draw_from(*self.begun(strength), solver)
        recipe = replace(self.recipe, solver=solver or self.recipe.solver)
        return self.model.walk(sample, recipe, self.request, recipe.times(self.model.wired.path))

    def draw_given(
        self, method: str | None, seen: editing.Observed, strength: float | None = None
    ) -> Array:
        """Samples conditioned on the observation."""
        how = choose(METHODS, method or "pseudoinverse", "method")
        path = self.model.wired.path
        model = self.model.through(lambda predict: how(predict, path, seen))
        return self._replace(model=model).draw(strength)


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
    if args.input:
        images, condition, anew = _of_files(args, model)
    else:
        images, condition = _of_test_set(args, run)
        anew = _anew(args, model.codec.image_shape(model.wired.image_shape))
    edit = Edit(model, recipe, Request(condition, args.seed), jnp.asarray(images), anew)
    with progress(f"editing {len(images)} images, {recipe.num_steps} steps"):
        seen, made = task(args, edit)
    if not np.isfinite(made).all():
        raise UserError(
            f"the result of --task={args.task} is not finite: this solver can't integrate these "
            "times; use --solver=ddim, or --solver=rk4 with more steps"
        )
    shown = [edit.model.decoded(np.asarray(each)) for each in (images, seen, made)]
    rows = np.stack(shown, axis=1)
    arrays = dict(zip(("original", "observed", "images"), shown, strict=True))
    arrays |= {} if anew is None else {"anew": anew}
    try:
        if args.input:
            save_png(out, rows[:, 2])
        else:
            save_png(out, rows.reshape(-1, *rows.shape[2:]), columns=15)
        write_npz(out.with_suffix(".npz"), **arrays)
    except OSError as error:
        raise UserError(f"can't write {out}: {error.strerror}") from error
    change = float(np.sqrt(np.mean((rows[:, 2] - rows[:, 0]) ** 2)))
    print(f"{args.task}: root mean square difference from the image {change:.4f}")
    what = "results" if args.input else "images with their originals and observations"
    print(f"{len(images)} {what} in {out} and {out.with_suffix('.npz')}")


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
    if args.prompts is not None and not args.input:
        raise UserError("--prompts goes with --input: test images have conditions of their own")
    for name in (*(args.input or ()), *([args.mask] if args.mask else ())):
        if not File(name).is_file():
            raise UserError(f"there is no image file {name}")


def _of_test_set(args: SimpleNamespace, run: Run) -> tuple[np.ndarray, Any]:
    """Images, or latents, of the test set and their conditions."""
    batch = all_examples(run.dataset(args.data_path).test, args.num_images)
    return batch["image"], run.parts.wired.condition.of_batch(batch)


def _of_files(args: SimpleNamespace, model: Model) -> tuple[np.ndarray, Any, np.ndarray | None]:
    """Images of files, encoded, what they are to show, the fewer of both in turn, and `_anew`."""
    pixels, anew = _pictures(args, model)
    kind, given = model.wired.condition, {}
    if (name := masked_part(kind)) is not None:
        assert isinstance(kind, Several)
        if anew is None:
            raise UserError(
                f"--task={args.task}: this network fills in what a mask hides; take inpaint or "
                "outpaint"
            )
        part: Any = kind.parts[name]
        seen = pixels if part.masks_latents else pixels * (1 - anew)
        given = {name: part.joined(model.encoded(seen), anew)}
        others = {n: part for n, part in kind.parts.items() if n != name}
        kind = replace(kind, parts=others, kept=tuple(n for n in kind.kept if n != name))
    if args.prompts is not None:
        condition = read(kind, [args.prompts])
    elif isinstance(kind, Unconditional):
        condition = kind.null(len(args.input))
    else:
        raise UserError("--prompts is missing: what the image of --input is to show")
    images = model.encoded(pixels)
    rows = np.arange(max(len(images), len_of(condition)))
    condition = kind.take(condition, rows % len_of(condition))
    given = {name: part[rows % len(images)] for name, part in given.items()}
    return images[rows % len(images)], {**condition, **given} if given else condition, anew


def masked_part(kind: Condition) -> str | None:
    """The name of the part of a condition that is an image with a mask; None without."""
    parts = kind.parts if isinstance(kind, Several) else {}
    return next((name for name, part in parts.items() if isinstance(part, MaskedImages)), None)


def _pictures(args: SimpleNamespace, model: Model) -> tuple[np.ndarray, np.ndarray | None]:
    """Images of files in [-1, 1], and `_anew`; for outpaint they may be smaller than samples."""
    shape = model.codec.image_shape(model.wired.image_shape)
    height, width, channels = shape
    rows, columns = height, width
    if args.task == "outpaint":
        rows, columns, _ = read_image(args.input[0], channels).shape
    if (rows, columns) == (height, width):
        return np.asarray(Images(shape).parse(args.input)), _anew(args, shape)
    if rows > height or columns > width:
        raise UserError(
            f"{args.input[0]} has {rows}x{columns} pixels: outpainting makes a border around "
            f"images that are smaller than {height}x{width}"
        )
    images = np.asarray(Images((rows, columns, channels)).parse(args.input))
    border = []
    squares = scale_of(model.codec, model.wired.image_shape)
    for side, part, square in zip((height, width), (rows, columns), squares, strict=True):
        before = (side - part) // 2 // square * square  # whole squares, one for a latent pixel
        border.append((before, side - part - before))
    anew = np.pad(np.zeros((1, rows, columns, 1)), ((0, 0), *border, (0, 0)), constant_values=1.0)
    return np.pad(images, ((0, 0), *border, (0, 0)), mode="edge"), anew


def _anew(args: SimpleNamespace, shape: tuple[int, int, int]) -> np.ndarray | None:
    """Which pixels are to be made anew, `[1, H, W, 1]`; None of a task without such.

    Those of a mask that are at least half as bright as white; without one, the lower half, or the
    border.
    """
    height, width, _ = shape
    if args.mask is not None:
        white = np.asarray(Images((height, width, 1)).parse([args.mask])) >= 0
        if not white.any():
            raise UserError(f"{args.mask} is black all over: its white part is what is made anew")
        return white.astype(np.float32)
    if args.task not in ("inpaint", "outpaint"):
        return None
    rows, columns = (np.arange(n) + 0.5 - n / 2 for n in (height, width))
    if args.task == "inpaint":
        white = np.broadcast_to(rows[:, None] >= 0, (height, width))
    else:
        white = (abs(rows)[:, None] >= height / 4) | (abs(columns) >= width / 4)
    return white.astype(np.float32)[None, :, :, None]


def vary(args: SimpleNamespace, edit: Edit) -> tuple[Array, Array]:
    """SDEdit: adds noise to images and samples from there (Meng et al. 2022)."""
    times, begin = edit.begun(0.6 if args.strength is None else args.strength)
    return begin, edit.draw_from(times, begin)


def complete(args: SimpleNamespace, edit: Edit) -> tuple[Array, Array]:
    """Inpainting and outpainting: generates what is to be made anew from the rest."""
    assert edit.anew is not None
    height, width = edit.images.shape[1:3]
    anew = jnp.asarray(nearest(edit.anew, (height, width)), jnp.float32)
    known, method = 1.0 - anew, args.method
    seen = known * edit.images
    if method is None and masked_part(edit.model.wired.condition) is not None:
        return seen, edit.draw(args.strength)  # The network sees what is known.
    if not anew.any():
        raise UserError(NO_LATENT)
    if method is None:
        method = "pseudoinverse" if args.pretrained is None else "fixed_noise"
    if method in METHODS:
        observed = editing.Observed(lambda x: known * x, seen)
        return seen, edit.draw_given(method, observed, args.strength)
    keep = partial(editing.keep_known, edit.recipe.solver, edit.images, known)
    solvers = {
        "replace": keep,
        "repaint": lambda: resampled(keep(), args.jump, args.times),
        "fixed_noise": lambda: keep(jnp.asarray(edit.noise)),
    }
    solver = choose({**METHODS, **solvers}, method, "method")()
    return seen, seen + anew * edit.draw(args.strength, solver)


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
    "inpaint": complete,
    "outpaint": complete,
    "upscale": upscale,
    "deblur": deblur,
    "colour": colour,
    "invert": invert,
}
USAGE = f"""{__doc__}
Tasks: {", ".join(TASKS)}
Methods: {", ".join(METHODS)}; for inpaint and outpaint replace, repaint and fixed_noise as well
Solvers:
{cli.describe_solvers()}
Grids: {", ".join(choices.GRIDS)}
{cli.AGAINST}"""

if __name__ == "__main__":
    sys.exit(cli.run(main, FLAGS, usage=USAGE))

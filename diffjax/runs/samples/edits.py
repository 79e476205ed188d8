"""Edits images with a model, without training: what `run.edit` and `experiments.edit` do."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from diffjax.codecs.base import scale_of
from diffjax.conditions import Condition, Images, MaskedImages, Several
from diffjax.conditions.base import len_of
from diffjax.conditions.classes import Unconditional
from diffjax.conditions.images import read_image
from diffjax.conditions.masked_images import NO_LATENT, nearest
from diffjax.data import all_examples
from diffjax.errors import UserError
from diffjax.host.progress import progress
from diffjax.process.paths import Path
from diffjax.runs.samples.drawing import conditions_of, one_condition
from diffjax.runs.samples.model import Model, Request
from diffjax.runs.samples.recipes import Chosen, named_recipe
from diffjax.sampling import editing
from diffjax.sampling.restart import resampled
from diffjax.sampling.sample import Recipe, sample
from diffjax.sampling.solvers import Denoise, Solver
from diffjax.settings import check_whole
from diffjax.spec import check_arguments, choose
from diffjax.wiring import check_recipe

if TYPE_CHECKING:  # `runs.load` imports this module.
    from diffjax.runs.load import Run

_WITHOUT_METHOD = ("vary", "invert")
LARGEST = 10.0
"""Values beyond it are no images in [-1, 1], which samples and noise leave by little."""
METHODS = {
    "pseudoinverse": editing.pseudoinverse_guidance,
    "posterior": editing.posterior_sampling,
}


@dataclass(frozen=True)
class How:
    """The numbers of a task.

    Attributes:
        task: its name, a key of `TASKS`.
        strength: share of the solver's steps in (0, 1]; None is 0.6 for `vary`, else 1.
        method: how samples are conditioned on the observation; None is that of the network.
        factor: the factor of `upscale`, in each dimension, from 2.
        blur: the blur of `deblur`, a standard deviation in pixels.
        jump: the number of steps that `repaint` repeats.
        times: the number of repeats in `repaint`.

    Raises:
        UserError: an unknown task, or a number out of range.
    """

    task: str = "vary"
    strength: float | None = None
    method: str | None = None
    factor: int = 2
    blur: float = 1.0
    jump: int = 5
    times: int = 3

    def __post_init__(self) -> None:
        check_arguments(How, **vars(self))
        choose(TASKS, self.task, "task")
        if self.method is not None and self.task in _WITHOUT_METHOD:
            raise UserError(f"method={self.method} goes with a measurement, not with {self.task}")
        for name, least in (("factor", 2), ("jump", 1), ("times", 1)):
            check_whole(name, getattr(self, name), least)
        if not self.blur > 0:
            raise UserError(f"blur={self.blur:g} must be above 0: it is a width in pixels")


class Originals(NamedTuple):
    """Images that are to be edited: given ones, or some of the test set.

    Attributes:
        images: `[n, H, W, C]`, see `pixels_of`; None are test images.
        condition: arrays with a row for each sample, of the parts that do not follow from the mask;
            of test images it is theirs.
        mask: the mask of inpaint, see `anew_of`.
        num_images: the number of images of the test set, evenly spaced.
        data_path: where the data lie now, if they have moved.
    """

    images: np.ndarray | None = None
    condition: Any = None
    mask: np.ndarray | None = None
    num_images: int = 10
    data_path: str | None = None


@dataclass(frozen=True, eq=False, repr=False)
class Edited:
    """Images that were edited, all `[n, H, W, C]` in [-1, 1].

    Attributes:
        images: the results.
        original: what was given.
        observed: what the model was given of it, such as the image without its masked part.
        anew: `[1, H, W, 1]`, 1 at the pixels that were made anew; None of tasks without a mask.
    """

    images: np.ndarray
    original: np.ndarray
    observed: np.ndarray
    anew: np.ndarray | None = None

    def __repr__(self) -> str:
        n, *shape = self.images.shape
        return f"Edited({n} of {'×'.join(map(str, shape))}, difference {self.difference:.4f})"

    @property
    def difference(self) -> float:
        """The root mean square of results less originals."""
        return float(np.sqrt(np.mean((self.images - self.original) ** 2)))


class Edit(NamedTuple):
    """Images to be edited, and what edits them.

    Attributes:
        model: the model of a run that makes samples from noise.
        recipe: solver, grid and guidance.
        request: as many samples as there are images, with their conditions.
        images: `[n, H, W, C]`; latents, of a run that has a codec.
        anew: `[1, H, W, 1]`, 1 at the pixels that are to be made anew; None of tasks without.
        own: whether the model was trained here, and is not a published one.
    """

    model: Model
    recipe: Recipe
    request: Request
    images: Array
    anew: np.ndarray | None = None
    own: bool = True

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
        guided = choose(METHODS, method or "pseudoinverse", "method")
        path = self.model.wired.path
        model = self.model.through(lambda predict: guided(predict, path, seen))
        return self._replace(model=model).draw(strength)


def edit_images(
    run: "Run",
    originals: Originals,
    how: How,
    chosen: Chosen = Chosen(),
    *,
    seed: int = 0,
    weights: str | None = None,
) -> Edited:
    """Edits images with a run or a published model, as `Run.edit` explains.

    Args:
        run: makes samples from noise.
        originals: the images and what they are to show.
        how: the task and its numbers.
        chosen: parts of the recipe.
        seed: the seed of the noise.
        weights: `live` or the name of an average.

    Raises:
        UserError: images or a mask of another size; a task, a method or a recipe that does not
            suit this model; a result that is not finite.
    """
    check_whole("num_images", originals.num_images, 1)
    if run.parts.wired.objective.traits.starts_at_source:
        raise UserError(f"{run.workdir} makes images from images; editing starts from noise")
    if originals.mask is not None and how.task != "inpaint":
        raise UserError(f"a mask goes with task=inpaint, not {how.task}")
    if run.trained_here:
        scale = 1.0 if chosen.guidance_scale is None else chosen.guidance_scale
        chosen = replace(chosen, guidance_scale=scale, num_steps=chosen.num_steps or 20)
    recipe = named_recipe(run, chosen).recipe
    check_recipe(recipe, run.parts.wired)
    model = run.model(weights)
    if originals.images is None:
        batch = all_examples(run.dataset(originals.data_path).test, originals.num_images)
        latents, condition = batch["image"], run.parts.wired.condition.of_batch(batch)
        shape = model.codec.image_shape(model.wired.image_shape)
        anew = anew_of(originals.mask, how.task, shape)
    else:
        latents, condition, anew = begun_with(model, originals, how.task)
    request = Request(condition, seed)
    edit = Edit(model, recipe, request, jnp.asarray(latents), anew, run.trained_here)
    with progress(f"editing {len(latents)} images, {recipe.num_steps} steps"):
        observed, made = TASKS[how.task](how, edit)
    if not np.isfinite(made).all():
        raise UserError(
            f"the result of task={how.task} is not finite: this solver can't integrate these "
            "times; use solver=ddim, or solver=rk4 with more steps"
        )
    result, original, seen = (model.decoded(np.asarray(x)) for x in (made, latents, observed))
    return Edited(result, original, seen, anew)


def shown(run: "Run", images: np.ndarray | None, named: dict[str, Any]) -> Any:
    """What given images are to show, by the one name that has a value; None of test images.

    Raises:
        UserError: none has a value though the model is conditioned, or several have.
    """
    given = any(value is not None for value in named.values())
    if images is None:
        if not run.trained_here:
            raise UserError("images= is missing: a published network has no test images to edit")
        if given:
            raise UserError("test images have conditions of their own: pass images= as well")
        return None
    kind = unmasked(run.parts.wired.condition)
    if not given and isinstance(kind, Unconditional):
        return kind.null(len(images))
    if not given:
        raise UserError("what the images are to show is missing: labels=3, or prompts=TEXT")
    condition = conditions_of(kind, one_condition(kind, named, None))
    if not len_of(condition):
        raise UserError("what the images are to show is an empty list: labels=3, or prompts=TEXT")
    return condition


def begun_with(
    model: Model, originals: Originals, task: str
) -> tuple[np.ndarray, Any, np.ndarray | None]:
    """Given images, encoded, what they are to show, the fewer of both in turn, and `anew_of`."""
    condition: Any = originals.condition
    pixels, anew = pixels_of(model, np.asarray(originals.images), task)
    if anew is None:
        anew = anew_of(originals.mask, task, pixels.shape[1:])
    kind, latents, given = model.wired.condition, model.encoded(pixels), {}
    if (name := masked_part(kind)) is not None:
        if anew is None:
            raise UserError(
                f"task={task}: this network fills in what a mask hides; take inpaint or outpaint"
            )
        part: Any = kind.parts[name]  # pyright: ignore[reportAttributeAccessIssue]
        seen = pixels if part.masks_latents else pixels * (1 - anew)
        given = {name: part.joined(model.encoded(seen), anew)}
    rows = np.arange(max(len(latents), len_of(condition)))
    condition = unmasked(kind).take(condition, rows % len_of(condition))
    given = {name: part[rows % len(latents)] for name, part in given.items()}
    return latents[rows % len(latents)], {**condition, **given} if given else condition, anew


def pixels_of(model: Model, images: np.ndarray, task: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Images in [-1, 1] in the size of samples, and the border that `outpaint` adds to get there.

    Args:
        model: makes samples of a size.
        images: `[n, H, W, C]` in [-1, 1], or uint8 from 0 to 255; of `outpaint` they may be smaller
            than samples.
        task: its name.

    Raises:
        UserError: they have another size.
    """
    height, width, channels = model.codec.image_shape(model.wired.image_shape)
    rows, columns = images.shape[1:3] if images.ndim == 4 else (height, width)
    if task != "outpaint" or (rows, columns) == (height, width):
        return _checked(model, images, (height, width, channels)), None
    if rows > height or columns > width:
        raise UserError(
            f"the image has {rows}x{columns} pixels: outpainting makes a border around images that "
            f"are smaller than {height}x{width}"
        )
    inside = _checked(model, images, (rows, columns, channels))
    border = []
    squares = scale_of(model.codec, model.wired.image_shape)
    for side, part, square in zip((height, width), (rows, columns), squares, strict=True):
        before = (side - part) // 2 // square * square  # whole squares, one for a latent pixel
        border.append((before, side - part - before))
    anew = np.pad(np.zeros((1, rows, columns, 1)), ((0, 0), *border, (0, 0)), constant_values=1.0)
    return np.pad(inside, ((0, 0), *border, (0, 0)), mode="edge"), anew


def _checked(model: Model, images: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Images `[n, H, W, C]` in [-1, 1], of such or of uint8.

    Raises:
        UserError: they have another shape, there are none, or they have other values.
    """
    size = "×".join(map(str, images.shape)) or "a single value"
    if images.dtype.kind not in "fiu" or images.shape[1:] != shape or not len(images):
        needed = "×".join(map(str, ("n", *shape)))
        raise UserError(
            f"images are an array of {needed} or names of files, not {size} of {images.dtype}"
        )
    scaled = images.dtype == np.uint8
    images = np.asarray(images, np.float32)
    images = images / 127.5 - 1.0 if scaled else images
    if not np.isfinite(images).all():
        raise UserError("the images have values that are not finite")
    if model.codec.bounded and abs(images).max() > LARGEST:
        raise UserError(
            f"the images have values from {images.min():g} to {images.max():g}: they are uint8 "
            "from 0 to 255, or in [-1, 1]"
        )
    return images


def images_in(model: Model, images: Any, task: str) -> np.ndarray | None:
    """Images as `pixels_of` takes them, read if they are names of files; None stays None.

    Raises:
        UserError: a file is no image, or has another size than samples; of `outpaint` all have that
            of the first.
    """
    if images is None or isinstance(images, np.ndarray | Array):
        return None if images is None else np.asarray(images)
    files = [images] if isinstance(images, str | os.PathLike) else images
    if not isinstance(files, Sequence) or not all(isinstance(x, str | os.PathLike) for x in files):
        return np.asarray(images)
    height, width, channels = model.codec.image_shape(model.wired.image_shape)
    if task == "outpaint" and files:
        height, width, _ = read_image(files[0], channels).shape
    if not files:
        raise UserError("images= is an empty list: name the files of one or several")
    return np.asarray(Images((height, width, channels)).parse(files))


def mask_in(model: Model, mask: Any) -> np.ndarray | None:
    """A mask as `anew_of` takes it; of a file it is what is at least half as bright as white.

    Raises:
        UserError: the file is no image, has another size, or is black all over.
    """
    if mask is None or not isinstance(mask, str | os.PathLike):
        return None if mask is None else np.asarray(mask)
    height, width, _ = model.codec.image_shape(model.wired.image_shape)
    white = np.asarray(Images((height, width, 1)).parse([mask])) >= 0
    if not white.any():
        raise UserError(f"{mask} is black all over: its white part is what is made anew")
    return white


def anew_of(mask: np.ndarray | None, task: str, shape: tuple[int, ...]) -> np.ndarray | None:
    """Which pixels are to be made anew, `[1, H, W, 1]`; None of a task without such.

    Args:
        mask: `[H, W]`, `[H, W, 1]` or `[1, H, W, 1]`, above 0 at these pixels; without one they are
            the lower half, or of `outpaint` the border.
        task: its name.
        shape: the shape of an image, `(H, W, C)`.

    Raises:
        UserError: the mask has another size, or nothing is above 0.
    """
    height, width = shape[:2]
    if mask is not None:
        if mask.size != height * width or (height, width) not in (mask.shape[:2], mask.shape[1:3]):
            size = "×".join(map(str, mask.shape))
            raise UserError(f"the mask is {size}, and {height}×{width} is needed")
        white = mask.reshape(1, height, width, 1) > 0
        if not white.any():
            raise UserError("the mask is 0 all over: pixels where it is above are made anew")
        return white.astype(np.float32)
    if task not in ("inpaint", "outpaint"):
        return None
    rows, columns = (np.arange(n) + 0.5 - n / 2 for n in (height, width))
    if task == "inpaint":
        white = np.broadcast_to(rows[:, None] >= 0, (height, width))
    else:
        white = (abs(rows)[:, None] >= height / 4) | (abs(columns) >= width / 4)
    return white.astype(np.float32)[None, :, :, None]


def masked_part(kind: Condition) -> str | None:
    """The name of the part of a condition that is an image with a mask; None without."""
    parts = kind.parts if isinstance(kind, Several) else {}
    return next((name for name, part in parts.items() if isinstance(part, MaskedImages)), None)


def unmasked(kind: Condition) -> Condition:
    """A condition without the part that follows from the image and the mask."""
    if (name := masked_part(kind)) is None:
        return kind
    assert isinstance(kind, Several)
    others = {n: part for n, part in kind.parts.items() if n != name}
    return replace(kind, parts=others, kept=tuple(n for n in kind.kept if n != name))


def vary(how: How, edit: Edit) -> tuple[Array, Array]:
    """SDEdit: adds noise to images and samples from there (Meng et al. 2022)."""
    times, begin = edit.begun(0.6 if how.strength is None else how.strength)
    return begin, edit.draw_from(times, begin)


def complete(how: How, edit: Edit) -> tuple[Array, Array]:
    """Inpainting and outpainting: generates what is to be made anew from the rest."""
    assert edit.anew is not None
    height, width = edit.images.shape[1:3]
    anew = jnp.asarray(nearest(edit.anew, (height, width)), jnp.float32)
    known, method = 1.0 - anew, how.method
    seen = known * edit.images
    if method is None and masked_part(edit.model.wired.condition) is not None:
        return seen, edit.draw(how.strength)  # The network sees what is known.
    if not anew.any():
        raise UserError(NO_LATENT)
    if method is None:
        method = "pseudoinverse" if edit.own else "fixed_noise"
    if method in METHODS:
        observed = editing.Observed(lambda x: known * x, seen)
        return seen, edit.draw_given(method, observed, how.strength)
    keep = partial(editing.keep_known, edit.recipe.solver, edit.images, known)
    solvers = {
        "replace": keep,
        "repaint": lambda: resampled(keep(), how.jump, how.times),
        "fixed_noise": lambda: keep(jnp.asarray(edit.noise)),
    }
    solver = choose({**METHODS, **solvers}, method, "method")()
    return seen, seen + anew * edit.draw(how.strength, solver)


def _check_pixels(how: How, edit: Edit) -> None:
    """Refuses a task on latents whose observation is one of pixels."""
    if not edit.model.codec.pixels:
        raise UserError(
            f"task={how.task} observes pixels, and this run has latents (codec "
            f"{edit.model.codec.name}): take vary, inpaint, outpaint or invert"
        )


def upscale(how: How, edit: Edit) -> tuple[Array, Array]:
    """Generates images from their means over squares of pixels."""
    _check_pixels(how, edit)
    k = how.factor
    batch, height, width, channels = edit.images.shape
    if height % k or width % k:
        raise UserError(f"factor={k} does not divide images of {height}x{width}")

    def means(x: Array) -> Array:
        squares = x.reshape(batch, height // k, k, width // k, k, channels)
        return squares.mean(axis=(2, 4))

    seen = means(edit.images)
    made = edit.draw_given(how.method, editing.Observed(means, seen, gain=1.0 / k**2))
    return jnp.repeat(jnp.repeat(seen, k, axis=1), k, axis=2), made


def deblur(how: How, edit: Edit) -> tuple[Array, Array]:
    """Generates images from their Gaussian blur."""
    _check_pixels(how, edit)
    seen = editing.blurred(edit.images, how.blur)
    return seen.y, edit.draw_given(how.method, seen)


def colour(how: How, edit: Edit) -> tuple[Array, Array]:
    """Generates colours of images from their grey values."""
    _check_pixels(how, edit)
    channels = edit.images.shape[-1]
    if channels == 1:
        raise UserError("task=colour needs a run on colour images; this run has one channel")

    def grey(x: Array) -> Array:
        return x.mean(axis=-1, keepdims=True)

    seen = editing.Observed(grey, grey(edit.images), gain=1.0 / channels)
    return jnp.repeat(seen.y, channels, -1), edit.draw_given(how.method, seen)


def invert(how: How, edit: Edit) -> tuple[Array, Array]:
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

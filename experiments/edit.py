r"""Edit images of the test set with a trained model: no training, any solver.

  python -m experiments.edit --workdir=runs/digits --task=vary --strength=0.6
  python -m experiments.edit --workdir=runs/digits --task=inpaint --method=pseudoinverse
  python -m experiments.edit --workdir=runs/digits --task=upscale --factor=4 --method=posterior
  python -m experiments.edit --workdir=runs/digits --task=outpaint --method=repaint --solver=ddpm
  python -m experiments.edit --workdir=runs/digits --task=invert --num_steps=50 --solver=unipc

Writes a picture: for each image what it was, what the model saw of it, and what it made of that.
Prints the root mean square difference between the first and the last, in units of [-1, 1].
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax import Array

import diffjax
from diffjax import choices
from diffjax.compiling import jit
from diffjax.data import all_images
from diffjax.errors import UserError
from diffjax.process.paths import Pair
from diffjax.process.precond import Predict
from diffjax.reports.pictures import save_png
from diffjax.runs.generate import sample_keys
from diffjax.runs.recipes import Guided, named_recipe
from diffjax.sampling import editing
from diffjax.sampling.guidance import guide
from diffjax.sampling.restart import resampled
from diffjax.sampling.sample import Recipe, draw, sample
from diffjax.sampling.solvers import Solver, normal
from diffjax.spec import choose
from diffjax.wiring import Wired, check_recipe
from experiments import cli

FLAGS = flags.FlagValues()
flags.DEFINE_string("workdir", None, "folder of the run", flag_values=FLAGS)
flags.DEFINE_string("task", "vary", "one of those below", flag_values=FLAGS)
flags.DEFINE_float("strength", 0.6, "vary: share of the steps walked", flag_values=FLAGS)
flags.DEFINE_string(
    "method", "pseudoinverse", "how what is known is heeded: one of those below", flag_values=FLAGS
)
flags.DEFINE_integer("factor", 2, "upscale: by how much", lower_bound=2, flag_values=FLAGS)
flags.DEFINE_float("blur", 1.0, "deblur: standard deviation in pixels", flag_values=FLAGS)
flags.DEFINE_integer("jump", 5, "repaint: steps walked again", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer("times", 3, "repaint: how often", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer("num_images", 10, "of the test set", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_string("solver", None, "how to step", flag_values=FLAGS)
flags.DEFINE_string("grid", None, "where to step", flag_values=FLAGS)
flags.DEFINE_integer("num_steps", 20, "steps", lower_bound=2, flag_values=FLAGS)
flags.DEFINE_float("guidance_scale", 1.0, "1 is off", flag_values=FLAGS)
flags.DEFINE_integer("seed", 0, "of the noise", flag_values=FLAGS)
flags.DEFINE_string("weights", None, "live, or an average such as ema-0.999", flag_values=FLAGS)
flags.DEFINE_string("out", None, "the picture (WORKDIR/samples/TASK.png)", flag_values=FLAGS)
flags.DEFINE_string("data_path", None, "where the data lie now, if moved", flag_values=FLAGS)
flags.DEFINE_list(
    "allowed_packages", [], "of your own, that the saved config may name", flag_values=FLAGS
)
METHODS = {
    "pseudoinverse": editing.pseudoinverse_guidance,
    "posterior": editing.posterior_sampling,
}


class Model(NamedTuple):
    """A model and how it is to be asked."""

    predict: Predict
    wired: Wired
    recipe: Recipe
    times: Array
    labels: Array

    def denoise(self, predict: Predict | None = None) -> Callable[[Array, Array], Pair]:
        """The model, or another predictor, with the labels bound."""
        ask = predict or self.predict
        return lambda x, t: ask(x, jnp.broadcast_to(t, (len(x), *t.shape)), self.labels)

    def draw(self, solver: Solver, predict: Predict | None, keys: Array) -> Array:
        """Samples from noise.

        Raises:
            UserError: the model can't be sampled by this solver.
        """
        wired, recipe = self.wired, replace(self.recipe, solver=solver)
        check_recipe(recipe, wired)
        walk = partial(
            draw,
            predict or self.predict,
            wired.path,
            solver,
            recipe.times(wired.path),
            labels=self.labels,
            shape=wired.image_shape,
            start=partial(wired.objective.start, source=None),
        )
        return jit(walk)(keys)

    def draw_given(self, method: str, seen: editing.Observed, keys: Array) -> Array:
        """Samples given what was seen of them."""
        how = choose(METHODS, method, "method")
        predict = how(self.predict, self.wired.path, seen)
        return self.draw(self.recipe.solver, predict, keys)


def main(args: SimpleNamespace) -> None:
    """Edits, saves the picture, and says how much changed."""
    cli.require(args, "workdir")
    task = choose(TASKS, args.task, "task")
    out = Path(args.out or Path(args.workdir) / "samples" / f"{args.task}.png")
    if out.suffix != ".png":
        raise UserError(f"--out={out} should end in .png")
    allowed = ("diffjax", *args.allowed_packages)
    run = diffjax.load(args.workdir, weights=args.weights, allowed_packages=allowed)
    wired = run.setup.wired
    if wired.objective.starts_at_source:
        raise UserError(f"{args.workdir} makes images from images; editing starts from noise")
    recipe = named_recipe(
        run, args.solver, args.grid, args.num_steps, Guided(args.guidance_scale)
    ).recipe
    check_recipe(recipe, wired)
    images, labels = all_images(run.dataset(args.data_path).test, args.num_images)
    scale = None if recipe.guidance_scale == 1.0 else recipe.guidance_scale
    weaker = run.weaker(recipe)
    models = wired.models(
        run.weights(args.weights), None, weaker and weaker.model(weaker.params, None)
    )
    model = Model(
        guide(models, wired.path, recipe.guidance, scale, recipe.against),
        wired,
        recipe,
        recipe.times(wired.path),
        jnp.asarray(labels),
    )
    keys = sample_keys(args.seed, np.arange(len(images)))
    seen, made = task(args, model, jnp.asarray(images), keys)
    if not np.isfinite(made).all():
        raise UserError(
            f"the result of --task={args.task} is not finite: this solver can't walk these times; "
            "take --solver=ddim, or --solver=rk4 with more steps"
        )
    rows = np.stack([images, np.asarray(seen), np.asarray(made)], axis=1)
    try:
        save_png(out, rows.reshape(-1, *images.shape[1:]), columns=15)
    except OSError as error:
        raise UserError(f"can't write {out}: {error.strerror}") from error
    change = float(np.sqrt(np.mean((rows[:, 2] - rows[:, 0]) ** 2)))
    print(f"{args.task}: root mean square difference from the image {change:.4f}")
    print(f"image, what was seen, what was made of it, for {len(images)} images: {out}")


def vary(args: SimpleNamespace, model: Model, images: Array, keys: Array) -> tuple[Array, Array]:
    """SDEdit: noise on top, and from there down."""
    times = editing.later_times(model.times, args.strength)
    path = model.wired.path
    both = jax.vmap(jax.random.split)(keys)
    noise = normal(both[:, 0], model.wired.image_shape)
    start = path.alpha(times[0]) * images + model.wired.objective.noise_scale(times[0]) * noise
    walk = jit(lambda x, keys: sample(model.denoise(), model.recipe.solver, path, times, keys, x))
    return start, walk(start, both[:, 1])


def inpaint(args: SimpleNamespace, model: Model, images: Array, keys: Array) -> tuple[Array, Array]:
    """The lower half is made, the upper one is known."""
    height = images.shape[1]
    mask = (jnp.arange(height) < height // 2).astype(jnp.float32)[None, :, None, None]
    return _complete(args, model, images, mask, keys)


def outpaint(
    args: SimpleNamespace, model: Model, images: Array, keys: Array
) -> tuple[Array, Array]:
    """The middle is known, what is around it is made."""
    rows, columns = (abs(np.arange(n) + 0.5 - n / 2) < n / 4 for n in images.shape[1:3])
    mask = jnp.asarray(rows[:, None] & columns, jnp.float32)[None, :, :, None]
    return _complete(args, model, images, mask, keys)


def _complete(
    args: SimpleNamespace, model: Model, images: Array, mask: Array, keys: Array
) -> tuple[Array, Array]:
    seen = mask * images
    if args.method in METHODS:
        observed = editing.Observed(lambda x: mask * x, seen)
        return seen, model.draw_given(args.method, observed, keys)
    kept = editing.keep_known(model.recipe.solver, images, mask)
    solvers = {"replace": kept, "repaint": resampled(kept, args.jump, args.times)}
    solver = choose({**METHODS, **solvers}, args.method, "method")
    made = model.draw(solver, None, keys)
    return seen, mask * images + (1.0 - mask) * made


def upscale(args: SimpleNamespace, model: Model, images: Array, keys: Array) -> tuple[Array, Array]:
    """Means over squares of pixels are known."""
    k = args.factor
    batch, height, width, channels = images.shape
    if height % k or width % k:
        raise UserError(f"--factor={k} does not divide images of {height}x{width}")

    def means(x: Array) -> Array:
        squares = x.reshape(batch, height // k, k, width // k, k, channels)
        return squares.mean(axis=(2, 4))

    seen = means(images)
    made = model.draw_given(args.method, editing.Observed(means, seen, gain=1.0 / k**2), keys)
    return jnp.repeat(jnp.repeat(seen, k, axis=1), k, axis=2), made


def deblur(args: SimpleNamespace, model: Model, images: Array, keys: Array) -> tuple[Array, Array]:
    """Images through a Gaussian blur are known."""
    if args.blur <= 0:
        raise UserError(f"--blur={args.blur:g} must be above 0: it is a width in pixels")
    seen = editing.blurred(images, args.blur)
    return seen.y, model.draw_given(args.method, seen, keys)


def colour(args: SimpleNamespace, model: Model, images: Array, keys: Array) -> tuple[Array, Array]:
    """The mean over the colours is known."""
    channels = images.shape[-1]
    if channels == 1:
        raise UserError("--task=colour needs a run on colour images; this one's have one channel")

    def grey(x: Array) -> Array:
        return x.mean(axis=-1, keepdims=True)

    seen = editing.Observed(grey, grey(images), gain=1.0 / channels)
    return jnp.repeat(seen.y, channels, -1), model.draw_given(args.method, seen, keys)


def invert(args: SimpleNamespace, model: Model, images: Array, keys: Array) -> tuple[Array, Array]:
    """To the noise that the flow makes of an image, and back."""
    path, solver = model.wired.path, model.recipe.solver
    noise, again = jit(lambda x: editing.invert(model.denoise(), solver, path, model.times, x))(
        images
    )
    return noise, again


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
Grids: {", ".join(choices.GRIDS)}"""

if __name__ == "__main__":
    sys.exit(cli.run(main, FLAGS, usage=USAGE))

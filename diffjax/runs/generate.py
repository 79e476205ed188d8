"""Many samples from one model, batch by batch over the mesh."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from diffjax.compiling import jit
from diffjax.errors import UserError, nearest
from diffjax.host.processes import to_host
from diffjax.process.precond import Predict
from diffjax.sampling.grids import Power
from diffjax.sampling.guidance import guide
from diffjax.sampling.parallel import Parallel, sample_in_parallel
from diffjax.sampling.sample import (
    Recipe,
    Trace,
    count_padded,
    draw,
    padded,
    sample_padded,
    trace,
)
from diffjax.sampling.solvers import normal
from diffjax.training.sharding import batch_sharding, replicated, spread
from diffjax.wiring import Wired, check_recipe


class Weaker(NamedTuple):
    """Another model on the same path, to guide away from.

    Attributes:
        model: `(params, source) -> Predict`; one object for many calls, or each call compiles.
        params: its parameters.
    """

    model: Callable[[Any, Array | None], Predict]
    params: Any


class Generate(Protocol):
    """Draws samples `[n, H, W, C]`."""

    def __call__(
        self,
        params: Any,
        recipe: Recipe,
        labels: np.ndarray,
        seed: int,
        source: np.ndarray | None = None,
        weaker: Weaker | None = None,
        first: int = 0,
    ) -> np.ndarray:
        """One image for each of `labels[n]`, made from `source[n, H, W, C]` where there is one:
        those of numbers `first` to `first + n - 1`.
        """
        ...


class Asked(NamedTuple):
    """Samples that somebody asked for.

    Attributes:
        wired: the model.
        params: its parameters.
        recipe: how to draw.
        labels: `[n]`.
        seed: of the noise.
        source: `[n, H, W, C]`, where samples are made from one.
        weaker: the model to guide away from, where the recipe names one.
        rows: `[n]`, the samples' numbers; from 0 on by default.
    """

    wired: Wired
    params: Any
    recipe: Recipe
    labels: np.ndarray
    seed: int
    source: np.ndarray | None = None
    weaker: Weaker | None = None
    rows: np.ndarray | None = None

    def only(self, rows: np.ndarray) -> "Asked":
        """Those of these numbers."""
        source = None if self.source is None else self.source[rows]
        numbers = rows if self.rows is None else self.rows[rows]
        return self._replace(labels=self.labels[rows], source=source, rows=numbers)

    def batches(self, batch_size: int) -> "Iterator[Asked]":
        """All of them, so many at a time."""
        for first in range(0, len(self.labels), batch_size):
            yield self.only(np.arange(first, min(first + batch_size, len(self.labels))))

    def drawn_by(self, generate: Generate) -> np.ndarray:
        """The samples, whose numbers follow one another."""
        first = 0 if self.rows is None or not len(self.rows) else int(self.rows[0])
        return generate(
            self.params,
            self.recipe,
            self.labels,
            self.seed,
            source=self.source,
            weaker=self.weaker,
            first=first,
        )


def make_generator(
    wired: Wired,
    mesh: Mesh,
    *,
    batch_size: int,
) -> Generate:
    """A function that draws any number of samples.

    Sample i depends on the seed, on i and on its label, not on the batch or the mesh. Another
    number of samples, seed or guidance scale does not recompile.

    Args:
        wired: the model.
        mesh: the devices.
        batch_size: samples at a time; rounded up to what the mesh divides.
    """
    batch_size = full_batch(batch_size, mesh)

    draw_batch = jit(
        partial(_draw, wired, sample_padded),
        mesh,
        static_argnames=("recipe", "weaker_model"),
        out_shardings=replicated(mesh),
    )

    def generate(
        params: Any,
        recipe: Recipe,
        labels: np.ndarray,
        seed: int,
        source: np.ndarray | None = None,
        weaker: Weaker | None = None,
        first: int = 0,
    ) -> np.ndarray:
        check_recipe(recipe, wired)
        check_labels(labels, wired)
        check_source(source, len(labels), wired)
        shared = _shared(wired, recipe, weaker)
        times = padded(recipe.times(wired.path))
        place = batch_sharding(mesh)
        images = []
        for start in range(0, len(labels), batch_size):
            # The last batch is filled up, so that every batch has the shape that was compiled.
            rows_here = np.arange(start, start + batch_size)
            kept = np.minimum(rows_here, len(labels) - 1)
            arguments = (
                sample_keys(seed, first + rows_here),
                np.asarray(labels, np.int32)[kept],
                None if source is None else np.asarray(source, np.float32)[kept],
            )
            batch = draw_batch(params, times, *spread(arguments, place), **shared)
            images.append(to_host(batch)[: len(labels) - start])
        return np.concatenate(images) if images else np.zeros((0, *wired.image_shape), np.float32)

    return generate


def lower_sampler(wired: Wired, mesh: Mesh, params: Any, batch_size: int) -> jax.stages.Lowered:
    """The program with which `make_generator` draws a batch by the run's recipe, to be compiled.

    Args:
        wired: the model.
        mesh: the devices; they need not be there.
        params: shapes with shardings.
        batch_size: samples at a time.

    Raises:
        UserError: the recipe needs another model's weights.
    """
    recipe, place = wired.recipe, batch_sharding(mesh)
    shared = _shared(wired, recipe, None)
    if shared["scale"] is not None:
        shared["scale"] = jax.ShapeDtypeStruct((), jnp.float32, sharding=replicated(mesh))

    def rows(of: Any) -> Any:
        return jax.ShapeDtypeStruct((batch_size, *of.shape), of.dtype, sharding=place)

    times = jax.eval_shape(lambda: padded(recipe.times(wired.path)))
    return jit(
        partial(_draw, wired, sample_padded),
        mesh,
        static_argnames=("recipe", "weaker_model"),
        out_shardings=replicated(mesh),
    ).lower(
        params,
        jax.ShapeDtypeStruct(times.shape, times.dtype, sharding=replicated(mesh)),
        rows(jax.eval_shape(lambda: jax.random.key(0))),
        rows(jax.ShapeDtypeStruct((), jnp.int32)),
        rows(jax.ShapeDtypeStruct(wired.image_shape, jnp.float32))
        if wired.objective.starts_at_source
        else None,
        **shared,
    )


def full_batch(batch_size: int, mesh: Mesh) -> int:
    """A batch size, rounded up to what the mesh divides."""
    rows = mesh.shape["data"] * mesh.shape["fsdp"]
    return -(-batch_size // rows) * rows


def trace_samples(asked: Asked) -> Trace:
    """How samples come about, from noise to data, all in one batch; those that `generate` draws."""
    return _in_one_batch(asked, trace, asked.recipe.times(asked.wired.path))


def samples_in_parallel(asked: Asked, window: int, tolerance: float, mesh: Mesh) -> Parallel:
    """The samples that `generate` draws, within a tolerance, in fewer rounds; all in one batch.

    The steps of a window are spread over the mesh where they divide.
    """
    rows = mesh.shape["data"] * mesh.shape["fsdp"]
    place = batch_sharding(mesh) if window % rows == 0 else None
    if place is not None:  # The devices are taken, by the steps.
        apply = inspect.unwrap(asked.wired.apply)
        asked = asked._replace(wired=asked.wired._replace(apply=apply))
    walk = partial(sample_in_parallel, window=window, tolerance=tolerance, place=place)
    return _in_one_batch(asked, walk, asked.recipe.times(asked.wired.path))


def evaluations(asked: Asked) -> int:
    """Network evaluations per sample: what the recipe declares, or counted where it can't know.

    They are counted for these samples as one batch.
    """
    if asked.recipe.nfe is not None:
        return asked.recipe.nfe
    times = padded(asked.recipe.times(asked.wired.path))
    return int(_in_one_batch(asked, count_padded, times)) * asked.recipe.calls


def _in_one_batch(asked: Asked, walk: Callable[..., Any], times: Array) -> Any:
    return to_host(make_walker(asked.wired, walk)(asked, times))


def make_walker(wired: Wired, walk: Callable[..., Any]) -> Callable[[Asked, Array], Any]:
    """`(asked, times) -> ` what a walk gives, compiled once for many calls, each of them one batch.

    Args:
        wired: the model.
        walk: what is made of model, solver, path, times, keys and noise; as `sample` or `trace`.
    """
    compiled = jit(partial(_draw, wired, walk), static_argnames=("recipe", "weaker_model"))

    def walk_batch(asked: Asked, times: Array) -> Any:
        labels, source = asked.labels, asked.source
        check_recipe(asked.recipe, wired)
        check_labels(labels, wired)
        check_source(source, len(labels), wired)
        return compiled(
            asked.params,
            times,
            sample_keys(asked.seed, np.arange(len(labels)) if asked.rows is None else asked.rows),
            jnp.asarray(labels, jnp.int32),
            None if source is None else jnp.asarray(source, jnp.float32),
            **_shared(wired, asked.recipe, asked.weaker),
        )

    return walk_batch


def _shared(wired: Wired, recipe: Recipe, weaker: Weaker | None) -> dict[str, Any]:
    """The arguments of `_draw` that are the same for all batches."""
    if recipe.against.weights and recipe.calls > 1 and weaker is None:
        raise UserError(
            f"guidance against other weights ({recipe.against.weights}) needs them: give weaker="
        )
    return {
        "scale": None if recipe.calls == 1 else jnp.float32(recipe.guidance_scale),
        # Steps, grid and scale are not part of the program.
        "recipe": replace(recipe, num_steps=1, grid=Power(), guidance_scale=1.0),
        "weaker_model": None if weaker is None else weaker.model,
        "weaker_params": None if weaker is None else weaker.params,
    }


def check_finite(images: np.ndarray, asked: Asked) -> None:
    """Refuses samples that are not numbers, and finds the step at which that began.

    Raises:
        UserError: some are not finite.
    """
    bad = np.flatnonzero(~np.isfinite(images).all(axis=(1, 2, 3)))
    if not len(bad):
        return
    traced = trace_samples(asked.only(bad[:1]))
    broken = [not np.isfinite(x).all() for x in np.asarray(traced.x)]
    last = len(traced.times) - 1
    step = broken.index(True) if True in broken else last
    before, after = (float(traced.times[max(i, 0)]) for i in (step - 1, step))
    number = bad[0] if asked.rows is None else asked.rows[bad[0]]
    raise UserError(
        f"{len(bad)} of {len(images)} samples are not finite; number {number} from step {step} of "
        f"{last} on (t={before:.4g} to {after:.4g}): the weights are not, or this "
        "solver can't walk this grid"
    )


def _draw(
    wired: Wired,
    walk: Callable[..., Any],
    params: Any,
    times: Array,
    keys: Array,
    labels: Array,
    source: Array | None,
    *,
    scale: Array | None,
    recipe: Recipe,
    weaker_model: Callable[..., Predict] | None,
    weaker_params: Any,
) -> Any:
    weaker = None if weaker_model is None else weaker_model(weaker_params, source)
    models = wired.models(params, source, weaker)
    return draw(
        guide(models, wired.path, recipe.guidance, scale, recipe.against),
        wired.path,
        recipe.solver,
        times,
        keys,
        labels,
        wired.image_shape,
        start=partial(wired.objective.start, source=source),
        walk=walk,
    )


def check_labels(labels: np.ndarray, wired: Wired) -> None:
    """Refuses numbers that are neither labels nor the null label, `num_classes`: they give NaN."""
    null = wired.num_classes
    wrong = [label for label in np.unique(labels).tolist() if not 0 <= label <= null]
    if null and wrong:
        raise UserError(f"there is no label {wrong[0]}: this run has {null}, from 0 to {null - 1}")


def check_source(source: np.ndarray | None, n: int, wired: Wired) -> None:
    """Refuses a source that the model has no use for, and none where it starts from one."""
    name = type(wired.objective).__name__
    if not wired.objective.starts_at_source:
        if source is not None:
            raise UserError(f"{name} makes samples from noise: leave source= out")
        return
    if source is None:
        raise UserError(f"this run goes from one image to another ({name}): give it source=images")
    if np.shape(source) != (n, *wired.image_shape):
        raise UserError(
            f"source has shape {np.shape(source)}; {n} labels on this run need "
            f"{(n, *wired.image_shape)}"
        )


def sample_keys(seed: int | Array, rows: np.ndarray | Array) -> Array:
    """The key of each sample, `[n]`: of the seed and the sample's number alone."""
    return jax.vmap(partial(jax.random.fold_in, jax.random.key(seed)))(rows)


def starting_noise(seed: int, rows: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The standard normal noise from which `generate` makes the samples of these numbers.

    Args:
        seed: as it was given to `generate`.
        rows: `[n]`, their numbers, from 0.
        shape: of one image, `(H, W, C)`.

    Returns:
        `[n, H, W, C]` float32.
    """
    keys = jax.vmap(jax.random.split)(sample_keys(seed, rows))
    return np.asarray(normal(keys[:, 0], shape))


def labels_called(
    given: Iterable[int | str], num_classes: int, names: Sequence[str] = ()
) -> np.ndarray:
    """Labels by number or name, int32 `[n]`.

    A number is the label of that number, from 0. A text is the label of the class with that name;
    where no class has it, and it is made of digits, of that number.

    Args:
        given: numbers, or texts as a command line has them.
        num_classes: 0 is unconditional, of which 0 alone is a label.
        names: of the classes.

    Raises:
        UserError: the first that is no label.

    Example:
        >>> labels_called([0, "0", "7"], 3, ["10", "3", "7"]).tolist()
        [0, 0, 2]
    """
    known = {name: i for i, name in enumerate(names)}
    classes = max(num_classes, 1)

    def number(label: int | str) -> int:
        found: Any = label
        if isinstance(label, str):
            found = known.get(label, int(label) if label.isdecimal() else None)
        if found in range(classes):  # NumPy's whole numbers are, 2.5 is not.
            return int(found)
        there = f"this run has {classes}, from 0 to {classes - 1}"
        if num_classes == 0:
            there = "this run has no classes: give the number of samples alone"
        elif isinstance(label, str) and known:
            there = nearest(label, known)
        raise UserError(f"no label is called {label!r}; {there}")

    return np.array([number(label) for label in given], np.int32)


def balanced_labels(n: int, num_classes: int) -> np.ndarray:
    """`0, 1, …, num_classes - 1, 0, …`, `[n]`; all 0 for an unconditional model.

    Example:
        >>> balanced_labels(5, 3).tolist()
        [0, 1, 2, 0, 1]
    """
    return np.arange(n, dtype=np.int32) % max(num_classes, 1)

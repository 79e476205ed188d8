"""The one route from weights to samples: a `Model` draws the samples of a `Request`."""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh
from jax.tree_util import Partial

from diffjax.codecs import Codec, Identity
from diffjax.compiling import jit
from diffjax.conditions.base import len_of
from diffjax.errors import UserError
from diffjax.host.interrupts import wait_for
from diffjax.host.processes import to_host
from diffjax.models.layers.seamless import AXES, seamless
from diffjax.objectives.base import Objective
from diffjax.process.precond import Predict
from diffjax.sampling.grids import Power
from diffjax.sampling.guidance import guide
from diffjax.sampling.parallel import InParallel, Parallel
from diffjax.sampling.sample import (
    Around,
    Recipe,
    State,
    Trace,
    count_padded,
    one_step,
    padded,
    predicted,
    sample_padded,
    start_walk,
    starting_noise,
    trace,
    with_condition,
)
from diffjax.spec import choose
from diffjax.training.sharding import batch_sharding, local_rows, replicated, spread
from diffjax.wiring import Wired, check_recipe

Walk = Callable[..., Any]
"""`(denoise, solver, path, times[m], keys[B], x[B, H, W, C]) ->` any tree of arrays, as
`diffjax.sampling.sample.sample` or `trace`."""
LatentsOf = Callable[["Request", Callable[[], np.ndarray]], np.ndarray]
_SAMPLE = Partial(sample_padded)
_UNCHANGED = Partial(lambda solver: solver)


def _from(begin: Array, walk: Walk, *given: Any) -> Any:
    """A walk from `begin`, not from the noise of its request."""
    *how, _ = given
    return walk(*how, begin)


@dataclass(frozen=True, eq=False)
class Request:
    """The samples to draw: condition, seed and source; independent of model and recipe.

    Attributes:
        condition: the condition of the n samples, a tree of arrays with n rows in the form of the
            model's `Condition`; for classes, labels int32 `[n]`.
        seed: the seed of the noise.
        source: `[n, h, w, c]`, the encoded source images; None if samples start from noise.
        negative: the condition that guidance leads each sample away from, with n rows as
            `condition`, but without its parts that are kept; for recipes against
            `NegativeCondition`.
        rows: `[n]`, the number of each sample, by default 0, 1, … A sample depends on the seed, its
            number, its condition and its source, and not on the other samples.

    Example:
        >>> request = Request(np.array([3, 1, 4, 1]), seed=7)
        >>> len(request), [some.rows.tolist() for some in request.batches(3)]
        (4, [[0, 1, 2], [3]])
    """

    condition: Any
    seed: int = 0
    source: np.ndarray | None = None
    rows: np.ndarray = None  # pyright: ignore[reportAssignmentType]
    negative: Any = None

    def __post_init__(self):
        condition = jax.tree.map(np.asarray, self.condition)
        object.__setattr__(self, "condition", condition)
        object.__setattr__(self, "negative", jax.tree.map(np.asarray, self.negative))
        if self.source is not None:
            object.__setattr__(self, "source", np.asarray(self.source, np.float32))
        if self.rows is None:
            object.__setattr__(self, "rows", np.arange(len(jax.tree.leaves(condition)[0])))

    def __len__(self) -> int:
        return len(self.rows)

    def only(self, places: np.ndarray) -> "Request":
        """The samples at the indices `places` `[m]`; they keep their numbers."""
        source = None if self.source is None else self.source[places]
        both = (self.condition, self.negative)
        condition, negative = jax.tree.map(lambda leaf: leaf[places], both)
        return Request(condition, self.seed, source, self.rows[places], negative)

    def batches(self, n: int) -> Iterator["Request"]:
        """Requests for n samples each; the last one may have fewer."""
        for first in range(0, len(self), n):
            yield self.only(np.arange(first, min(first + n, len(self))))

    def noise(self, shape: tuple[int, ...]) -> np.ndarray:
        """The standard normal noise that each sample starts from, `[n, *shape]` float32."""
        return np.asarray(starting_noise(sample_keys(self.seed, self.rows), shape)[0])

    def filled(self, n: int) -> "Request":
        """A request for n samples: the last one is repeated, with the numbers that follow."""
        more = self.only(np.minimum(np.arange(n), len(self) - 1))
        after = self.rows[-1] + 1 + np.arange(n - len(self))
        return replace(more, rows=np.concatenate([self.rows, after]))


@dataclass(frozen=True, eq=False)
class Programs:
    """The parts of a run on a mesh, and the sampling programs that are compiled for them.

    All models with these parts share them: other weights compile nothing.

    Attributes:
        wired: the parts.
        mesh: the devices.
        codec: what decodes samples.
    """

    wired: Wired
    mesh: Mesh
    codec: Codec = Identity()

    def __repr__(self) -> str:
        return f"Programs({self.wired!r})"

    @cached_property
    def decoder(self) -> Callable[[Any], np.ndarray]:
        """`latents -> images` (`Codec.decoder`), on this process's devices of the mesh."""
        return self.codec.decoder(local_rows(self.mesh.local_devices))

    @cached_property
    def encoder(self) -> Callable[[Any], np.ndarray]:
        """`images -> latents`, as `decoder`."""
        return self.codec.encoder(local_rows(self.mesh.local_devices))

    @cached_property
    def draw(self) -> Any:
        """`(plan, weights, walk, times, rows) ->` the result of the walk."""
        everywhere = replicated(self.mesh)
        compiled = partial(_draw, self.wired)
        return jit(compiled, self.mesh, static_argnums=0, out_shardings=everywhere)

    @cached_property
    def seamless(self) -> "Callable[[str], Programs]":
        """`axes ->` the same for images that wrap around at these axes.

        The names of axes are those of `diffjax.models.layers.seamless.AXES`.
        """

        def made(axes: str) -> Programs:
            equivariant = getattr(self.wired.network, "shift_equivariant", False)
            apply = seamless(self.wired.apply, axes, equivariant)
            return Programs(self.wired._replace(apply=apply), self.mesh, self.codec.seamless(axes))

        return cache(made)

    @cached_property
    def unplaced(self) -> "Programs":
        """The same without sharding constraints on the network's activations."""
        wired = self.wired._replace(apply=inspect.unwrap(self.wired.apply))
        return Programs(wired, self.mesh, self.codec)


class _Plan(NamedTuple):
    """The static values that a program is compiled for, without steps, grid and scale."""

    recipe: Recipe
    weaker: Programs | None
    change: Callable[[Predict], Predict] | None


class _Weights(NamedTuple):
    """The numbers of a program that all samples share."""

    params: Any
    weaker: Any
    scale: Array | None
    other: Any


class _Rows(NamedTuple):
    """The numbers of a program that have one row for each sample."""

    keys: Array
    condition: Any
    source: Any
    negative: Any = None


def _no_others(name: str) -> "Model":
    raise UserError(
        f"guidance against other weights ({name}) needs a run that has them: this model has its "
        "own alone"
    )


@dataclass(frozen=True, eq=False)
class Model:
    """A network with one set of weights, and no optimizer: all that sampling needs.

        model = diffjax.load("runs/digits").model()
        request = Request(np.arange(10), seed=1)
        images = model.sample(recipe, request)

    What is compiled is shared by all models with the same `programs`. Another number of steps,
    grid, guidance scale, seed or number of samples (in batches of one size) compiles nothing.

    Attributes:
        programs: the parts, the mesh, and what is compiled for them.
        params: the weights.
        find: `name -> Model`, the weaker model of guidance by the name of its weights in
            `recipe.against`.
        change: `Predict -> Predict`, applied to the guided predictor before it is sampled
            (`through`).
    """

    programs: Programs
    params: Any
    find: Callable[[str], "Model"] = _no_others
    change: Callable[[Predict], Predict] | None = None

    def __repr__(self) -> str:
        return f"Model({self.wired!r})"

    @property
    def wired(self) -> Wired:
        """The parts: path, objective, network."""
        return self.programs.wired

    @property
    def mesh(self) -> Mesh:
        """The devices."""
        return self.programs.mesh

    @property
    def codec(self) -> Codec:
        """What decodes samples."""
        return self.programs.codec

    def decoded(self, latents: np.ndarray) -> np.ndarray:
        """The images `[n, H, W, C]` of latents `[n, h, w, c]`."""
        return self.programs.decoder(latents)

    def encoded(self, images: np.ndarray) -> np.ndarray:
        """The latents `[n, h, w, c]` of images `[n, H, W, C]` in [-1, 1]."""
        return self.programs.encoder(images)

    def map(self, f: Callable[[Any], Any]) -> "Model":
        """The same model with `f` applied to each array of its weights and of a weaker model's."""
        params = jax.tree.map(f, self.params)
        return replace(self, params=params, find=lambda name: self.find(name).map(f))

    def through(self, change: Callable[[Predict], Predict]) -> "Model":
        """The same model with `change(guided predictor)` as its predictor, for editing.

        For each function `change`, programs are compiled anew.
        """
        return replace(self, change=change)

    def seamless(self, axes: str | bool = True) -> "Model":
        """The same model for images that tile a plane: each side continues at the opposite one.

        The convolutions of network and codec wrap around. A network that depends on positions is
        evaluated on rolled inputs as well (`diffjax.models.layers.seamless.seamless`).

        Args:
            axes: `both` or True, `x` alone (from left to right) or `y` alone; False for none.

        Raises:
            UserError: no such axes.

        References:
            Vecchio et al., "ControlMat: A Controlled Generative Approach to Material Capture",
            2023, arXiv:2309.01700, for rolls
        """
        if axes is False:
            return self
        named = "both" if axes is True else str(axes)
        choose(AXES, named, "direction of seamless=")
        return replace(
            self,
            programs=self.programs.seamless(named),
            find=lambda name: self.find(name).seamless(named),
        )

    def weaker(self, recipe: Recipe) -> "Model | None":
        """The weaker model whose weights a recipe's guidance names; None if it names none.

        Raises:
            UserError: there are no such weights, or their model does not suit this one.
        """
        name = recipe.against.weights if recipe.calls > 1 else ""
        if not name:
            return None
        weaker = self.find(name)
        if not recipe.against.needs_null:
            return weaker
        if not weaker.wired.condition.null_is_trained(weaker.wired.condition_dropout):
            raise UserError(
                f"guidance against {name} without the condition: it has none to leave out, or "
                "was trained with condition_dropout=0"
            )
        return weaker

    def predict(self, source: Array | None = None) -> Predict:
        """The network as a function, without guidance.

        `(x[B, H, W, C], t[B], condition) -> (x0, eps)`; `source[B, H, W, C]` if it sees one.
        """
        return self.wired.predict(self.params, source)

    def guided(self, recipe: Recipe, source: Array | None = None) -> Predict:
        """The predictor that a recipe samples with: `predict`, guided and changed."""
        plan, weights = self._plan(recipe)
        return _guided(self.wired, plan, weights, source)

    def sample(self, recipe: Recipe, request: Request, *, batch_size: int = 256) -> np.ndarray:
        """Draws samples.

        Args:
            recipe: solver, grid, steps and guidance.
            request: the n samples.
            batch_size: samples at a time; rounded up to a multiple of the mesh's devices.

        Returns:
            The decoded images, `[n, H, W, C]` float32, nominally in [-1, 1]. They are not checked
            to be finite.

        Raises:
            UserError: the recipe does not suit the model, there is no such label, or the source is
                missing or of another shape.
        """
        parts = self._batches(recipe, request, batch_size)
        nothing = np.zeros((0, *self.wired.image_shape), np.float32)
        return np.concatenate([self.decoded(x) for x in (nothing, *(x for _, x in parts))])

    def sample_latents(
        self, recipe: Recipe, request: Request, *, batch_size: int = 256
    ) -> np.ndarray:
        """As `sample`, but without decoding: the latents, `[n, h, w, c]`."""
        nothing = np.zeros((0, *self.wired.image_shape), np.float32)
        parts = self._batches(recipe, request, batch_size)
        return np.concatenate([nothing, *(latents for _, latents in parts)])

    def batches(
        self,
        recipe: Recipe,
        request: Request,
        batch_size: int = 256,
        begun: Callable[[int], Any] = lambda number: None,
        latents_of: LatentsOf = lambda some, draw: draw(),
    ) -> Iterator[np.ndarray]:
        """As `sample`, batch by batch; each batch is checked to be finite.

        Args:
            recipe: solver, grid, steps and guidance.
            request: the samples.
            batch_size: samples at a time; rounded up to a multiple of the mesh's devices.
            begun: called with the number of each batch, from 1, before it is drawn; an exception
                from it ends the sampling.
            latents_of: `(request of a batch, function that draws it) -> its latents`. It may return
                latents that were drawn earlier.

        Raises:
            UserError: as `sample` and `check_finite`.
        """
        for some, latents in self._batches(recipe, request, batch_size, begun, latents_of):
            self.check_finite(latents, recipe, some)
            yield self.decoded(latents)

    def latent_batches(
        self,
        recipe: Recipe,
        request: Request,
        batch_size: int = 256,
        begun: Callable[[int], Any] = lambda number: None,
    ) -> Iterator[np.ndarray]:
        """As `batches`, but without decoding: the latents."""
        for some, latents in self._batches(recipe, request, batch_size, begun):
            self.check_finite(latents, recipe, some)
            yield latents

    def _batches(
        self,
        recipe: Recipe,
        request: Request,
        batch_size: int,
        begun: Callable[[int], Any] = lambda number: None,
        latents_of: LatentsOf = lambda some, draw: draw(),
    ) -> Iterator[tuple[Request, np.ndarray]]:
        self._check(recipe, request)
        plan, weights = self._plan(recipe)
        size = full_batch(min(batch_size, max(len(request), 1)), self.mesh)
        times, place = padded(recipe.times(self.wired.path)), batch_sharding(self.mesh)
        for number, some in enumerate(request.batches(size), start=1):
            begun(number)

            def draw(some: Request = some) -> np.ndarray:
                # The last batch is filled up, so that every batch has the shape that was compiled.
                rows = spread(_rows(some.filled(size)), place)
                images = self.programs.draw(plan, weights, _SAMPLE, times, rows)
                return to_host(wait_for(images))[: len(some)]

            yield some, latents_of(some, draw)

    def trace(self, recipe: Recipe, request: Request) -> Trace:
        """The states from noise to the latents that `sample_latents` returns, in one batch."""
        return self.walk(trace, recipe, request, recipe.times(self.wired.path))

    def steps(
        self, recipe: Recipe, request: Request, around: Around = _UNCHANGED
    ) -> Iterator[State]:
        """The states of `trace` one by one, for pictures while samples are drawn.

            for step in model.steps(recipe, request):
                show(model.decoded(step.x0))

        One program computes a step. It is compiled once for all steps, numbers of steps, guidance
        scales and seeds. Each state takes one more evaluation than in `sample`, for x0.

        Args:
            recipe: solver, grid, steps and guidance.
            request: the samples, in one batch.
            around: makes a solver from the recipe's, for editing.

        Raises:
            UserError: as `sample` and `check_finite`.
        """
        self._check(replace(recipe, solver=around(recipe.solver)), request)
        plan, weights = self._plan(recipe)
        times, rows = padded(recipe.times(self.wired.path)), _rows(request)

        def run(walk: Walk, *arguments: Any) -> Any:
            return self.programs.draw(plan, weights, Partial(walk, *arguments), times, rows)

        def step(number: int, x: Array, x0: Array) -> State:
            return State(number, float(times[number]), to_host(x), to_host(x0))

        state = run(start_walk, around)
        number = int(jnp.count_nonzero(times)) - 1
        for i in range(number):
            yield step(i, state[0], run(predicted, i, state))
            state = run(one_step, around, i, state)
        if recipe.solver.finishes:
            end = run(predicted, number, state)
            yield step(number, state[0], end)
            number, state = number + 1, (end, None)
        end = to_host(state[0])
        self.check_finite(end, recipe, request)
        yield step(number, end, end)

    def in_parallel(
        self, recipe: Recipe, request: Request, window: int, tolerance: float
    ) -> Parallel:
        """The samples that `sample` draws, in fewer rounds (`InParallel`); in one batch.

        The steps of a window are spread over the mesh where they divide.

        Raises:
            UserError: as `sample` and `check_finite`.
        """
        rows = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        place = batch_sharding(self.mesh) if window % rows == 0 else None
        # Steps that are spread take the devices that the network would spread a batch over.
        model = self if place is None else replace(self, programs=self.programs.unplaced)
        walk = InParallel(window, tolerance, place)
        found = model.walk(walk, recipe, request, recipe.times(self.wired.path))
        self.check_finite(found.x, recipe, request)
        return found._replace(x=self.decoded(found.x))

    def nfe(self, recipe: Recipe, request: Request) -> int:
        """Network evaluations per sample, declared by the recipe or counted.

        For solvers that choose their own steps they are counted, with this request as one batch.
        """
        if recipe.nfe is not None:
            return recipe.nfe
        times = padded(recipe.times(self.wired.path))
        return int(self.walk(count_padded, recipe, request, times)) * recipe.calls

    def walk(
        self, walk: Walk, recipe: Recipe, request: Request, times: Array, begin: Any = None
    ) -> Any:
        """The result of any walk as NumPy arrays, with all samples in one batch.

        Args:
            walk: a function such as `diffjax.sampling.sample.sample`. It is compiled once for equal
                functions; the arrays in a `jax.tree_util.Partial` are arguments of the program.
            recipe: solver and guidance.
            request: the samples; the walk begins at their noise or their source.
            times: the times that the walk receives, such as `recipe.times(path)`.
            begin: `[B, …]` at the first time, where the walk begins instead.
        """
        self._check(recipe, request)
        plan, weights = self._plan(recipe)
        walk = walk if isinstance(walk, Partial) else Partial(walk)
        if begin is not None:
            walk = Partial(_from, jnp.asarray(begin), walk)
        return to_host(wait_for(self.programs.draw(plan, weights, walk, times, _rows(request))))

    def lower(self, recipe: Recipe, batch_size: int) -> jax.stages.Lowered:
        """The program with which `sample` draws a batch, to be compiled.

        The weights may be shapes with shardings, and the devices of the mesh need not be there.
        """
        plan, weights = self._plan(recipe)
        wired, everywhere = self.wired, replicated(self.mesh)

        def shared(leaf: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere)

        def split(leaf: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=batch_sharding(self.mesh))

        images = wired.batch_shapes(batch_size)["image"]
        cond = wired.condition.abstract(batch_size)
        keys = jax.eval_shape(lambda: sample_keys(0, jnp.arange(batch_size)))
        source = images if wired.objective.traits.starts_at_source else None
        # Of numbers, because the length of a route depends on them.
        times = jax.eval_shape(padded, recipe.times(wired.path))
        return self.programs.draw.lower(
            plan,
            weights._replace(
                scale=jax.tree.map(shared, weights.scale), other=jax.tree.map(shared, weights.other)
            ),
            _SAMPLE,
            shared(times),
            jax.tree.map(split, _Rows(keys, cond, source)),
        )

    def check_finite(self, images: np.ndarray, recipe: Recipe, request: Request) -> None:
        """Refuses samples that are not finite, and finds the step at which that began.

        Raises:
            UserError: some are not finite.
        """
        bad = np.flatnonzero(~np.isfinite(images).all(axis=(1, 2, 3)))
        if not len(bad):
            return
        traced = self.trace(recipe, request.only(bad[:1]))
        broken = [not np.isfinite(x).all() for x in np.asarray(traced.x)]
        last = len(traced.times) - 1
        step = broken.index(True) if True in broken else last
        before, after = (float(traced.times[max(i, 0)]) for i in (step - 1, step))
        raise UserError(
            f"{len(bad)} of {len(images)} samples are not finite; number {request.rows[bad[0]]} "
            f"from step {step} of {last} on (t={before:.4g} to {after:.4g}): the weights are not, "
            "or this solver can't walk this grid"
        )

    def _plan(self, recipe: Recipe) -> tuple[_Plan, _Weights]:
        """What is compiled for a recipe, and the numbers that it is called with."""
        weaker = self.weaker(recipe)
        scale = None if recipe.guidance_scale == 1.0 else jnp.float32(recipe.guidance_scale)
        against, other = recipe.against, None
        if recipe.calls > 1:
            against, other = against.parsed(self.wired.condition)
        same = replace(recipe, num_steps=1, grid=Power(), guidance_scale=1.0, against=against)
        if weaker is None:
            return _Plan(same, None, self.change), _Weights(self.params, None, scale, other)
        plan = _Plan(same, weaker.programs, self.change)
        return plan, _Weights(self.params, weaker.params, scale, other)

    def _check(self, recipe: Recipe, request: Request) -> None:
        check_recipe(recipe, self.wired)
        self.wired.condition.check(request.condition)
        _check_source(request, self.wired)
        if request.negative is not None:
            self.wired.condition.negative.check(request.negative)
            if len_of(request.negative) != len(request):
                raise UserError(
                    f"negative= has {len_of(request.negative)} rows: {len(request)} samples need "
                    "one for each"
                )


def _draw(
    wired: Wired, plan: _Plan, weights: _Weights, walk: Walk, times: Array, rows: _Rows
) -> Any:
    if rows.negative is not None:
        weights = weights._replace(other=rows.negative)
    denoise = with_condition(_guided(wired, plan, weights, rows.source), rows.condition)
    noise, keys = starting_noise(rows.keys, wired.image_shape)
    x = start(wired.objective, plan.recipe, noise, rows.source)
    return walk(denoise, plan.recipe.solver, wired.path, times, keys, x)


def start(objective: Objective, recipe: Recipe, noise: Array, source: Array | None) -> Array:
    """Where sampling starts, `[B, …]`: noise of the objective's scale or of 1, or a source."""
    if source is None and recipe.unit_start:
        return noise
    return objective.start(noise, source)


def _guided(wired: Wired, plan: _Plan, weights: _Weights, source: Array | None) -> Predict:
    weaker = plan.weaker and plan.weaker.wired.predict(weights.weaker, source)
    recipe = plan.recipe
    own = weights.scale if recipe.against.embedded else None
    models = wired.models(weights.params, source, weaker, weights.other, own)
    predict = guide(models, wired.path, recipe.guidance, weights.scale, recipe.against)
    return predict if plan.change is None else plan.change(predict)


def _rows(request: Request) -> _Rows:
    keys = sample_keys(request.seed, request.rows)
    return _Rows(keys, request.condition, request.source, request.negative)


def full_batch(batch_size: int, mesh: Mesh) -> int:
    """A batch size, rounded up to a multiple of the mesh's data-parallel devices."""
    rows = mesh.shape["data"] * mesh.shape["fsdp"]
    return -(-batch_size // rows) * rows


def sample_keys(seed: int | Array, rows: np.ndarray | Array) -> Array:
    """The key of each sample, `[n]`: of the seed and the sample's number alone."""
    return jax.vmap(partial(jax.random.fold_in, jax.random.key(seed)))(rows)


def _check_source(request: Request, wired: Wired) -> None:
    """Refuses a source for a model that starts from noise, and a missing one for other models."""
    source, name = request.source, type(wired.objective).__name__
    if not wired.objective.traits.starts_at_source:
        if source is not None:
            raise UserError(f"{name} makes samples from noise: leave source= out")
        return
    if source is None:
        raise UserError(f"this run goes from one image to another ({name}): pass source=images")
    needed = (len(request), *wired.image_shape)
    if source.shape != needed:
        raise UserError(
            f"source has shape {source.shape}; {len(request)} samples of this run need {needed}"
        )

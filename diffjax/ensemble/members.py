"""Compiles one training step for all members of an ensemble, with stacked states and numbers."""

import functools
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from diffjax.compiling import jit
from diffjax.data import DataSet, batches
from diffjax.data.latents import LOG_VARIANCE
from diffjax.ensemble.grouping import Numbers, numbers_of
from diffjax.runs.setup import Setup
from diffjax.training.posterior import drawn, posterior_key
from diffjax.training.state import TrainState
from diffjax.training.step import make_train_step

MEMBER, DATA = "member", "data"
Mapped = Callable[..., Any]
"""`(function) -> the function mapped over the first axis of its arguments`, such as `jax.vmap`."""


class Members(NamedTuple):
    """The setups of all members, with their common mesh.

    Attributes:
        setups: one for each member.
        numbers: the numbers in which their parts differ.
        mesh: axes `member` and `data`; `member` has gcd(number of members, number of devices).
    """

    setups: tuple[Setup, ...]
    numbers: Numbers
    mesh: Mesh

    @property
    def seeds(self) -> tuple[int, ...]:
        """The distinct seeds, in the order of their first members."""
        return tuple(dict.fromkeys(setup.config.seed for setup in self.setups))

    def place(self, *axes: str | None) -> NamedSharding:
        """Sharding of an array whose first dimensions are split over these mesh axes."""
        return NamedSharding(self.mesh, PartitionSpec(*axes))

    @property
    def batches_split(self) -> bool:
        """Whether all seeds differ: then each member has its own batch, on its own devices."""
        return len(self.seeds) == len(self.setups)


def members_of(setups: Sequence[Setup]) -> Members:
    """Combines setups into `Members` and distributes them over their devices.

    M members on N devices are split over `gcd(M, N)` groups of devices; the devices of a group
    split each batch.

    Raises:
        Apart: the setups can't train together.
    """
    devices = setups[0].mesh.devices.ravel()
    side_by_side = math.gcd(len(setups), len(devices))
    mesh = Mesh(devices.reshape(side_by_side, -1), (MEMBER, DATA), axis_types=(AxisType.Auto,) * 2)
    return Members(tuple(setups), numbers_of([setup.config for setup in setups]), mesh)


def stack(members: Members, states: Sequence[TrainState]) -> TrainState:
    """Stacks the states of all members along a new first axis, sharded over the devices."""
    return _stacker(members.place(MEMBER))(*states)


@functools.cache
def _stacker(place: NamedSharding) -> Callable:
    return jax.jit(
        lambda *each: jax.tree.map(lambda *leaves: jnp.stack(leaves), *each), out_shardings=place
    )


def unstacker(members: Members) -> Callable[[TrainState, int], TrainState]:
    """Returns `(states, i) -> state of member i`, sharded as in a single run."""
    places, structure = jax.tree.flatten(members.setups[0].shardings)
    row = _row(tuple(places))
    return lambda states, i: structure.unflatten(row(jax.tree.leaves(states), i))


@functools.cache
def _row(places: tuple) -> Callable:
    return jax.jit(lambda leaves, i: [leaf[i] for leaf in leaves], out_shardings=list(places))


class MemberRow:
    """A member's row of an array on the devices; it is copied to the host when it is read."""

    def __init__(self, rows: Array, index: int):
        self._rows, self._index = rows, index

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        del copy
        return np.asarray(self._rows)[self._index].astype(dtype, copy=False)


def metrics_of(metrics: Mapping[str, Array], index: int) -> dict[str, Any]:
    """The metrics of one member; they are not copied to the host until they are read."""
    return {name: MemberRow(rows, index) for name, rows in metrics.items()}


def member_batches(
    members: Members, dataset: DataSet, start_step: int
) -> Iterator[dict[str, Array]]:
    """Yields batches `[S, B, …]` from `start_step` on, with a row for each of S distinct seeds."""
    config = members.setups[0].config
    streams = [
        batches(
            dataset.train,
            batch_size=config.batch_size,
            seed=seed,
            start_step=start_step,
            augment=members.setups[0].augment,
        )
        for seed in members.seeds
    ]
    place = members.place(MEMBER if members.batches_split else None, DATA)
    used = [*members.setups[0].wired.batch_shapes(config.batch_size), LOG_VARIANCE]
    keys = jnp.stack([posterior_key(seed) for seed in members.seeds])
    for step, each in enumerate(zip(*streams, strict=True), start_step):
        placed = {
            name: jax.device_put(np.stack([batch[name] for batch in each]), place)
            for name in used
            if name in each[0] or name != LOG_VARIANCE
        }
        yield drawn(placed, keys, step)


def compile_steps(members: Members, states: TrainState, mapped: Mapped | None = None) -> Callable:
    """Compiles `(states, batches) -> (states, metrics)` for all members; it donates the states.

    Each device trains its own members without communication with the others.

    Args:
        members: all members.
        states: their stacked states.
        mapped: maps the step over members: `jax.vmap` or `one_by_one`; None selects by platform.
    """
    config, mesh = members.setups[0].config, members.mesh
    step = member_step(members)
    mapped = mapped or how_on(mesh.devices.flat[0].platform)

    def together(states: Any, values: Any, keys: Array, which: Array, batches: Any) -> Any:
        def one(state: TrainState, values: Any, key: Array, which: Array) -> Any:
            # A batch that all members share is not repeated.
            batch = jax.tree.map(lambda x: x[0] if len(x) == 1 else x[which], batches)
            return step(state, values, key, batch)

        return mapped(one)(states, values, keys, which)

    rows = PartitionSpec(MEMBER)
    spread = jax.shard_map(
        together,
        mesh=mesh,
        in_specs=(rows, rows, rows, rows, rows if members.batches_split else PartitionSpec()),
        out_specs=rows,
        axis_names={MEMBER},
        check_vma=False,
    )
    place = members.place(MEMBER)
    fixed = jax.device_put((members.numbers.values, _keys(members), _which(members)), place)
    out = (jax.tree.map(lambda leaf: leaf.sharding, states), place)
    jitted = jit(spread, mesh, donate_argnums=0, out_shardings=out)
    compiled = jitted.lower(states, *fixed, _batch_shapes(members, config.batch_size)).compile()
    return lambda states, batches: compiled(states, *fixed, batches)


def member_step(members: Members) -> Callable:
    """Returns the pure step of one member, `(state, values, key, batch) -> (state, metrics)`."""
    setup = members.setups[0]
    config = setup.config

    def step(state: TrainState, values: Mapping[str, Array], key: Array, batch: Any) -> Any:
        objective, optimizer, dropout = members.numbers.parts(values).built(config.num_steps)
        return make_train_step(
            # Unwrapped, because the members have their own mesh.
            inspect.unwrap(setup.wired.apply),
            objective,
            setup.fitted(optimizer),
            replace(setup.step_settings, condition_dropout=dropout),
        )(state, key, batch)

    return step


def one_by_one(step: Callable) -> Callable:
    """Maps a step over members sequentially (`jax.lax.map`), with the shapes of a single run."""
    return lambda *arguments: jax.lax.map(lambda each: step(*each), arguments)


def how_on(platform: str) -> Mapped:
    """Selects `one_by_one` on CPUs and `jax.vmap` elsewhere; docs/ensembles.md has the timings."""
    return one_by_one if platform == "cpu" else jax.vmap


def _keys(members: Members) -> Array:
    seeds = [setup.config.seed for setup in members.setups]
    return jnp.stack([jax.random.split(jax.random.key(seed))[1] for seed in seeds])


def _which(members: Members) -> Array:
    """For each member, the index of its batch among the batches on its device."""
    here = len(members.setups) // members.mesh.shape[MEMBER]
    if members.batches_split:
        return jnp.arange(len(members.setups)) % here
    return jnp.asarray([members.seeds.index(setup.config.seed) for setup in members.setups])


def _batch_shapes(members: Members, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    place = members.place(MEMBER if members.batches_split else None, DATA)
    return {
        name: jax.ShapeDtypeStruct((len(members.seeds), *rows.shape), rows.dtype, sharding=place)
        for name, rows in members.setups[0].wired.batch_shapes(batch_size).items()
    }

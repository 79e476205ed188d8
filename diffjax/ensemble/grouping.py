"""Which runs can be one program: those that differ in numbers and seeds alone."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from ml_collections import ConfigDict

from diffjax.objectives.base import Objective
from diffjax.runs.workdirs import differing_keys
from diffjax.spec import build, to_json
from diffjax.training.nonfinite import NonFinite
from diffjax.training.optimizer import Optimizer
from diffjax.training.state import init_state
from diffjax.training.step import make_train_step
from diffjax.wiring import build_objective

_PLAIN = ("seed", "name", "sampling", "evaluation", "weights")
"""What may differ freely: it is no part of a training step, or is a key and the data's order."""
_PARTS = ("path", "precond", "objective", "wrappers")
_NUMBERED = (*_PARTS, "optimizer", "label_dropout")
"""What may differ in real numbers."""


class Parts(NamedTuple):
    """What of a training step may differ between members.

    Attributes:
        objective: the loss.
        optimizer: its spec, as plain data.
        label_dropout: share of labels hidden.
    """

    objective: Objective
    optimizer: Mapping[str, Any]
    label_dropout: Any

    def built(self, num_steps: int) -> tuple[Objective, Optimizer, Any]:
        """The same with the optimizer made."""
        return self.objective, build(self.optimizer, num_steps=num_steps), self.label_dropout


class Numbers(NamedTuple):
    """Some members' parts, taken apart into what they share and what they don't.

    What is the same in all of them stays a Python number, as in a run of its own.

    Attributes:
        values: `[M, …]` float32 each, by the name of the leaf.
        shared: leaves of the first member.
        treedef: how leaves are parts.
    """

    values: dict[str, np.ndarray]
    shared: dict[str, Any]
    treedef: Any

    def parts(self, values: Mapping[str, Array]) -> Parts:
        """The parts of one member, from its own values."""
        return jax.tree.unflatten(self.treedef, [*{**self.shared, **values}.values()])


class Apart(Exception):
    """Why some configs are no members of one program."""


def apart(configs: Sequence[ConfigDict]) -> str | None:
    """Why these configs can't train as one program, or None if they can.

    They can if they differ in seeds, in real numbers of the optimizer and of the objective with its
    path, weight, times and wrappers, in the label dropout, and in what happens after training.

    Args:
        configs: resolved.

    Raises:
        UserError: one of them can't be built at all.

    Example:
        >>> from configs import digits
        >>> one, other, larger = (digits.get_config() for _ in range(3))
        >>> other.optimizer.learning_rate, larger.batch_size = 1e-4, 64
        >>> apart([one, other]) is None
        True
        >>> apart([one, larger])
        'batch_size: 128 there, 64 here'
    """
    try:
        _untraceable(configs[0], numbers_of(configs))
    except Apart as reason:
        return str(reason)
    return None


def groups(configs: Mapping[str, ConfigDict], most: int) -> list[tuple[str, ...]]:
    """Names of configs that can train as one program, at most `most` of them together.

    Each config joins the first group that it fits and that has room; order is kept.

    Args:
        configs: resolved, by name.
        most: of a group; 1 leaves each by itself.

    Example:
        >>> from configs import digits
        >>> configs = {name: digits.get_config() for name in "abcd"}
        >>> configs["b"].batch_size = 64
        >>> configs["c"].seed = 1
        >>> groups(configs, most=2)
        [('a', 'c'), ('b',), ('d',)]
    """
    found: list[list[str]] = []
    for name, config in configs.items():
        for group in found:
            if len(group) < most and apart([configs[group[0]], config]) is None:
                group.append(name)
                break
        else:
            found.append([name])
    return [tuple(group) for group in found]


def numbers_of(configs: Sequence[ConfigDict]) -> Numbers:
    """What the members share and the numbers in which they differ.

    Raises:
        Apart: they differ in something else.
    """
    first = configs[0]
    # Configs of before there was `sequence` have none.
    axes = ("fsdp", "tensor", "sequence")
    split = {axis: first.mesh[axis] for axis in axes if first.mesh.get(axis, 1) != 1}
    if split:
        raise Apart(f"mesh.{next(iter(split))}: parameters split over devices are no members'")
    if len(configs) > 1 and "nonfinite" in first and first.nonfinite.get("rollbacks"):
        raise Apart("nonfinite.rollbacks: members go on at one step, and none of them goes back")
    for config in configs[1:]:
        _check_alike(first, config)
    parts = [_parts(config) for config in configs]
    flat = [jax.tree_util.tree_flatten_with_path(part) for part in parts]
    for _, treedef in flat:
        if treedef != flat[0][1]:
            raise Apart("their objectives differ in what is fixed when a program is compiled")
    leaves = zip(*(leaves for leaves, _ in flat), strict=True)
    values, shared = {}, {}
    for column in leaves:
        name = jax.tree_util.keystr(column[0][0], simple=True, separator=".")
        each = [leaf for _, leaf in column]
        shared[name] = each[0]
        if not _all_same(each):
            values[name] = _stacked(name, each)
    return Numbers(values, shared, flat[0][1])


def _check_alike(first: ConfigDict, config: ConfigDict) -> None:
    """Refuses all differences but those in real numbers that may differ.

    Configs say which classes objects are of. Structures of trees don't: to JAX two dataclasses with
    the same fixed fields and as many leaves are one.
    """
    one, other = (_without_numbers(json.loads(to_json(each))) for each in (first, config))
    differences = differing_keys(one, other)
    if differences:
        raise Apart(differences[0])


def _without_numbers(tree: dict[str, Any]) -> dict[str, Any]:
    def hide(inner: Any) -> Any:
        if isinstance(inner, dict):
            return {name: hide(value) for name, value in inner.items()}
        if isinstance(inner, list):
            return [hide(value) for value in inner]
        return 0.0 if isinstance(inner, float) else inner

    kept = {name: value for name, value in tree.items() if name not in _PLAIN}
    return {name: hide(value) if name in _NUMBERED else value for name, value in kept.items()}


def _parts(config: ConfigDict) -> Parts:
    return Parts(build_objective(config), config.optimizer.to_dict(), config.label_dropout)


def _all_same(leaves: Sequence[Any]) -> bool:
    return all(type(leaf) is type(leaves[0]) and np.array_equal(leaf, leaves[0]) for leaf in leaves)


def _stacked(name: str, leaves: Sequence[Any]) -> np.ndarray:
    """Real numbers, one a member.

    Raises:
        Apart: they are none, or of unlike shapes.
    """
    arrays = [np.asarray(leaf) for leaf in leaves]
    if any(array.dtype.kind not in "fi" or array.shape != arrays[0].shape for array in arrays):
        raise Apart(f"{name}: {leaves[0]} in the first, which is no real number")
    return np.stack(arrays).astype(np.float32)


def _untraceable(config: ConfigDict, numbers: Numbers) -> None:
    """Traces a step of a network of one number, with the numbers unknown.

    Raises:
        Apart: what is computed depends on one of them.
    """
    nonfinite: NonFinite = build(config.nonfinite) if "nonfinite" in config else NonFinite()

    def apply(params: Any, x: Array, *_: Any, hidden: bool = False, **how: Any) -> Any:
        out = params["w"] * jnp.repeat(x[..., :1], params["outputs"].shape[0], axis=-1)
        return (out, out) if hidden else out

    def probe(values: Mapping[str, Array], key: Array, batch: dict[str, Array]) -> Any:
        objective, optimizer, dropout = numbers.parts(values).built(config.num_steps)
        params = {"w": jnp.ones(()), "outputs": jnp.zeros(objective.outputs)}
        params |= objective.init_params(key)
        decays = config.ema_decays
        state = init_state(params, optimizer, decays, objective.init_memory(), nonfinite.init())
        step = make_train_step(
            apply, objective, optimizer, ema_decays=decays, label_dropout=dropout, null_label=0,
            nonfinite=nonfinite,
        )  # fmt: skip
        return step(state, key, batch)

    values = {name: value[0] for name, value in numbers.values.items()}
    image = jax.ShapeDtypeStruct((2, 8, 8, 1), jnp.float32)
    label = jax.ShapeDtypeStruct((2,), jnp.int32)
    batch = {"image": image, "label": label, "source": image}
    try:
        jax.eval_shape(probe, values, jax.eval_shape(lambda: jax.random.key(0)), batch)
    except TypeError as error:  # All of JAX's complaints that a value is needed are of this type.
        said = str(error).splitlines()[0]
        raise Apart(f"{', '.join(values)}: what is computed depends on it ({said})") from error

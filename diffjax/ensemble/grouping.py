"""Finds configs that can train as one program: those that differ only in numbers and seeds."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from ml_collections import ConfigDict

from diffjax.conditions import Unconditional
from diffjax.objectives.base import Objective, hidden_of
from diffjax.optimizers.base import Optimizer
from diffjax.runs.workdirs import differing_keys
from diffjax.spec import build, to_json
from diffjax.training.averages import Averages
from diffjax.training.nonfinite import NonFinite
from diffjax.training.state import init_state, is_kept, teacher_name
from diffjax.training.step import StepSettings, make_train_step
from diffjax.wiring import build_objective, dropout_of

_PLAIN = ("seed", "name", "sampling", "evaluation", "weights")
"""Config keys that may differ freely: the training step does not depend on them, except on `seed`,
which is an argument of the step."""
_PARTS = ("path", "precond", "objective", "wrappers")
_NUMBERED = (*_PARTS, "optimizer", "condition_dropout")
"""Config keys that may differ in real numbers."""


class VaryingParts(NamedTuple):
    """The parts of a training step that may differ between members.

    Attributes:
        objective: the objective that computes the loss.
        optimizer: the optimizer's spec as plain data.
        condition_dropout: probability of replacing a condition by the null condition, in [0, 1);
            0.1 is typical. A dict has one for each part.
    """

    objective: Objective
    optimizer: Mapping[str, Any]
    condition_dropout: Any

    def built(self, num_steps: int) -> tuple[Objective, Optimizer, Any]:
        """Returns objective, optimizer and condition dropout, with the optimizer built."""
        return self.objective, build(self.optimizer, num_steps=num_steps), self.condition_dropout


class Numbers(NamedTuple):
    """The parts of all members, divided into shared values and values that differ.

    Shared values stay Python numbers, as in a single run.

    Attributes:
        values: differing values of all M members, `[M, …]` float32 each, by the name of the leaf.
        shared: all leaves of the first member by name.
        treedef: the tree structure that restores `VaryingParts` from leaves.
    """

    values: dict[str, np.ndarray]
    shared: dict[str, Any]
    treedef: Any

    def parts(self, values: Mapping[str, Array]) -> VaryingParts:
        """Builds the parts of one member from its own values."""
        return jax.tree.unflatten(self.treedef, [*{**self.shared, **values}.values()])


class Apart(Exception):
    """Some configs can't train as one program; the message is the reason."""


def incompatibility(configs: Sequence[ConfigDict]) -> str | None:
    """The reason why configs can't train as one program; None if they can.

    They may differ in seeds, in real numbers of the optimizer and of the objective with its path,
    weight, times and wrappers, in the condition dropout, and in settings that only matter after
    training.

    Args:
        configs: resolved configs.

    Raises:
        UserError: one of the configs is invalid.

    Example:
        >>> from configs import digits
        >>> one, other, larger = (digits.get_config() for _ in range(3))
        >>> other.optimizer.learning_rate, larger.batch_size = 1e-4, 96
        >>> incompatibility([one, other]) is None
        True
        >>> incompatibility([one, larger])
        'batch_size: 64 there, 96 here'
    """
    try:
        _check_traceable(configs[0], numbers_of(configs))
    except Apart as reason:
        return str(reason)
    return None


def ensemble_groups(configs: Mapping[str, ConfigDict], most: int) -> list[tuple[str, ...]]:
    """Groups the names of configs that can train as one program.

    Each config joins the first group that it fits and that is not full; the order is kept.

    Args:
        configs: resolved configs by name.
        most: largest group size; 1 trains each config separately, 3 to 8 are typical.

    Example:
        >>> from configs import digits
        >>> configs = {name: digits.get_config() for name in "abcd"}
        >>> configs["b"].batch_size = 32
        >>> configs["c"].seed = 1
        >>> ensemble_groups(configs, most=2)
        [('a', 'c'), ('b',), ('d',)]
    """
    found: list[list[str]] = []
    for name, config in configs.items():
        for group in found:
            if len(group) < most and incompatibility([configs[group[0]], config]) is None:
                group.append(name)
                break
        else:
            found.append([name])
    return [tuple(group) for group in found]


def numbers_of(configs: Sequence[ConfigDict]) -> Numbers:
    """Divides the parts of all members into shared values and numbers that differ.

    Raises:
        Apart: the configs differ in something other than numbers.
    """
    first = configs[0]
    axes = ("fsdp", "tensor", "sequence")
    split = {axis: first.mesh[axis] for axis in axes if first.mesh.get(axis, 1) != 1}
    if split:
        raise Apart(f"mesh.{next(iter(split))}: an ensemble can't shard parameters over devices")
    if len(configs) > 1 and "nonfinite" in first and first.nonfinite.get("rollbacks"):
        raise Apart("nonfinite.rollbacks: members train in lockstep, so none can be rolled back")
    for config in configs[1:]:
        _check_alike(first, config)
    parts = [_parts(config) for config in configs]
    flat = [jax.tree_util.tree_flatten_with_path(part) for part in parts]
    for _, treedef in flat:
        if treedef != flat[0][1]:
            raise Apart("their objectives differ in values that are fixed at compilation")
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
    """Raises `Apart` if configs differ in anything other than the allowed real numbers.

    Configs are compared because they name classes. Tree structures do not: two dataclasses with
    equal static fields and equally many leaves have the same structure in JAX.
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

    return {
        name: hide(value) if name in _NUMBERED else value
        for name, value in tree.items()
        if name not in _PLAIN
    }


def _parts(config: ConfigDict) -> VaryingParts:
    return VaryingParts(build_objective(config), config.optimizer.to_dict(), dropout_of(config))


def _all_same(leaves: Sequence[Any]) -> bool:
    return all(type(leaf) is type(leaves[0]) and np.array_equal(leaf, leaves[0]) for leaf in leaves)


def _stacked(name: str, leaves: Sequence[Any]) -> np.ndarray:
    """Stacks one real number (or array) of each member.

    Raises:
        Apart: the values are not real numbers, or have different shapes.
    """
    arrays = [np.asarray(leaf) for leaf in leaves]
    if any(array.dtype.kind not in "fi" or array.shape != arrays[0].shape for array in arrays):
        raise Apart(f"{name}: {leaves[0]} in the first config, which is not a real number")
    return np.stack(arrays).astype(np.float32)


def _check_traceable(config: ConfigDict, numbers: Numbers) -> None:
    """Checks, by tracing a step of a one-parameter network, that the numbers can be arguments.

    Raises:
        Apart: the structure of the computation depends on one of the numbers.
    """
    teacher = config.teacher
    if not is_kept(teacher):
        raise Apart(
            f"config.teacher={teacher}: members that learn from a frozen teacher train apart"
        )
    if config.get("patience_evaluations"):
        raise Apart("config.patience_evaluations: members that may end at any step train apart")
    nonfinite: NonFinite = build(config.nonfinite) if "nonfinite" in config else NonFinite()

    traits = numbers.parts({k: v[0] for k, v in numbers.values.items()}).objective.traits

    def apply(params: Any, x: Array, *_: Any, hidden: bool = False, **how: Any) -> Any:
        out = params["w"] * jnp.repeat(x[..., :1], params["outputs"].shape[0], axis=-1)
        return (out, hidden_of(out, traits)) if hidden else out

    def probe(values: Mapping[str, Array], key: Array, batch: dict[str, Array]) -> Any:
        objective, optimizer, dropout = numbers.parts(values).built(config.num_steps)
        params = {"w": jnp.ones(()), "outputs": jnp.zeros(objective.traits.outputs)}
        params |= objective.init_params(key)
        averages = Averages.of(config)
        state = init_state(params, optimizer, averages, objective.init_memory(), nonfinite.init())
        settings = StepSettings(
            num_steps=config.num_steps,
            condition=Unconditional(),
            condition_dropout=dropout,
            averages=averages,
            teacher=teacher_name(teacher, averages),
            nonfinite=nonfinite,
        )
        return make_train_step(apply, objective, optimizer, settings)(state, key, batch)

    values = {name: value[0] for name, value in numbers.values.items()}
    image = jax.ShapeDtypeStruct((2, 8, 8, 1), jnp.float32)
    batch = {"image": image, "source": image}
    if traits.features:
        batch["features"] = jax.ShapeDtypeStruct((2, *traits.features), jnp.float32)
    try:
        jax.eval_shape(probe, values, jax.eval_shape(lambda: jax.random.key(0)), batch)
    except TypeError as error:  # JAX's errors about concrete values are all of this type.
        reason = str(error).splitlines()[0]
        raise Apart(
            f"{', '.join(values)}: the structure of the computation depends on it ({reason})"
        ) from error

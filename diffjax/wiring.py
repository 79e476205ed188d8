"""From a config to the objects it names: once, the same for training, sampling and evaluation."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from ml_collections import ConfigDict

from diffjax import choices
from diffjax.errors import UserError
from diffjax.objectives.denoising import Objective
from diffjax.process.paths import Path
from diffjax.process.precond import Apply, Precond
from diffjax.process.targets import undecodable
from diffjax.sampling.sample import Recipe
from diffjax.spec import build


class Wired(NamedTuple):
    """The parts of one experiment.

    Attributes:
        path: from data to noise.
        precond: what the network predicts.
        objective: what it is trained by.
        network: the Flax module.
        apply: the same behind a closure.
        recipe: how the run's own samples are drawn.
        image_shape: `(H, W, C)`.
        num_classes: 0 is unconditional.
        label_dropout: share of labels that training replaces by the null label.
        params_shape: shapes of the parameters, a tree of `ShapeDtypeStruct`.
    """

    path: Path
    precond: Precond
    objective: Objective
    network: nn.Module
    apply: Apply
    recipe: Recipe
    image_shape: tuple[int, int, int]
    num_classes: int
    label_dropout: float
    params_shape: Any

    def init(self, key: Array) -> Any:
        """Fresh parameters."""
        return self.network.init(key, *_example_inputs(self.image_shape))["params"]

    @property
    def num_params(self) -> int:
        """How many numbers the network learns."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.params_shape))


def wire(config: ConfigDict, image_shape: tuple[int, int, int], num_classes: int) -> Wired:
    """Builds everything that a config describes and checks that it fits together.

    Nothing is compiled or trained: shapes are checked abstractly.

    Args:
        config: resolved.
        image_shape: `(H, W, C)` of the data.
        num_classes: of the data; 0 is unconditional.

    Raises:
        UserError: an unknown name, an undecodable target, a size that does not divide.
    """
    path = build(config.path)
    precond = build(config.precond)
    check_target(path, precond)
    objective = build(config.objective, path=path, precond=precond)
    network = build(config.model, num_classes=num_classes)
    recipe = build(config.sampling)

    def apply(
        params: Any,
        x: Array,
        noise_label: Array,
        cond: Array | None,
        *,
        train: bool = False,
        key: Array | None = None,
    ) -> Array:
        rngs = None if key is None else {"dropout": key}
        return network.apply({"params": params}, x, noise_label, cond, train=train, rngs=rngs)

    shapes = jax.eval_shape(network.init, jax.random.key(0), *_example_inputs(image_shape))
    params = shapes["params"]
    wired = Wired(
        path=path,
        precond=precond,
        objective=objective,
        network=network,
        apply=apply,
        recipe=recipe,
        image_shape=image_shape,
        num_classes=num_classes,
        label_dropout=config.label_dropout,
        params_shape=params,
    )
    check_guidance(recipe.guidance_scale, wired)
    _check_loss(wired)
    return wired


def check_target(path: Path, precond: Precond) -> None:
    """Refuses a target that the path makes undecodable, naming those that would do."""
    reason = undecodable(path, precond.target)
    if reason:
        legal = [
            name
            for name, target in choices.TARGETS.items()
            if undecodable(path, build(target)) is None
        ]
        path_name = type(path).__name__
        raise UserError(
            f"target {type(precond.target).__name__} can't be used on path {path_name}: {reason}; "
            f"use --config.path.t_noise={0.999 * float(path.t_noise):.4g} "
            f"or a target of {', '.join(legal)}"
        )


def check_guidance(scale: float, wired: Wired) -> None:
    """Refuses guidance for a network that never saw the null label."""
    if scale == 1.0 or (wired.num_classes and wired.label_dropout):
        return
    why = "is trained with label_dropout=0" if wired.num_classes else "has no labels"
    raise UserError(
        f"guidance_scale={scale:g} needs a null label, but this network {why}; use 1, as in "
        "--config.sampling.guidance_scale=1"
    )


def _example_inputs(image_shape: tuple[int, ...]) -> tuple[Array, Array, Array]:
    return jnp.zeros((1, *image_shape)), jnp.zeros(1), jnp.zeros(1, jnp.int32)


def _check_loss(wired: Wired) -> None:
    """Traces the loss once, so that whatever can't fit fails here and not in the first step."""
    batch = {
        "image": jax.ShapeDtypeStruct((2, *wired.image_shape), jnp.float32),
        "label": jax.ShapeDtypeStruct((2,), jnp.int32),
    }
    params = wired.params_shape
    step = jnp.zeros((), jnp.int32)
    loss, _ = jax.eval_shape(
        lambda params, key, batch: wired.objective(wired.apply, params, params, key, batch, step),
        params,
        jax.eval_shape(lambda: jax.random.key(0)),
        batch,
    )
    if loss.shape != (2,):
        raise UserError(
            f"the objective gives a loss of shape {loss.shape} for 2 examples, not (2,)"
        )

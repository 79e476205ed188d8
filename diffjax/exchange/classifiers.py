"""Classifiers of noisy images, from published files, in the place of a weaker model."""

from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh

from diffjax.errors import UserError
from diffjax.models.adm.network import ADM, ADMClassifier
from diffjax.models.families import find_published
from diffjax.pretrained.placing import placed_like
from diffjax.process.paths import Pair, Path, coeffs
from diffjax.process.precond import Precond, Predict, time_of
from diffjax.runs.samples.model import Model, Programs
from diffjax.sampling.guidance import change_of_pair
from diffjax.training.sharding import replicated
from diffjax.wiring import Wired


@dataclass(frozen=True, eq=False)
class NoisyClassifier:
    """A classifier whose predictions are what it adds to those of the model that it guides.

    Attributes:
        network: `(x, noise label) -> logits`.
        path: the path of the model.
        precond: the preconditioning of the model, which has the classifier's noise labels as well.
    """

    network: Any
    path: Path
    precond: Precond

    def predict(self, params: Any, source: Array | None = None) -> Predict:
        """`(x, t, label) ->` the change of the pair with `∇ log p(label | x)` in the score."""
        del source

        def added(x: Array, t: Array, label: Any) -> Pair:
            c = coeffs(self.path, time_of(t), x.ndim)

            def log_probability(x: Array) -> Array:
                logits = self.network.apply({"params": params}, *self.precond.inputs(c, x))
                chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), label[:, None], axis=1)
                return jnp.sum(chosen)

            return change_of_pair(c, jax.grad(log_probability)(x))

        return added


def read_classifier(file: FilePath, wired: Wired, mesh: Mesh) -> Model:
    """The classifier in a file, for guidance of a network of the same images and classes.

    Raises:
        UserError: the file has no classifier, or one of other images, classes or noise.
    """
    found = find_published(file)
    network = getattr(found.network, "network", None)
    if not isinstance(network, ADMClassifier):
        raise UserError(f"{file} has a network of {found.family.name}, not a classifier")
    if not isinstance(wired.network, ADM):
        raise UserError(f"{file} guides networks of ADM, whose noise it has seen, and no other")
    for what, here, there in (
        ("image shape", wired.image_shape, found.network.image_shape),
        ("number of classes", getattr(wired.condition, "num_classes", 0), network.out_channels),
    ):
        if here != there:
            raise UserError(f"{file} can't guide this network: its {what} is {there}, not {here}")

    def placed(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated(mesh))

    like = jax.tree.map(placed, found.family.shapes(found.network))
    classifier: Any = NoisyClassifier(network, wired.path, wired.precond)
    return Model(Programs(classifier, mesh), found.params(placed_like(like)))

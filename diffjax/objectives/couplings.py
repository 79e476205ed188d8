"""Which noise goes with which image of a batch."""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.tree_util import register_dataclass
from jaxtyping import Float

from diffjax.compiling import implicit_promotion
from diffjax.errors import UserError
from diffjax.kinds import Positive
from diffjax.objectives.base import Batch, check_others
from diffjax.process.paths import Pair, Scalar
from diffjax.shapes import OneKey, Samples


class Coupling:
    """`(key, batch, noise[B, …]) -> Pair`: each clean image with the noise that it is mixed with.

    A subclass is a frozen dataclass with a `__call__`.

    Attributes:
        needs_source: whether the batch must hold the other end of each image, its `source`.
        starts_at_source: whether samples, too, start from a source and not from noise.
        independent_noise: whether the noise is independent of the image.
    """

    needs_source: bool = False
    starts_at_source: bool = False
    independent_noise: bool = False

    def __call__(self, key: OneKey, batch: Batch, noise: Samples) -> Pair:
        """Clean images and noise, `[B, …]` each; raises UserError if the batch has no source."""
        raise NotImplementedError


@register_dataclass
@dataclass(frozen=True)
class Independent(Coupling):
    """Each image with its own independent noise: the coupling of all diffusion models."""

    independent_noise = True

    def __call__(self, key: OneKey, batch: Batch, noise: Samples) -> Pair:
        del key
        return Pair(batch["image"], noise)


@register_dataclass
@dataclass(frozen=True)
class OptimalTransport(Coupling):
    """The permutation π of a batch's noise with the smallest sum of squared distances.

        min over π of Σ_i |x0_i - eps_π(i)|²

    The trajectories of the flow become straighter, so fewer steps are needed. Exact, by SciPy's
    linear assignment on the host: 1.3 ms for 128 images on one CPU core, growing with the cube of
    the batch. On several devices the whole batch is matched. Labels stay with their images. Tong et
    al. 2024 (arXiv:2302.00482), section 3.3; Pooladian et al. 2023 (arXiv:2304.14772).
    """

    def __call__(self, key: OneKey, batch: Batch, noise: Samples) -> Pair:
        del key
        costs = squared_distances(batch["image"], noise)
        chosen = jax.ShapeDtypeStruct((len(noise),), jnp.int32)
        return Pair(batch["image"], noise[jax.pure_callback(_assign, chosen, costs)])


@register_dataclass
@dataclass(frozen=True)
class OptimalTransportWithin(Coupling):
    """`OptimalTransport` among the examples of each condition alone, such as a class.

        min over π of Σ_i |x0_i - eps_π(i)|²   with   cond_i = cond_π(i)

    Across classes, the noise of a class would be a part of all noise, while samples of that class
    start from all of it. Within, each condition has normal noise of its own, and there is less to
    gain in straightness where a batch has few examples of each. Examples whose condition training
    drops are matched with each other. Conditions are the same where all of their arrays are equal:
    without any this is `OptimalTransport`, and where no two are equal `Independent`. The discrete
    case of C²OT, Cheng & Schwing 2025 (arXiv:2503.10636), section 3.

    Example:
        >>> batch = {"image": jnp.array([[0.0], [1.0], [2.0]]), "cond": jnp.array([0, 1, 0])}
        >>> noise = jnp.array([[9.0], [5.0], [7.0]])
        >>> pair = OptimalTransportWithin()(jax.random.key(0), batch, noise)
        >>> pair.eps.ravel().tolist()  # The image 1 keeps its own: it is alone in its class.
        [7.0, 5.0, 9.0]
    """

    def __call__(self, key: OneKey, batch: Batch, noise: Samples) -> Pair:
        del key
        costs = squared_distances(batch["image"], noise)
        chosen = jax.ShapeDtypeStruct((len(noise),), jnp.int32)
        conditions = jax.tree.leaves(batch["cond"])
        return Pair(batch["image"], noise[jax.pure_callback(_within, chosen, costs, *conditions)])


@register_dataclass
@dataclass(frozen=True)
class EntropicTransport(Coupling):
    """For each image one noise of the batch, drawn from the entropic transport plan.

        π_ij ∝ exp((f_i + g_j - C_ij)/ε)

    by Sinkhorn's algorithm (`ott-jax`), with `ε` in units of the standard deviation of the squared
    distances `C`. A noise may be drawn more than once. Tong et al. 2024 (arXiv:2302.00482),
    section 3.4.

    Attributes:
        epsilon: the strength of the entropy, above 0: small values approach `OptimalTransport`,
            large ones independent noise. Typically 0.01 to 1.
        max_iterations: the largest number of iterations of Sinkhorn's algorithm; small epsilon
            needs more.
    """

    epsilon: Positive[Scalar] = 0.1
    max_iterations: Positive[int] = field(default=200, metadata={"static": True})

    def __call__(self, key: OneKey, batch: Batch, noise: Samples) -> Pair:
        check_others(batch, "EntropicTransport")  # Distances of one image have no deviation.
        try:
            from ott.geometry.geometry import Geometry
            from ott.problems.linear.linear_problem import LinearProblem
            from ott.solvers.linear.sinkhorn import Sinkhorn
        except ImportError as error:
            raise UserError(
                "the coupling EntropicTransport needs ott-jax: pip install 'diffjax[ot]', "
                "or use coupling=ot, which does not need it"
            ) from error
        costs = squared_distances(batch["image"], noise)
        costs = costs / jnp.std(costs)
        epsilon: Any = self.epsilon  # may be traced; ott-jax declares a float
        with implicit_promotion():
            problem = LinearProblem(Geometry(costs, epsilon=epsilon))
            plan = Sinkhorn(max_iterations=self.max_iterations)(problem)
        logits = (plan.f[:, None] + plan.g[None, :] - costs) / self.epsilon
        return Pair(batch["image"], noise[jax.random.categorical(key, logits)])


@register_dataclass
@dataclass(frozen=True)
class Given(Coupling):
    """Each image with the noise that it was made from, the `source` in the data set.

    For reflow, which trains on pairs of noise and sample. Samples start from fresh noise. Liu et
    al. 2023 (arXiv:2209.03003).
    """

    needs_source = True

    def __call__(self, key: OneKey, batch: Batch, noise: Samples) -> Pair:
        del key, noise
        if "source" not in batch:
            raise UserError(
                f"the coupling Given needs a source for each image, but the data set has only "
                f"{', '.join(name for name in batch if name != 'cond')}; take a data set of pairs, "
                "or coupling=independent"
            )
        return Pair(batch["image"], batch["source"])


@register_dataclass
@dataclass(frozen=True)
class Translation(Given):
    """Each image with an image of another set, the `source` in the data set.

    Samples, too, start from a source.
    """

    starts_at_source = True


def squared_distances(x: Samples, y: Samples) -> Float[Array, " batch batch"]:
    """Squared distances `|x_i - y_j|²` of all pairs, `[B, B]`, for `[B, …]` each.

    Example:
        >>> squared_distances(jnp.array([[0.0], [1.0]]), jnp.array([[3.0], [1.0]])).tolist()
        [[9.0, 1.0], [4.0, 0.0]]
    """
    x, y = (jnp.reshape(side, (len(side), -1)) for side in (x, y))
    return jnp.sum(x**2, axis=1)[:, None] + jnp.sum(y**2, axis=1)[None] - 2.0 * x @ y.T


def _assign(costs: Array | np.ndarray) -> np.ndarray:
    # Imported here because it loads slowly, and most runs do not need it.
    from scipy.optimize import linear_sum_assignment

    return linear_sum_assignment(np.asarray(costs))[1].astype(np.int32)


def _within(costs: Array, *conditions: Array) -> np.ndarray:
    """The best permutation of those that keep each condition, int32 `[B]`."""
    groups = np.zeros(len(costs), int)
    for array in conditions:
        rows = np.asarray(array).reshape(len(costs), -1)
        which = np.unique(rows, axis=0, return_inverse=True)[1].reshape(-1)
        groups = np.unique(np.stack([groups, which]), axis=1, return_inverse=True)[1].reshape(-1)
    all_costs, chosen = np.asarray(costs), np.zeros(len(groups), np.int32)
    for group in range(groups.max(initial=0) + 1):
        rows = np.flatnonzero(groups == group)
        chosen[rows] = rows[_assign(all_costs[np.ix_(rows, rows)])]
    return chosen

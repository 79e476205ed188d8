"""muP: learning rates that pass from a narrow network to a wide one.

Of a kernel with `n` inputs, and `n0` in the network for which the rate was found, Adam's rate is
divided by `n/n0`. Why: a step of Adam moves each weight by about the rate η, and the moves of all
inputs of an output add up, so that the output moves by η·n, and by η·n0 with the divided rate.
Initial weights are independent of each other, and move an output by their deviation
times √n, so that of hidden kernels falls as 1/√n, as in the usual initialisation. A last layer that
begins at zero needs no factor of its own: dividing its rate is the same to Adam as dividing its
output. Kernels whose inputs do not grow (patches, noise labels), biases, scales and embeddings keep
their rate and initial deviation. Logits of heads that grow are divided by d and not by √d
(`diffjax.models.layers.common.as_of_head_width`).

Yang et al. 2022, "Tensor Programs V", arXiv:2203.03466, tables 3 and 8; Zheng et al. 2025, "Scaling
Diffusion Transformers Efficiently via μP", arXiv:2505.15270.
"""

import math
from typing import Any

import jax
import optax

from diffjax.errors import UserError
from diffjax.optimizers.base import Optimizer


def rate_factors(shapes: Any, base_shapes: Any) -> Any:
    """The factor of Adam's rate for each parameter, `n0/n` with the numbers of inputs of both.

    Args:
        shapes: the parameters of a network, arrays or their shapes. The last axis is that of the
            outputs, all axes before it are inputs, or are as long in both networks.
        base_shapes: those of the network for which the rate was found.

    Returns:
        A tree of floats like `shapes`.

    Example:
        >>> import jax.numpy as jnp
        >>> wide = {"kernel": jnp.ones((256, 1024)), "bias": jnp.ones(1024)}
        >>> rate_factors(wide, {"kernel": jnp.ones((64, 256)), "bias": jnp.ones(256)})
        {'bias': 1.0, 'kernel': 0.25}
    """

    def factor(leaf: Any, base: Any) -> float:
        return math.prod(base.shape[:-1]) / math.prod(leaf.shape[:-1])

    return jax.tree.map(factor, shapes, base_shapes)


def by_width(optimizer: Optimizer, factors: Any) -> Optimizer:
    """The optimizer with a factor of the rate for each parameter; its state has the same arrays.

    AdamW's weight decay is multiplied too, since it is a part of its step.

    Args:
        optimizer: with `steps_of_rate`.
        factors: from `rate_factors`.

    Raises:
        UserError: the steps of this optimizer are not of the size of its rate.

    Example:
        >>> import jax.numpy as jnp
        >>> from diffjax.optimizers.descent import descent
        >>> params = {"kernel": jnp.zeros((2, 1)), "bias": jnp.zeros(1)}
        >>> step = by_width(descent(1, warmup_steps=0), {"kernel": 0.25, "bias": 1.0}).transform
        >>> moved, _ = step.update(jax.tree.map(jnp.ones_like, params), step.init(params), params)
        >>> [round(float(moved[name].ravel()[0]), 6) for name in ("kernel", "bias")]
        [-0.00025, -0.001]
    """
    if not optimizer.steps_of_rate:
        raise UserError(
            "config.model.base_width: muP has factors for the rates of adamw, adam and lion alone; "
            "take one of them, or base_width=0"
        )

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        steps, state = optimizer.transform.update(updates, state, params)
        # Those of rate 1 are not touched, so that a network of the base width trains bit by bit as
        # without.
        return jax.tree.map(lambda x, k: x if k == 1 else x * k, steps, factors), state

    transform = optax.GradientTransformation(optimizer.transform.init, update)
    return optimizer._replace(transform=transform)

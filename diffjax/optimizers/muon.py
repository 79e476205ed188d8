"""Muon: updates of matrices with nearly equal singular values; AdamW for other parameters."""

import re
from collections.abc import Hashable
from typing import Any

import jax
import optax
from optax.contrib import MuonDimensionNumbers

from diffjax.kinds import Decay, Limit, NotNegative, Positive
from diffjax.optimizers.base import Optimizer, clip_by_norm
from diffjax.optimizers.schedules import Constant, Schedule, warmed_up

BY_ADAMW = ("embedding", "^conv_in/", "^final_out/", "^final_conv/")
"""Kernels that Muon leaves to AdamW, as patterns in their paths: embeddings, also those of patches;
the first layer, which reads channels; the last, which writes them."""
_STACKED = re.compile("(^|/)blocks/")  # The first axis of kernels there is that of the blocks.


def muon(
    num_steps: int,
    learning_rate: NotNegative[float] = 0.02,
    warmup_steps: NotNegative[int] = 100,
    schedule: Schedule = Constant(),
    momentum: Decay[float] = 0.95,
    weight_decay: NotNegative[float] = 0.0,
    adamw_learning_rate: NotNegative[float] = 3e-4,
    adamw_b1: Decay[float] = 0.9,
    adamw_b2: Decay[float] = 0.95,
    adamw_weight_decay: NotNegative[float] = 0.0,
    by_adamw: tuple[str, ...] = BY_ADAMW,
    eps: Positive[float] = 1e-8,
    clip_norm: Limit[float] = 1.0,
) -> Optimizer:
    """Muon for the matrices inside a network, AdamW for the rest (Jordan et al. 2024).

        m ← momentum·m + (1 − momentum)·g
        U·S·Vᵀ = momentum·m + (1 − momentum)·g                    (singular values)
        W ← W − rate·(√max(1, out/in)·U·Vᵀ + weight_decay·W)

    U·Vᵀ is approximated by five Newton-Schulz iterations, which leave singular values of 0.7 to
    1.2 or so. https://kellerjordan.github.io/posts/muon; `optax.contrib.muon` computes it.

    Muon takes each array that is named `kernel` and has two axes or more, except those in
    `by_adamw`. The last axis is the matrix's outputs, all axes before it together its inputs: a
    convolution `[h, w, in, out]` is one matrix of `h·w·in` rows. Stacked blocks
    (`config.model.scan`) are one matrix each. All others (biases, scales, embeddings, the first and
    the last layer, what an objective learns itself) are AdamW's, as the authors advise.

    Args:
        num_steps: training steps, the schedule's length.
        learning_rate: Muon's peak, at least 0; by default the authors' 0.02. It is the rate that is
            logged, and can't be compared with AdamW's.
        warmup_steps: the n-th of them has n/warmup_steps of the peak, of both rates; 0 for none.
        schedule: of both rates after the warm-up.
        momentum: decay of the mean gradient, from 0 to below 1.
        weight_decay: of Muon's matrices, per step, times its rate; 0 to 0.1.
        adamw_learning_rate: AdamW's peak, at least 0.
        adamw_b1: decay of AdamW's first moment, from 0 to below 1.
        adamw_b2: decay of AdamW's second moment, from 0 to below 1.
        adamw_weight_decay: of AdamW's parameters, per step, times its rate.
        by_adamw: patterns; a kernel whose path, as `block_0/mlp/up/kernel`, contains one is
            AdamW's. Name the first and last layer of a network of your own.
        eps: added to the norm of a matrix, and to the root of AdamW's second moment; above 0.
        clip_norm: largest global norm of the gradient, above 0; `inf` clips nothing. Muon's steps
            do not depend on the size of a gradient, only on its share in the mean.
    """
    rate = warmed_up(schedule, learning_rate, warmup_steps, num_steps)
    adamw_rate = warmed_up(schedule, adamw_learning_rate, warmup_steps, num_steps)
    rules: dict[Hashable, Any] = {
        "muon": optax.contrib.muon(
            rate,
            beta=momentum,
            eps=eps,
            weight_decay=weight_decay,
            muon_weight_dimension_numbers=lambda params: matrices(params, by_adamw),
        ),
        # Optax has one of its own in there, but with Nesterov's momentum.
        "adamw": optax.adamw(adamw_rate, adamw_b1, adamw_b2, eps, weight_decay=adamw_weight_decay),
    }

    def rule_of(params: Any) -> Any:
        axes = matrices(params, by_adamw)
        return jax.tree.map(lambda axes: "muon" if axes else "adamw", axes, is_leaf=is_axes)

    step = optax.partition(rules, rule_of)
    return Optimizer(optax.chain(clip_by_norm(clip_norm), step), rate)


def is_axes(leaf: Any) -> bool:
    """Whether a part of what `matrices` returns is a leaf: axes of a matrix, or None."""
    return leaf is None or isinstance(leaf, MuonDimensionNumbers)


def matrices(params: Any, by_adamw: tuple[str, ...] = BY_ADAMW) -> Any:
    """Which parameters are Muon's, and which of their axes are inputs and outputs.

    Args:
        params: arrays, or their shapes.
        by_adamw: patterns in the paths of kernels that AdamW updates.

    Returns:
        A tree like `params` of `MuonDimensionNumbers`, and None for what is AdamW's.

    Example:
        >>> import jax.numpy as jnp
        >>> matrices({"up": {"kernel": jnp.ones((3, 3, 8, 16)), "bias": jnp.ones(16)}})["up"]
        {'bias': None, 'kernel': MuonDimensionNumbers(reduction_axis=(0, 1, 2), output_axis=3)}
    """

    def matrix(path: tuple, leaf: Any) -> MuonDimensionNumbers | None:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        first = 1 if _STACKED.search(name) else 0
        is_kernel = name.rpartition("/")[2] == "kernel" and leaf.ndim - first >= 2
        if not is_kernel or any(re.search(pattern, name) for pattern in by_adamw):
            return None
        return MuonDimensionNumbers(tuple(range(first, leaf.ndim - 1)), leaf.ndim - 1)

    return jax.tree_util.tree_map_with_path(matrix, params)

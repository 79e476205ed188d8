"""Muon: updates of matrices with nearly equal singular values; AdamW for other parameters."""

import re
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import jax
import optax
from optax.contrib import MuonDimensionNumbers

from diffjax.kinds import Decay, NotNegative, Positive
from diffjax.optimizers.adam import AdamW
from diffjax.optimizers.base import Optimizer

BY_ADAMW = ("embedding", "^conv_in/", "^final_out/", "^final_conv/")
"""Kernels that Muon leaves to AdamW, as patterns in their paths: embeddings, also those of patches;
the first layer, which reads channels; the last, which writes them."""
_STACKED = re.compile("(^|/)blocks/")  # The first axis of kernels there is that of the blocks.


@dataclass(frozen=True)
class Muon:
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

    The learning rate is Muon's, 0.02 in the authors' code, and can't be compared with AdamW's; it
    is the one that is logged. Muon's steps do not depend on the size of a gradient, only on its
    share in the mean.

    Args:
        momentum: decay of the mean gradient, from 0 to below 1.
        weight_decay: the weight decay of Muon's matrices, per step, times its rate; 0 to 0.1.
        eps: added to the norm of a matrix, above 0.
        adamw: the rule of the other parameters.
        adamw_share: its rate over Muon's, at least 0; by default 3e-4 of AdamW to 0.02 of Muon.
        by_adamw: patterns; a kernel whose path, as `block_0/mlp/up/kernel`, contains one is
            AdamW's. Name the first and last layer of a network of your own.
    """

    momentum: Decay[float] = 0.95
    weight_decay: NotNegative[float] = 0.0
    eps: Positive[float] = 1e-8
    adamw: AdamW = AdamW(b2=0.95)
    adamw_share: NotNegative[float] = 0.015
    by_adamw: tuple[str, ...] = BY_ADAMW

    def __call__(self, rate: optax.Schedule) -> Optimizer:
        rules: dict[Hashable, Any] = {
            "muon": optax.contrib.muon(
                rate,
                beta=self.momentum,
                eps=self.eps,
                weight_decay=self.weight_decay,
                muon_weight_dimension_numbers=lambda params: matrices(params, self.by_adamw),
            ),
            # Optax has one of its own in there, but with Nesterov's momentum.
            "adamw": self.adamw(lambda step: self.adamw_share * rate(step)).transform,
        }

        def rule_of(params: Any) -> Any:
            axes = matrices(params, self.by_adamw)
            return jax.tree.map(lambda axes: "muon" if axes else "adamw", axes, is_leaf=is_axes)

        return Optimizer(optax.partition(rules, rule_of), rate)


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

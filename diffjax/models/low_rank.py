"""LoRA: changes of low rank of a network's layers, which are trained in the place of their kernels.

    y = W x + b + scale * B A dropout(x)      A [rank, in], B [out, rank], scale = alpha / rank

Of a convolution A is one too, with the window of W, and B has a window of one pixel. The two lie
beside the kernel, as `qkv/lora_a` `[..., in, rank]` and `qkv/lora_b` `[rank, out]`, so that
networks, checkpoints and averages treat them as any parameter. Hu et al. 2021, arXiv:2106.09685.

Layers that normalise their weights (`diffjax.models.layers.magnitude`, EDM2) normalise the sum
`W + scale * B A`, so they are the layers with that kernel too. Without inputs of A there, nothing
is dropped.
"""

import difflib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util
from flax.linen import initializers

from diffjax.errors import UserError, nearest
from diffjax.kinds import Decay, NotNegative
from diffjax.models.layers.common import rows_as_one
from diffjax.models.layers.magnitude import MPConv, MPDense

A, B = "lora_a", "lora_b"
"""The names of the two matrices, beside that of their kernel."""
KERNEL = "kernel"
_AS_IN_TORCH = initializers.variance_scaling(1 / 3, "fan_in", "uniform")
"""Uniform in ±1/√fan_in: Kaiming's with a = √5, as torch begins layers and peft begins A."""
_NORMALISED = MPDense | MPConv


@dataclass(frozen=True)
class LoraLayers:
    """Which dense layers and convolutions have LoRA, and of which rank.

    B begins at 0, so that the network begins as it was, and A uniform in ±1/√(inputs), as in peft;
    in ±1 where the layer divides by √(inputs) itself (EDM2).

    Args:
        rank: the rank of each change; 4 to 128 is usual, and 0 is no LoRA.
        alpha: `scale = alpha / rank`; the rank or twice the rank is usual, and 0 is the rank.
        dropout: the share of a layer's inputs that training leaves out for A and B; 0 to 0.1.
            Layers that normalise their weights leave none out.
        layers: patterns as of shells, joined by commas, of the paths of layers, as
            `*attention*,*/mlp/*`; `*` matches `/` as well. Stacked blocks (`scan`) are `blocks/…`.

    References:
        Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021, arXiv:2106.09685
    """

    rank: NotNegative[int] = 0
    alpha: NotNegative[float] = 0.0
    dropout: Decay[float] = 0.0
    layers: str = "*"

    @property
    def scale(self) -> float:
        """The factor of `B A`.

        Example:
            >>> LoraLayers(rank=8, alpha=16.0).scale, LoraLayers(rank=8).scale
            (2.0, 1.0)
        """
        return self.alpha / self.rank if self.alpha else 1.0

    def trainable(self, others: str) -> str:
        """Patterns of the parameters that are trained: A and B, and those of `config.trainable`.

        Example:
            >>> LoraLayers(rank=8).trainable("final_*"), LoraLayers().trainable("")
            ('*/lora_a,*/lora_b,final_*', '')
        """
        if not self.rank:
            return others
        return ",".join([f"*/{A}", f"*/{B}", *filter(None, [others])])

    def on(self, train: bool = False) -> AbstractContextManager[Any]:
        """A context in which networks are initialised and evaluated with their changes.

        Args:
            train: whether inputs are dropped, with the key `dropout` of the network.
        """
        return nn.intercept_methods(_adding(self, train)) if self.rank else nullcontext()

    def check(self, params: Any, initialised: Callable[["LoraLayers"], Any]) -> None:
        """Refuses settings without effect, and patterns that no layer matches.

        Args:
            params: the parameters of a network that was initialised with these.
            initialised: the shapes of the parameters with other ones, for the nearest name.

        Raises:
            UserError: the first of them.
        """
        if not self.rank:
            for name in ("alpha", "dropout", "layers"):
                if (value := getattr(self, name)) != getattr(LoraLayers(), name):
                    raise UserError(
                        f"config.lora.{name}={value} has no effect with rank 0, which is no LoRA: "
                        "set --config.lora.rank=8"
                    )
            return
        there = lora_layers(params)
        for pattern in _patterns(self.layers):
            if not any(fnmatchcase(layer, pattern) for layer in there):
                known = lora_layers(initialised(LoraLayers(rank=1)))
                raise UserError(
                    f"config.lora.layers: no dense layer or convolution matches {pattern!r}; "
                    f"{_nearest(pattern, known)}"
                )

    def merged(self, params: Any) -> Any:
        """The parameters without A and B, whose product is in the kernels: `W + scale * B A`.

        The sums are float32 where A and B are.

        Example:
            >>> ones = jnp.ones((2, 2))
            >>> params = {"fc": {"kernel": ones, "lora_a": ones[:, :1], "lora_b": ones[:1]}}
            >>> LoraLayers(rank=1, alpha=3.0).merged(params)["fc"]["kernel"][0].tolist()
            [4.0, 4.0]
        """
        if not isinstance(params, Mapping):
            return params
        whole = {name: self.merged(x) for name, x in params.items() if name not in (A, B)}
        if B in params:
            kernel = params[KERNEL]
            change = self.scale * product(params[A], params[B])
            whole[KERNEL] = (kernel.astype(change.dtype) + change).astype(kernel.dtype)
        return whole


def product(a: Any, b: Any) -> Any:
    """`B A` with the axes of the kernel, `[(blocks,) *window, in, out]`.

    Example:
        >>> product(jnp.ones((7, 3, 3, 4, 2)), jnp.ones((7, 2, 5))).shape
        (7, 3, 3, 4, 5)
    """
    ones = (1,) * (a.ndim - b.ndim)
    return a @ b.reshape(*b.shape[:-2], *ones, *b.shape[-2:])


def lora_layers(params: Any) -> list[str]:
    """The paths of the layers that have LoRA.

    Example:
        >>> lora_layers({"fc": {"kernel": 0, "lora_a": 0, "lora_b": 0}, "out": {"kernel": 0}})
        ['fc']
    """
    names: Any = traverse_util.flatten_dict(params, sep="/")
    return [name.removesuffix(f"/{B}") for name in names if name.endswith(f"/{B}")]


def without_lora(params: Any) -> Any:
    """The parameters of the network as it is without LoRA.

    Example:
        >>> without_lora({"fc": {"kernel": 0, "lora_a": 0, "lora_b": 0}})
        {'fc': {'kernel': 0}}
    """
    if not isinstance(params, Mapping):
        return params
    return {name: without_lora(x) for name, x in params.items() if name not in (A, B)}


def _adding(lora: LoraLayers, train: bool) -> Callable[..., Any]:
    patterns = _patterns(lora.layers)

    def is_new(module: nn.Module) -> bool:
        return module.is_initializing() and any(
            fnmatchcase("/".join(module.path), pattern) for pattern in patterns
        )

    def added(
        call: Callable[..., Any],
        args: tuple,
        kwargs: dict,
        context: nn.module.InterceptorContext,
    ) -> Any:
        out, layer = call(*args, **kwargs), context.module
        normalised = isinstance(layer, _NORMALISED)
        if context.method_name != (KERNEL if normalised else "__call__") or not _can_have(layer):
            return out
        if not (layer.has_variable("params", B) or is_new(layer)):
            return out
        kernel = layer.get_variable("params", KERNEL)
        begin = _in_units if normalised else _AS_IN_TORCH
        a: Any = layer.param(A, begin, (*kernel.shape[:-1], lora.rank))
        b: Any = layer.param(B, initializers.zeros, (lora.rank, kernel.shape[-1]))
        if normalised:
            return out + lora.scale * product(a, b)
        (x,) = args
        if train and lora.dropout:
            keep = 1.0 - lora.dropout
            kept = jax.random.bernoulli(layer.make_rng("dropout"), keep, x.shape)
            x = jnp.where(kept, x / keep, 0).astype(x.dtype)
        down = layer.clone(parent=None, name=None, features=lora.rank, use_bias=False)
        hidden: Any = down.apply({"params": {KERNEL: a}}, x)
        contracted = ((hidden.ndim - 1,), (0,)), ((), ())
        return out + lora.scale * rows_as_one(hidden, b.astype(hidden.dtype), contracted)

    return added


def _can_have(layer: nn.Module) -> bool:
    """Whether it is a layer within a network that has one kernel for all of its output."""
    if not isinstance(layer, nn.Dense | nn.Conv | _NORMALISED) or not layer.path:
        return False
    return getattr(layer, "feature_group_count", 1) == 1


def _in_units(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Uniform in ±1: of a kernel that is divided by √fan_in when it is used, as elsewhere."""
    return jax.random.uniform(key, shape, minval=-1.0)


def _patterns(layers: str) -> list[str]:
    return [pattern.strip() for pattern in layers.split(",")]


def _nearest(pattern: str, known: list[str]) -> str:
    if not known:
        return "this network has none that LoRA can change"
    parts = {part for name in known for part in (name, *name.split("/"))}
    close = difflib.get_close_matches(pattern.strip("*/"), sorted(parts), n=1)
    return nearest(pattern.strip("*/"), close or {name.split("/")[0] for name in known})

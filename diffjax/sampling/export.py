"""Samplers as files that JAX alone can run, on any platform and for any batch size.

Such a file contains the program and its weights as StableHLO, by `jax.export`, which guarantees
that later versions of JAX run it for at least half a year, on any of its platforms.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, export

from diffjax.conditions import Condition
from diffjax.errors import UserError, nearest

PLATFORMS = ("cpu", "cuda", "tpu")
_MOST_BYTES = 2**31 - 2**26


def serialise(
    sampler: Callable[..., Array],
    image_shape: tuple[int, ...],
    condition: Condition,
    *,
    source: tuple[int, ...] | None = None,
    noise: bool = False,
    platforms: Sequence[str] = PLATFORMS,
) -> bytes:
    """A sampler as the bytes that `jax.export.deserialize` reads, for batches of any size.

    Args:
        sampler: `(seed, condition of b rows) -> [b, H, W, C]`, its weights inside, as NumPy arrays.
        image_shape: `(H, W, C)` of the noise.
        condition: the kind of its condition. One that is no single array becomes a dict of the
            arrays in `condition.shapes`.
        source: the shape of each row of a third argument, what an image is made from, if there
            is one.
        noise: the first argument is standard normal noise `[b, H, W, C]` and no seed.
        platforms: the platforms that can run it, by their names in JAX.

    Raises:
        UserError: `flatbuffers` is missing; a platform is unknown; a part of the sampler depends on
            this machine, this platform, or a batch size.

    Example:
        >>> from diffjax.conditions import Classes
        >>> code = serialise(lambda noise, cond: 2 * noise, (4, 4, 1), Classes(3), noise=True)
        >>> twice = export.deserialize(bytearray(code))
        >>> twice.platforms, twice.call(jnp.ones((3, 4, 4, 1)), jnp.zeros(3, jnp.int32)).shape
        (('cpu', 'cuda', 'tpu'), (3, 4, 4, 1))
    """
    for platform in platforms:
        if platform not in (*PLATFORMS, "rocm"):
            known = nearest(platform, [*PLATFORMS, "rocm"])
            raise UserError(f"no platform {platform!r} to export to; {known}")
    try:
        import flatbuffers  # noqa: F401
    except ImportError as error:
        raise UserError(
            "exporting needs flatbuffers: pip install 'diffjax[export]', or flatbuffers itself"
        ) from error
    (b,) = export.symbolic_shape("b")

    def rows(shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((b, *shape), jnp.float32)

    seed = jax.ShapeDtypeStruct((), jnp.uint32)
    cond, call = condition.abstract(b), sampler
    if not isinstance(cond, jax.ShapeDtypeStruct):  # JAX alone knows arrays and dicts of them.
        cond = Condition.arrays(condition, cond)

        def call(first: Array, arrays: Any, *source: Array) -> Array:
            return sampler(first, condition.of_batch(arrays), *source)

    first, sources = rows(image_shape) if noise else seed, [] if source is None else [rows(source)]
    arguments = (first, cond, *sources)
    try:
        exported = export.export(jax.jit(call), platforms=platforms)(*arguments)
        return bytes(exported.serialize())
    # JAX raises these types for what it can't export.
    except (TypeError, ValueError, NotImplementedError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"this sampler can't be exported to {', '.join(platforms)}: {reason[:200]}"
        ) from error


def check_export_size(params: Any) -> None:
    """Refuses weights that are too large for one file, before anything is traced.

    Raises:
        UserError: they are larger than 2 GB.
    """
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
    if size > _MOST_BYTES:
        raise UserError(
            f"the weights are {size / 2**30:.1f} GB, and an exported file holds less than 2: "
            "sample with experiments.sample"
        )

"""The layout of the files of pytorch-fid and torch-fidelity.

Its logits have a bias that the Inception score leaves out, and so does this table.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from diffjax.models.inception.network import SIZE, InceptionV3
from diffjax.models.inception.sizes import SIZES
from diffjax.pretrained.family import Family
from diffjax.pretrained.tables import Row
from diffjax.pretrained.transforms import conv, dense, keep

_UNIT = (
    ("conv.weight", "conv/kernel", conv),
    ("bn.weight", "norm/scale", keep),
    ("bn.bias", "norm/bias", keep),
    ("bn.running_mean", "norm/mean", keep),
    ("bn.running_var", "norm/variance", keep),
)

TABLE = (
    *(Row(f"{{layer:s}}.{theirs}", f"{{layer:s}}/{ours}", how) for theirs, ours, how in _UNIT),
    *(
        Row(f"{{block:s}}.{{branch:s}}.{theirs}", f"{{block:s}}/{{branch:s}}/{ours}", how)
        for theirs, ours, how in _UNIT
    ),
    Row("fc.weight", "fc/kernel", dense),
)


def _recognise(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    del shapes  # There is one size.
    return {}


def _inputs(network: InceptionV3) -> tuple[jax.ShapeDtypeStruct]:
    return (jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), jnp.float32),)


FAMILY = Family(
    "Inception",
    InceptionV3,
    SIZES,
    lambda _: TABLE,
    _recognise,
    _inputs,
    unused=("fc.bias", "*.num_batches_tracked", "AuxLogits.*"),
)

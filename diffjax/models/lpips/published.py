"""The layouts of the published weights: of `lpips`, and torchvision's file beside that of heads.

- `lpips.LPIPS(net="vgg")` has all in one: `net.slice2.5.weight`, `lin1.model.1.weight`.
- The package itself ships the weights of channels alone (`lin1.model.1.weight`), and takes the
  convolutions of torchvision's VGG16, `features.5.weight`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from diffjax.errors import UserError
from diffjax.models.lpips.network import LPIPS, STAGES, convolutions
from diffjax.models.lpips.sizes import SIZES
from diffjax.pretrained.family import Family
from diffjax.pretrained.files import read_state_dict
from diffjax.pretrained.tables import Row, layer
from diffjax.pretrained.transforms import conv, reshape

TABLE = (
    *(
        row
        for stage, i, place in convolutions()
        for row in layer(f"net.slice{stage + 1}.{place}", f"vgg/conv_{stage}_{i}", conv)
    ),
    *(
        Row(f"lin{stage}.model.1.weight", f"weights_{stage}", reshape((-1,), (1, -1, 1, 1)))
        for stage in range(len(STAGES))
    ),
)


def _recognise(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    # Of the last stage, for another network has a first convolution too.
    width = shapes["net.slice5.28.weight"][0] // STAGES[-1][0]
    return {} if width == LPIPS.width else {"width": width}


def _inputs(network: LPIPS) -> tuple[jax.ShapeDtypeStruct, ...]:
    del network
    return (jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32),) * 2


FAMILY = Family(
    "LPIPS",
    LPIPS,
    SIZES,
    lambda _: TABLE,
    _recognise,
    _inputs,
    # Constants; and the second list of the same weights of channels.
    unused=("scaling_layer.*", "lins.*"),
)


def read(path: str | Path, heads: str | Path = "") -> tuple[LPIPS, Any]:
    """Reads LPIPS from one file with all, or from torchvision's VGG16 and a file of heads.

    Args:
        path: the path of a file with all weights, or of torchvision's VGG16.
        heads: the path of the file with the weights of the channels, for torchvision's VGG16.

    Returns:
        The network and its parameters.

    Raises:
        UserError: a file can't be read, or has other tensors.
    """
    state = read_state_dict(path)
    if "features.0.weight" in state:
        if not heads:
            raise UserError(
                f"{path} is torchvision's VGG16, without the weights of channels of LPIPS: set "
                "heads to lpips/weights/v0.1/vgg.pth of the package lpips"
            )
        places = {f"features.{n}": f"net.slice{stage + 1}.{n}" for stage, _, n in convolutions()}
        state = {
            f"{places[layer]}.{kind}": tensor
            for layer, kind, tensor in ((*name.rsplit(".", 1), x) for name, x in state.items())
            if layer in places
        }
    if heads:
        state = {**state, **read_state_dict(heads)}
    network = FAMILY.network_of(state, str(path))
    return network, FAMILY.to_ours(state, network, str(path))

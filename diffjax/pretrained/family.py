"""A family of published networks: its sizes, and the names of its tensors elsewhere."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.errors import UserError, nearest
from diffjax.pretrained.files import read_state_dict
from diffjax.pretrained.tables import Table, to_ours, to_theirs

Shapes = Mapping[str, tuple[int, ...]]
"""Shapes of published tensors by name."""

ImageShape = tuple[int, int, int]
"""`(H, W, C)` of a network's input."""


@dataclass(frozen=True)
class Size:
    """A published size of a network.

    Attributes:
        settings: the settings of the network.
        image_shape: `(H, W, C)` of its input.
        num_parameters: the number of its parameters here.
        address: the URL of its published file; "" where there is none.
        sha256: hex digest of that file; "" where it is unknown.
    """

    settings: Mapping[str, Any]
    image_shape: ImageShape
    num_parameters: int
    address: str = ""
    sha256: str = ""


class Architecture(NamedTuple):
    """What weights fit: a network, and the shape of its input, on which some of them depend."""

    network: Any
    image_shape: ImageShape


def image_alone(image_shape: ImageShape) -> tuple[jax.ShapeDtypeStruct]:
    """The arguments of a network that is evaluated on images."""
    return (jax.ShapeDtypeStruct((1, *image_shape), jnp.float32),)


def denoiser_inputs(image_shape: ImageShape) -> tuple[jax.ShapeDtypeStruct, ...]:
    """The arguments of a network that is evaluated on images, noise labels and class labels."""
    noise_label, label = (jax.ShapeDtypeStruct((1,), kind) for kind in (jnp.float32, jnp.int32))
    return *image_alone(image_shape), noise_label, label


@dataclass(frozen=True)
class Family:
    """A published network: one folder in `diffjax/models/` with three files.

    `network.py` has the module, `sizes.py` the published sizes, and `published.py` the table of
    foreign names and this record, `FAMILY`.

    Attributes:
        name: for errors.
        network: the module: `network(**settings)`.
        sizes: the published sizes by name.
        table: the rows for an architecture; a constant unless layouts depend on it.
        recognise: shapes of published tensors -> the settings and the shape of the input that
            follow from them. A `KeyError` says that the tensors are of another family.
        inputs: shape of the input -> the arguments of a call of the network.
        unused: patterns of the names of tensors that are left out, such as `text_model.*`.
    """

    name: str
    network: Callable[..., Any]
    sizes: Mapping[str, Size]
    table: Callable[[Architecture], Table]
    recognise: Callable[[Shapes], tuple[Mapping[str, Any], ImageShape]]
    inputs: Callable[[ImageShape], Sequence[jax.ShapeDtypeStruct]] = image_alone
    unused: tuple[str, ...] = ()

    def size(self, name: str) -> Architecture:
        """The architecture of a published size.

        Raises:
            UserError: no size has this name.
        """
        if name not in self.sizes:
            raise UserError(
                f"no {self.name} network is called {name!r}; {nearest(name, self.sizes)}"
            )
        size = self.sizes[name]
        return Architecture(self.network(**size.settings), size.image_shape)

    def of_state(self, state: Mapping[str, Any], source: str) -> Architecture:
        """The architecture that published tensors belong to, recognised by their shapes.

        Settings without a trace in the shapes, such as the number of heads, are those of the
        published size with the same shapes.

        Args:
            state: arrays or tensors of a file, by name.
            source: name of the file, for errors.

        Raises:
            UserError: the tensors are of another family, or of no published size.
        """
        try:
            found, image_shape = self.recognise({name: tuple(x.shape) for name, x in state.items()})
        except KeyError as error:
            raise UserError(
                f"{source} is not of the family {self.name}: it lacks {error}"
            ) from error
        except (LookupError, ValueError) as error:
            raise UserError(f"{source} is not of the family {self.name}: {error}") from error
        for size in self.sizes.values():
            if all(found.get(name, value) == value for name, value in size.settings.items()):
                return Architecture(self.network(**{**size.settings, **found}), image_shape)
        settings = ", ".join(f"{name}={value}" for name, value in found.items())
        raise UserError(f"{source} is of no published size of {self.name}: it has {settings}")

    def shapes(self, architecture: Architecture) -> Any:
        """The parameters of a network as `jax.ShapeDtypeStruct`, without computing them."""
        network, image_shape = architecture
        return jax.eval_shape(network.init, jax.random.key(0), *self.inputs(image_shape))["params"]

    def to_ours(self, state: Mapping[str, Any], architecture: Architecture, source: str) -> Any:
        """Converts published tensors to parameters; see `diffjax.pretrained.tables.to_ours`."""
        table, expected = self.table(architecture), self.shapes(architecture)
        return to_ours(state, table, expected, source, self.unused)

    def to_theirs(self, params: Any, architecture: Architecture) -> dict[str, np.ndarray]:
        """Converts parameters to published tensors, all but the unused ones."""
        return to_theirs(params, self.table(architecture))

    def read(
        self, path: str | Path, architecture: Architecture | None = None
    ) -> tuple[Architecture, Any]:
        """Reads a published file.

        Args:
            path: of the file, of torch or safetensors.
            architecture: what it should be; by default it is recognised by the shapes.

        Returns:
            The architecture and the parameters.

        Raises:
            UserError: the file can't be read, or is of another network.
        """
        state = read_state_dict(path)
        if architecture is None:
            architecture = self.of_state(state, str(path))
        return architecture, self.to_ours(state, architecture, str(path))

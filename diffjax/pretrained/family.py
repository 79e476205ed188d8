"""A family of published networks: its sizes, and the names of its tensors elsewhere."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.errors import UserError, nearest
from diffjax.pretrained.files import read_state_dict
from diffjax.pretrained.tables import Table, to_ours, to_theirs


@dataclass(frozen=True)
class Size:
    """A published size of a network.

    Attributes:
        settings: the settings of the network.
        num_parameters: the number of its parameters here.
        address: the URL of its published file; "" if it has no such file.
        sha256: hex digest of that file.
    """

    settings: Mapping[str, Any]
    num_parameters: int
    address: str = ""
    sha256: str = ""

    @property
    def of_network(self) -> dict[str, Any]:
        """The settings of the module alone, for a config: without those that the data decide."""
        of_data = "image_shape", "num_classes"
        return {name: value for name, value in self.settings.items() if name not in of_data}


@dataclass(frozen=True)
class Denoiser:
    """A network of a family whose published tensors depend on the shape of its images too.

    Attributes:
        network: the module, called with images, noise labels and class labels.
        image_shape: `(H, W, C)` of its images.
    """

    network: Any
    image_shape: tuple[int, int, int]

    def init(self, key: jax.Array, *inputs: Any) -> Any:
        """Initialises the network."""
        return self.network.init(key, *inputs)

    @property
    def inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """The arguments of its call: images, noise labels, class labels."""
        shapes = ((1, *self.image_shape), (1,), (1,))
        kinds = (jnp.float32, jnp.float32, jnp.int32)
        return tuple(map(jax.ShapeDtypeStruct, shapes, kinds))


@dataclass(frozen=True)
class Family:
    """A published network: one folder in `diffjax/models/` with three files.

    `network.py` has the module, `sizes.py` the published sizes, and `published.py` the table of
    foreign names and this record, `FAMILY`.

    Attributes:
        name: for errors.
        network: `network(**settings)` is the module, or a `Denoiser`.
        sizes: the published sizes by name.
        table: the rows for a network; constant unless the order of its tensors depends on it.
        recognise: shapes of published tensors by name -> the settings that follow from them. It may
            raise `KeyError` for tensors of another family.
        inputs: a network -> the arguments of its call, as `jax.ShapeDtypeStruct`.
        unused: patterns of the names of tensors that are left out, such as `text_model.*`.
    """

    name: str
    network: Callable[..., Any]
    sizes: Mapping[str, Size]
    table: Callable[[Any], Table]
    recognise: Callable[[Mapping[str, tuple[int, ...]]], Mapping[str, Any]]
    inputs: Callable[[Any], Sequence[jax.ShapeDtypeStruct]]
    unused: tuple[str, ...] = ()

    def size(self, name: str) -> Any:
        """The network of a published size.

        Raises:
            UserError: no size has this name.
        """
        if name not in self.sizes:
            raise UserError(
                f"no {self.name} network is called {name!r}; {nearest(name, self.sizes)}"
            )
        return self.network(**self.sizes[name].settings)

    def network_of(self, state: Mapping[str, Any], source: str) -> Any:
        """The network that published tensors belong to, recognised by their shapes.

        Settings without a trace in the shapes, such as the number of heads, are those of the
        published size with the same shapes.

        Args:
            state: arrays or tensors of a file, by name.
            source: name of the file, for errors.

        Raises:
            UserError: the tensors are of another family, or of no published size.
        """
        try:
            found = self.recognise({name: tuple(x.shape) for name, x in state.items()})
        except (ArithmeticError, LookupError, ValueError) as error:
            why = "tensors of its names have other axes"
            if isinstance(error, KeyError):
                why = f"no tensor {error}"
            raise UserError(f"{source} is not of the family {self.name}: {why}") from error
        for size in self.sizes.values():
            if all(size.settings.get(name, value) == value for name, value in found.items()):
                return self.network(**{**size.settings, **found})
        sizes = ", ".join(f"{name}={value}" for name, value in found.items())
        raise UserError(f"{source} is of no published size of {self.name}: it has {sizes}")

    def shapes(self, network: Any) -> Any:
        """The parameters of a network as `jax.ShapeDtypeStruct`, without computing them."""
        return jax.eval_shape(network.init, jax.random.key(0), *self.inputs(network))["params"]

    def to_ours(self, state: Mapping[str, Any], network: Any, source: str) -> Any:
        """Converts published tensors to parameters; see `diffjax.pretrained.tables.to_ours`."""
        return to_ours(state, self.table(network), self.shapes(network), source, self.unused)

    def to_theirs(self, params: Any, network: Any) -> dict[str, np.ndarray]:
        """Converts parameters to published tensors, all but the unused ones."""
        return to_theirs(params, self.table(network))

    def read(self, path: str | Path, network: Any = None) -> tuple[Any, Any]:
        """Reads a published file.

        Args:
            path: of the file, of torch or safetensors.
            network: the network; by default it is recognised by the shapes.

        Returns:
            The network and its parameters.

        Raises:
            UserError: the file can't be read, or is of another network.
        """
        state = read_state_dict(path)
        if network is None:
            network = self.network_of(state, str(path))
        return network, self.to_ours(state, network, str(path))

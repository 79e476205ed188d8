"""A family of published networks: its sizes, and the names of its tensors elsewhere."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.conditions import Condition, Unconditional
from diffjax.errors import UserError, nearest
from diffjax.pretrained.folders import WEIGHTS, read_weights
from diffjax.pretrained.tables import Place, Table, check, in_memory, to_ours, to_theirs


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


_NO_CONDITION = Unconditional()


@dataclass(frozen=True)
class Denoiser:
    """A network of a family whose published tensors depend on the shape of its images too.

    Attributes:
        network: the module, called with images, noise labels and a condition.
        image_shape: `(H, W, C)` of its images.
        condition: the kind of its condition; labels and none have the same shape.
    """

    network: Any
    image_shape: tuple[int, int, int]
    condition: Condition = _NO_CONDITION

    def init(self, key: jax.Array, *inputs: Any) -> Any:
        """Initialises the network."""
        return self.network.init(key, *inputs)

    @property
    def inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """The arguments of its call: images, noise labels, and a condition of one example."""
        images = jax.ShapeDtypeStruct((1, *self.image_shape), jnp.float32)
        noise_label = jax.ShapeDtypeStruct((1,), jnp.float32)
        return images, noise_label, self.condition.abstract(1)


@dataclass(frozen=True)
class Config:
    """How the settings beside published tensors describe a network, in both directions.

    Attributes:
        class_name: the name of the class there, the entry `_class_name`; "" for folders of
            transformers, which have no such entry.
        fixed: entries that have one value in all networks of the family.
        to_ours: the other entries -> settings of the network. It may raise `KeyError`.
        to_theirs: a network -> the other entries. It may raise `UserError` for one that can't be
            described.
        where: where they are, for errors; a pickle of NVIDIA's has settings too.
        beside: entries that the network does not depend on but its users do, with the values that
            diffusers takes where they are missing, such as the scale of latents.
        weights: the name of the file of weights beside it, without its end.
    """

    class_name: str
    fixed: Mapping[str, Any]
    to_ours: Callable[[Mapping[str, Any]], Mapping[str, Any]]
    to_theirs: Callable[[Any], Mapping[str, Any]]
    where: str = "config.json"
    beside: Mapping[str, Any] = field(default_factory=dict)
    weights: str = WEIGHTS

    def settings(self, entries: Mapping[str, Any], source: str) -> Mapping[str, Any]:
        """The settings of the network that a `config.json` describes.

        Raises:
            UserError: an entry is missing, of another class, or of a value that no network here
                has.
        """
        for name, value in self._constants.items():
            if entries.get(name, value) != value:
                raise UserError(
                    f"{source}: {self.where} has {name}={entries[name]!r}, and only {value!r} is "
                    "known"
                )
        others = {name: value for name, value in entries.items() if name != "_class_name"}
        try:
            return self.to_ours(others)
        except (ArithmeticError, TypeError, ValueError) as error:
            raise UserError(f"{source}: {self.where} can't be used: {error}") from error
        except KeyError as error:
            raise UserError(f"{source}: {self.where} lacks {error}") from error

    def entries(self, network: Any) -> dict[str, Any]:
        """The `config.json` of a network."""
        return {**self._constants, **self.to_theirs(network)}

    @property
    def _constants(self) -> dict[str, Any]:
        named = {"_class_name": self.class_name} if self.class_name else {}
        return {**named, **self.fixed}


@dataclass(frozen=True)
class Published:
    """How a published network was trained, and how its authors sample it.

    All are names that `diffjax.choices` has.

    Attributes:
        objective: the choices on the axes of the objective, as `objective=dit`.
        solver: takes the steps.
        grid: the times.
        num_steps: the number of steps.
        guidance_scale: the scale.
        guidance: the rule.
        codec: what encoded the latents that it was trained on; "" for pixels.
        condition_dropout: the rate at which labels were replaced by the null label in training; 0
            if they never were, so that the network can't be guided by a null label.
    """

    objective: str
    solver: str
    grid: str
    num_steps: int
    guidance_scale: float
    guidance: str = "cfg"
    codec: str = ""
    condition_dropout: float = 0.1


def _as_they_are(state: Mapping[str, Any], network: Any) -> Mapping[str, Any]:
    del network
    return state


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
        config: how folders of diffusers describe the network; None for a layout without.
        published: a network -> how it was trained, of a family of denoisers.
        without_variance: tensors, a network -> the tensors without the outputs of a learned
            variance, where the network has none; by default they are as they are.
        files: parts of the network that have a file each, where names begin with that of the part.
    """

    name: str
    network: Callable[..., Any]
    sizes: Mapping[str, Size]
    table: Callable[[Any], Table]
    recognise: Callable[[Mapping[str, tuple[int, ...]]], Mapping[str, Any]]
    inputs: Callable[[Any], Sequence[jax.ShapeDtypeStruct]]
    unused: tuple[str, ...] = ()
    config: Config | None = None
    published: Callable[[Any], Published] | None = None
    without_variance: Callable[[Mapping[str, Any], Any], Mapping[str, Any]] = _as_they_are
    files: tuple[str, ...] = ()

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

    def network_of(
        self,
        state: Mapping[str, Any],
        source: str,
        config: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> Any:
        """The network that published tensors belong to, recognised by their shapes.

        Settings without a trace in the shapes, such as the number of heads, are those of
        `config.json`, or else those of the published size with the same shapes. Where sizes differ
        in nothing else, a network of no published size has those that they all have.

        Args:
            state: arrays or tensors of a file, by name.
            source: name of the file, for errors.
            config: the entries of `config.json`, if there is one.
            **settings: further ones, such as the number of heads of a network of no published size.

        Raises:
            UserError: the tensors are of another family, of no published size, or contradict
                `config.json`.
        """
        try:
            found = self.recognise({name: tuple(x.shape) for name, x in state.items()})
        except (ArithmeticError, LookupError, ValueError) as error:
            why = "tensors of its names have other axes"
            if isinstance(error, KeyError):
                why = f"no tensor {error}"
            raise UserError(f"{source} is not of the family {self.name}: {why}") from error
        if found.get("num_classes", 0) < 0:
            raise UserError(f"{source} is not of the family {self.name}: it has no classes at all")
        if config and self.config:
            given = self.config.settings(config, source)
            for name, value in found.items():
                if given.get(name, value) != value:
                    raise UserError(
                        f"{source}: {self.config.where} has {name}={given[name]}, but its tensors "
                        f"are of {name}={value}"
                    )
            return self.network(**{**given, **found, **settings})
        for size in self.sizes.values():
            if all(size.settings.get(name, value) == value for name, value in found.items()):
                return self.network(**{**size.settings, **found, **settings})
        of_sizes = {name for size in self.sizes.values() for name in size.settings}
        untraced = of_sizes - found.keys() - {"dropout"}  # which trained weights do not depend on
        if untraced <= settings.keys():
            return self.network(**{**found, **settings})
        sizes = ", ".join(f"{name}={value}" for name, value in found.items())
        raise UserError(
            f"{source} is of no published size of {self.name}: it has {sizes}; to read it, add "
            f"{', '.join(sorted(untraced))}"
        )

    def shapes(self, network: Any) -> Any:
        """The parameters of a network as `jax.ShapeDtypeStruct`, without computing them."""
        leaves, structure = jax.tree.flatten(tuple(self.inputs(network)))
        module = network.network if isinstance(network, Denoiser) else network
        return _shapes(module, tuple(leaves), structure)

    def to_ours(
        self,
        state: Mapping[str, Any],
        network: Any,
        source: str,
        place: Place = in_memory,
    ) -> Any:
        """Converts published tensors to parameters; see `diffjax.pretrained.tables.to_ours`."""
        expected = self.shapes(network)
        return to_ours(state, self.table(network), expected, source, self.unused, place)

    def check(self, state: Mapping[str, Any], network: Any, source: str) -> None:
        """Compares names, shapes and types of published tensors with those of a network.

        Raises:
            UserError: they differ.
        """
        check(state, self.table(network), self.shapes(network), source, self.unused)

    def to_theirs(self, params: Any, network: Any) -> dict[str, np.ndarray]:
        """Converts parameters to published tensors, all but the unused ones."""
        return to_theirs(params, self.table(network))

    def read(
        self,
        path: str | Path,
        network: Any = None,
        place: Place = in_memory,
    ) -> tuple[Any, Any]:
        """Reads a published file, or a folder of diffusers.

        Args:
            path: the path of the file, of torch or safetensors, or of the folder.
            network: the network; by default it is recognised by the shapes and `config.json`.
            place: where each parameter goes; see `diffjax.pretrained.tables.to_ours`.

        Returns:
            The network and its parameters.

        Raises:
            UserError: the file can't be read, or is of another network.
        """
        state, config, source = read_weights(path)
        if network is None:
            network = self.network_of(state, str(source), config)
        return network, self.to_ours(state, network, str(source), place)


@functools.lru_cache(8)  # To trace a network of 28 blocks takes half a second.
def _shapes(network: Any, leaves: tuple[jax.ShapeDtypeStruct, ...], structure: Any) -> Any:
    inputs = jax.tree.unflatten(structure, leaves)
    return jax.eval_shape(network.init, jax.random.key(0), *inputs)["params"]

"""The parts of a config on a mesh: what sampling and evaluation need beside weights."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from diffjax.codecs import Codec, Identity
from diffjax.conditions import Condition
from diffjax.pretrained.family import Denoiser
from diffjax.runs.samples.model import Programs
from diffjax.training import sharding
from diffjax.training.averages import Averages
from diffjax.training.state import TrainState
from diffjax.training.subset import split
from diffjax.wiring import Wired, wire


@dataclass(frozen=True, eq=False)
class Parts:
    """The parts of a config on a mesh, without weights.

    Attributes:
        config: resolved.
        wired: its parts.
        mesh: the devices.
        codec: the codec of the data: what decodes samples.
    """

    config: ConfigDict
    wired: Wired
    mesh: Mesh
    codec: Codec = Identity()

    def __repr__(self) -> str:
        return f"Parts({self.config.name}: {self.wired!r} on {self.mesh.size} devices)"

    @cached_property
    def programs(self) -> Programs:
        """What samples are drawn with, compiled once for pictures, evaluation and `run.sample`."""
        return Programs(self.wired, self.mesh, self.codec)

    @property
    def attention(self) -> str | None:
        """The implementation of attention on this mesh; None for a network without a choice."""
        return getattr(self.wired.network, "attention", None)

    @property
    def denoiser(self) -> Denoiser:
        """The network and the shape of its input, for the names of published weights."""
        return Denoiser(self.wired.network, self.wired.input_shape, self.wired.condition)

    @cached_property
    def abstract(self) -> TrainState:
        """Live and averaged weights as `ShapeDtypeStruct` with shardings; `...` for other arrays.

        Raises:
            UserError: a pattern of `config.trainable` matches nothing.
        """
        trained, frozen = split(self.wired.params_shape, self.wired.trainable)
        averages = dict.fromkeys(Averages.of(self.config).names, trained)
        step: Any = jax.ShapeDtypeStruct((), jnp.int32)
        weights = self.placed(TrainState(step, trained, (), averages, frozen=frozen))
        return weights._replace(opt_state=..., memory=..., skipped=...)

    def placed(self, state: TrainState) -> TrainState:
        """The shapes of a state with the shardings that its arrays have on the mesh."""
        return sharding.placed_shapes(state, self.mesh, rules_of(self.config))


def build_parts(
    config: ConfigDict,
    image_shape: tuple[int, int, int],
    condition: Condition,
    mesh: Mesh,
    codec: Codec = Identity(),
) -> Parts:
    """Wires a config on a mesh; nothing is compiled.

    Args:
        config: resolved.
        image_shape: `(H, W, C)` of the data.
        condition: the kind of condition that the data have.
        mesh: the devices.
        codec: the codec of the data.

    Raises:
        UserError: parts that do not fit together or on this mesh.
    """
    wired = wire(config, image_shape, condition, mesh)
    check_mesh(wired, mesh)
    rules = rules_of(config)
    apply = sharding.on_mesh(wired.apply, mesh, rules)
    return Parts(config, wired._replace(apply=apply), mesh, codec)


def rules_of(config: ConfigDict) -> Sequence[sharding.Rule]:
    """The sharding rules of a config; one made by hand may leave them out.

    Raises:
        UserError: as `check_rules`.
    """
    return sharding.check_rules(config.get("sharding_rules") or sharding.RULES)


def check_mesh(wired: Wired, mesh: Mesh) -> None:
    """Refuses a mesh that the network can't be split over, if the network can check that.

    Raises:
        UserError: it does not divide, with what would.
    """
    check = getattr(wired.network, "check_mesh", None)
    if check is not None:
        check(wired.input_shape, dict(mesh.shape))

"""Settings that suit a machine by plan: mesh, compute type, rematerialisation, parts of a batch.

They change the speed and the memory of training, and rounding; not what is trained. The batch size
is part of an experiment, so a batch that does not fit is split (`config.accumulation_steps`).
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ml_collections import ConfigDict

from diffjax.errors import UserError
from diffjax.models.layers.attention import resolve
from diffjax.models.layers.remat import REMAT
from diffjax.performance.planning.analytic import model_of
from diffjax.performance.planning.compiled import Needs
from diffjax.performance.planning.search import changed
from diffjax.performance.planning.topologies import GIB, USABLE, Chip, Topology

SETTINGS = ("mesh", "model.dtype", "model.remat", "accumulation_steps")
"""The settings that are chosen."""
_SHARE = 0.9
"""Of the usable memory: the analytic model counts no temporaries."""
_FEW_IMAGES = 8
"""Fewer images at a time on a device leave it idle, so rematerialisation is tried before that."""


@dataclass(frozen=True)
class Fitted:
    """A config whose settings suit a machine.

    Attributes:
        config: with the settings.
        reasons: what was chosen and why, by setting.
        peak_bytes: the peak memory of a device in bytes, by plan; None if its memory is unknown.
    """

    config: ConfigDict
    reasons: Mapping[str, str] = field(default_factory=dict)
    peak_bytes: int | None = None


def attached(devices: Sequence[Any]) -> Topology | None:
    """The topology of JAX's devices; None if they do not know their memory, as CPUs.

    Args:
        devices: as `jax.devices()` returns them.
    """
    first, platform = devices[0], devices[0].platform
    limit = (first.memory_stats() or {}).get("bytes_limit")
    if platform not in USABLE or not limit:
        return None
    chip = Chip(first.device_kind, platform, 1.0, math.ceil(limit / USABLE[platform]), 1, 1, 1, "")
    if platform == "gpu":
        machines = len({device.process_index for device in devices})
        return Topology(chip, (machines, len(devices) // machines))
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    return Topology(chip, (len(devices) // slices,), slices)


def multiplies_bfloat16(device: Any) -> bool:
    """Whether a device multiplies bfloat16 faster than float32: TPUs, and GPUs since Ampere."""
    major = str(getattr(device, "compute_capability", "")).partition(".")[0]
    recent = not major.isdecimal() or int(major) >= 8
    return device.platform == "tpu" or (device.platform == "gpu" and recent)


def fitted(
    config: ConfigDict,
    topology: Topology | None,
    *,
    bfloat16: bool = True,
    given: Collection[str] = (),
    plan: Callable[[ConfigDict, Topology], Needs] = model_of,
) -> Fitted:
    """The settings by which a config trains fastest on a machine, of those that fit by plan.

    In this order: bfloat16 where it is faster; all devices share the batch, and parameters too
    (`fsdp`) if a copy of the state takes more than half of a device's memory; the batch is split
    into as few parts as fit; if fewer than 8 images a device were left at a time,
    rematerialisation is raised first.

    Args:
        config: resolved.
        topology: the topology of the machine; None if its memory is unknown: then only the type is
            chosen.
        bfloat16: whether its devices multiply bfloat16 faster than float32.
        given: settings to keep, as `config.mesh.data` or `config.model.remat`.
        plan: returns what a config needs on a topology; the analytic model.

    Raises:
        UserError: nothing fits, or the config can't be planned.
    """
    reasons: dict[str, str] = {}
    keep = {name for name in SETTINGS if any(_inside(one, f"config.{name}") for one in given)}
    if "dtype" in config.model and "model.dtype" not in keep:
        dtype = "bfloat16" if bfloat16 else "float32"
        config = changed(config, model__dtype=dtype)
        why = "faster here" if bfloat16 else "bfloat16 is not faster here"
        reasons["model.dtype"] = f"{dtype}: {why}"
    if topology is None:
        return Fitted(config, reasons)
    room = int(_SHARE * topology.usable_bytes)
    if "mesh" not in keep and (config.mesh.data, config.mesh.fsdp) == (-1, 1):
        config, reasons["mesh"] = _with_mesh(config, topology, plan)
    for candidate, parts, peak in _candidates(config, topology, keep, plan):
        if peak > room:
            continue
        about = f"{peak / GIB:.1f} of {topology.usable_bytes / GIB:.1f} GiB a device by plan"
        if "model.remat" not in keep and "remat" in config.model:
            reasons["model.remat"] = f"{candidate.model.remat}: {about}"
        reasons["accumulation_steps"] = f"{parts}: {about}"
        if "attention" in config.model:
            platform, dtype = topology.chip.platform, config.model.get("dtype", "float32")
            used = resolve(config.model.attention, platform, dtype, config.mesh.sequence)
            reasons["model.attention"] = f"{config.model.attention}: {used} on a {platform}"
        return Fitted(candidate, reasons, peak)
    raise UserError(
        f"{config.name} at batch {config.batch_size} fits {topology.num_chips} x "
        f"{topology.chip.name} by no mesh, rematerialisation or accumulation: its state needs more "
        "than a device has; choose a smaller network or more devices"
    )


def _inside(name: str, group: str) -> bool:
    return name == group or name.startswith(f"{group}.")


def _with_mesh(
    config: ConfigDict, topology: Topology, plan: Callable[[ConfigDict, Topology], Needs]
) -> tuple[ConfigDict, str]:
    """The config with the smallest groups of FSDP whose state leaves half of the memory."""
    rows = topology.num_chips // (config.mesh.tensor * config.mesh.sequence)
    state = fixed_bytes(plan(config, topology), 2)
    within = rows // topology.num_slices
    sizes = [n for n in range(1, within + 1) if within % n == 0]
    fsdp = next((n for n in sizes if state / n <= 0.5 * topology.usable_bytes), sizes[-1])
    why = f"a copy of the state and its gradients takes {state / GIB:.1f} GiB"
    return (
        changed(config, mesh__data=rows // fsdp, mesh__fsdp=fsdp),
        f"data={rows // fsdp} fsdp={fsdp}: {why}, a device has {topology.usable_bytes / GIB:.1f}",
    )


def _candidates(
    config: ConfigDict,
    topology: Topology,
    keep: Collection[str],
    plan: Callable[[ConfigDict, Topology], Needs],
) -> Iterator[tuple[ConfigDict, int, int]]:
    """Configs with their parts of a batch and peak bytes, the fastest first."""
    rows = topology.num_chips // (config.mesh.tensor * config.mesh.sequence)
    own = config.model.get("remat")
    stronger = list(REMAT)[list(REMAT).index(own) + 1 :] if own in REMAT else []
    policies = [own, *(one for one in ("products", "full") if one in stronger)]
    policies = policies[:1] if "model.remat" in keep else policies
    images = config.batch_size // rows
    divisors = [n for n in range(1, images + 1) if images % n == 0] or [1]
    if "accumulation_steps" in keep:
        divisors = [config.accumulation_steps]
    found: dict[Any, Needs] = {}
    for least in (_FEW_IMAGES, 1):
        for policy in policies:
            values = {} if policy is None else {"model__remat": policy}
            if policy not in found:
                found[policy] = plan(changed(config, accumulation_steps=1, **values), topology)
            for parts in divisors:
                if parts == divisors[0] or images // parts >= least:
                    candidate = changed(config, accumulation_steps=parts, **values)
                    yield (
                        candidate,
                        parts,
                        fixed_bytes(found[policy], parts) + kept_bytes(found[policy], parts),
                    )


def fixed_bytes(needs: Needs, parts: int) -> int:
    """Bytes on a device that do not depend on the batch: state and gradients.

    Args:
        needs: a plan without accumulation.
        parts: the parts of a batch; with several, the sum of their gradients is kept too.
    """
    return needs.state_bytes + needs.memory.get("gradients", 0) * (1 if parts == 1 else 2)


def kept_bytes(needs: Needs, parts: int) -> int:
    """Bytes on a device that grow with the batch: the batch, and the activations of one part.

    Args:
        needs: a plan without accumulation.
        parts: the parts of a batch, evaluated one after the other.
    """
    return needs.memory.get("batch", 0) + needs.memory.get("activations", 0) // parts

"""Reads the device groups of a collective, which HLO writes in several formats."""

import math
import re

import numpy as np

from diffjax.performance.hlo.parser import Instruction

_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_LISTS = re.compile(r"replica_groups=\{(\{[\d,{} ]*\})\}")


def device_groups(instruction: Instruction) -> list[list[int]]:
    """Device numbers of each group of a collective; for a permute, of each pair.

    Example:
        >>> one = Instruction("r", "all-reduce", (), (), "", ", replica_groups=[2,2]<=[2,2]T(1,0)")
        >>> device_groups(one)
        [[0, 2], [1, 3]]
    """
    text = instruction.attributes
    if found := _MESH.search(text):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", found[1])}
        together = re.findall(r"'([^']+)'", found[2])
        order = [*(name for name in sizes if name not in together), *together]
        devices = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
        devices = devices.transpose([list(sizes).index(name) for name in order])
        return devices.reshape(-1, math.prod(sizes[name] for name in together)).tolist()
    if found := _IOTA.search(text):
        shape, dims, order = (_numbers(part) for part in found.groups())
        devices = np.arange(math.prod(dims)).reshape(dims)
        devices = devices.transpose(order) if order else devices
        return devices.reshape(-1, shape[-1]).tolist()
    if found := _LISTS.search(text):
        return [_numbers(group) for group in re.findall(r"\{([\d, ]*)\}", found[1])]
    pairs = text.partition("source_target_pairs=")[2]
    return [[int(start), int(end)] for start, end in re.findall(r"\{(\d+),(\d+)\}", pairs)]


def _numbers(text: str | None) -> list[int]:
    return [int(number) for number in (text or "").split(",") if number.strip()]


def slices_of(group: list[int], slice_size: int) -> int:
    """Number of slices that a group of devices spans; a slice's devices have consecutive numbers.

    Example:
        >>> slices_of([0, 1, 4], 4)
        2
    """
    return len({device // slice_size for device in group})

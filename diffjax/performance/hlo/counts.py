"""Counts the traffic and the buffers of a compiled program, with the trip counts of its loops."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from diffjax.performance.hlo.groups import device_groups, slices_of
from diffjax.performance.hlo.parser import Array, Computation, Instruction, Module
from diffjax.performance.hlo.products import library_call

_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_NOT_READ = frozenset(
    {
        "after-all", "async-done", "async-update", "bitcast", "call", "conditional", "constant",
        "get-tuple-element", "iota", "optimization-barrier", "parameter", "partition-id",
        "replica-id", "tuple", "while",
    }
)  # fmt: skip
_MEGASCALE = {
    "ALL_GATHER": "all-gather",
    "ALL_REDUCE": "all-reduce",
    "REDUCE_SCATTER": "reduce-scatter",
    "ALL_TO_ALL": "all-to-all",
    "ONE_TO_ONE": "collective-permute",
}
# These custom calls of libtpu allocate memory or rename a buffer; they move no bytes.
_NO_WORK = re.compile(
    r'custom_call_target="(AllocateBuffer|ConcatBitcast|AssumeGatherIndicesInBound)"'
)


@dataclass(frozen=True)
class Collective:
    """The traffic of one kind of collective operation with one group size.

    Attributes:
        kind: `all-gather`, `all-reduce`, `reduce-scatter`, `all-to-all`, `collective-permute`.
        devices: number of devices in each group.
        count: how often one execution of the program runs it.
        wire_bytes: bytes that one device receives for all of them; it sends equally many.
        slow_bytes: the part of them that comes from other slices, over the slow links.
    """

    kind: str
    devices: int
    count: int
    wire_bytes: float
    slow_bytes: float = 0.0


def collectives(module: Module, slice_size: int = 0) -> list[Collective]:
    """All traffic of one execution, by kind of collective and group size, largest first.

    The received bytes are those of a ring. This is optimal, except for an all-reduce that the
    network itself sums up. For n devices and an array of b bytes (the whole array):

        all-gather, reduce-scatter, all-to-all  b·(n−1)/n
        all-reduce                              2·b·(n−1)/n
        collective-permute                      b

    If the n devices are on s slices, each slice receives at least the same formula with s instead
    of n from other slices, and its n/s devices share these bytes.

    Args:
        module: the program.
        slice_size: number of devices in a slice, numbered consecutively; 0 for a single slice.
    """
    counts: Counter[tuple[str, int]] = Counter()
    wire: dict[tuple[str, int], float] = defaultdict(float)
    slow: dict[tuple[str, int], float] = defaultdict(float)
    started = _started(module)
    for computation, instruction, times in module.walk():
        if across := _across_slices(instruction):
            received = times * instruction.arrays[0].num_bytes * _received(*across)
            counts[across] += times
            wire[across] += received
            slow[across] += received
            continue
        kind = instruction.opcode.removesuffix("-start")
        if kind not in _KINDS or not _begins(module, computation, instruction, started):
            continue
        if kind == "all-reduce" and _is_scattered(module, computation, instruction):
            kind = "reduce-scatter"
        together = device_groups(instruction)
        devices = _group_size(kind, together)
        slices = max((slices_of(one, slice_size) for one in together if slice_size), default=1)
        moved = times * _whole_bytes(computation, instruction, kind)
        key = kind, devices
        counts[key] += times
        wire[key] += moved * _received(kind, devices)
        slow[key] += moved * _from_other_slices(kind, slices, devices)
    found = [Collective(*key, counts[key], wire[key], slow[key]) for key in counts]
    return sorted(found, key=lambda one: -one.wire_bytes)


def _across_slices(instruction: Instruction) -> tuple[str, int] | None:
    """Kind and number of slices of a transfer between TPU slices; None for other instructions.

    Such transfers go through hosts and appear as `recv`, not as a collective.
    """
    found = re.search(r'_megascale_transfer_type="(\w+)"', instruction.attributes)
    if instruction.opcode != "recv" or found is None:
        return None
    slices = re.search(r'_megascale_target="\{([\d,]+)\}x', instruction.attributes)
    # Without a list of targets it is a transfer between two chips.
    return _MEGASCALE[found[1]], len(slices[1].split(",")) if slices else 2


def _received(kind: str, devices: int) -> float:
    """Bytes that one device receives, as a multiple of the bytes of the array."""
    if kind == "collective-permute":
        return 1.0
    return (devices - 1) / devices * (2 if kind == "all-reduce" else 1)


def _from_other_slices(kind: str, slices: int, devices: int) -> float:
    """Bytes that one device receives from other slices, as a multiple of the array's bytes."""
    shared = 1 if kind == "collective-permute" else devices / slices
    return _received(kind, slices) / shared if slices > 1 else 0.0


def _group_size(kind: str, together: Sequence[Sequence[int]]) -> int:
    """Number of devices in a group."""
    if kind == "collective-permute":
        return len({end for pair in together for end in pair}) or 1
    return len(together[0]) if together else 1


def _channel(instruction: Instruction) -> str | None:
    found = re.search(r"channel_id=(\d+)", instruction.attributes)
    return found[1] if found else None


def _starts_one(computation: Computation) -> bool:
    return any(
        instruction.opcode == "custom-call" and "AsyncCollectiveStart" in instruction.attributes
        for instruction in computation.instructions.values()
    )


def _started(module: Module) -> set[str | None]:
    """Channels of asynchronous collectives; on TPUs, each fusion they overlap with lists them."""
    return {
        _channel(instruction)
        for computation in module.computations.values()
        if _starts_one(computation)
        for instruction in computation.instructions.values()
        if instruction.opcode in _KINDS
    }


def _begins(
    module: Module, computation: Computation, instruction: Instruction, started: set[str | None]
) -> bool:
    """Whether a collective starts here; its later listings in other fusions do not count."""
    if computation.name not in module.fused or _channel(instruction) not in started:
        return True
    return _starts_one(computation)


def _is_scattered(module: Module, computation: Computation, instruction: Instruction) -> bool:
    """Whether an all-reduce in a fusion is a reduce-scatter: each device uses only its slice."""
    if computation.name not in module.fused:
        return False
    users = [i for i in computation.instructions.values() if instruction.name in i.operands]
    return bool(users) and all(user.opcode == "dynamic-slice" for user in users)


def _whole_bytes(computation: Computation, instruction: Instruction, kind: str) -> int:
    """Bytes of the array before it is scattered or after it is gathered."""
    taken = sum(
        array.num_bytes
        for operand in instruction.operands
        for array in computation.instructions[operand].arrays
    )
    made = sum(array.num_bytes for array in instruction.arrays)
    if instruction.opcode == "all-gather-start":
        return made - taken  # its result tuple contains the input as well
    return made if kind == "all-gather" else taken


def memory_bytes(module: Module) -> int:
    """Bytes that one device reads from and writes to its main memory, estimated from the HLO text.

    Each instruction outside fusions reads its operands and writes its results once, unless they
    stay on the chip. If an array is only sliced or partly updated, only that part counts.
    """
    total = 0
    for computation, instruction, times in module.walk():
        if computation.name in module.fused or instruction.opcode in _NOT_READ:
            continue
        total += times * _touched(module, computation, instruction)
    return total


def _touched(module: Module, computation: Computation, instruction: Instruction) -> int:
    made = instruction.arrays
    if _NO_WORK.search(instruction.attributes):
        return 0
    if library_call(instruction):
        made = made[:-1] or made  # The last of several results is the library's scratch memory.
    operands = [computation.instructions[name].arrays for name in instruction.operands]
    if instruction.opcode.endswith("-start"):
        # Its results are its source and its destination, and one of them may be only a part.
        ends = [array for array in made if array.num_bytes > 4][:2]
        moved = min((array.num_bytes for array in ends), default=0)
        return moved * sum(not array.space for array in ends)
    if instruction.opcode.endswith("-done"):
        return 0
    if instruction.opcode == "dynamic-slice":
        return 2 * _main(made)
    if instruction.opcode == "dynamic-update-slice":
        return 2 * _main(operands[1])
    if instruction.opcode == "fusion":
        return _touched_by_fusion(module, _called(module, instruction))
    return _main(made) + sum(map(_main, operands))


def _touched_by_fusion(module: Module, inner: Computation) -> int:
    """Bytes that a fusion moves: the parts of its parameters that it reads, and its results."""
    parameters = [i for i in inner.instructions.values() if i.opcode == "parameter"]
    root = list(inner.instructions.values())[-1]
    results = root.operands if root.opcode == "tuple" else (root.name,)
    read = sum(_read(module, inner, parameter.name) for parameter in parameters)
    return read + sum(_written(module, inner, name) for name in results)


def _read(module: Module, inside: Computation, name: str) -> int:
    """Bytes of one value that a fusion reads: only the slices, if it reads nothing else."""
    value = inside.instructions[name]
    whole = _main(value.arrays)
    total = 0
    for user in inside.instructions.values():
        for place, operand in enumerate(user.operands):
            if operand != name or not whole:
                continue
            if user.opcode == "dynamic-slice" and not place:
                total += sum(array.num_bytes for array in user.arrays)
            elif user.opcode in ("bitcast", "copy", "reshape"):
                total += _read(module, inside, user.name) or whole
            elif user.opcode == "fusion":
                total += _read(module, *_parameter(module, user, place))
            elif user.opcode not in ("dynamic-update-slice", "tuple") or place:
                total += whole
    return min(total, whole)


def _parameter(module: Module, fusion: Instruction, place: int) -> tuple[Computation, str]:
    """The computation inside a fusion, and the name there of the operand at a position."""
    inner = _called(module, fusion)
    for instruction in inner.instructions.values():
        if instruction.opcode == "parameter" and int(instruction.inside) == place:
            return inner, instruction.name
    raise ValueError(f"{fusion.name} has no parameter {place}")


def _called(module: Module, fusion: Instruction) -> Computation:
    found = re.search(r"calls=%?([\w.\-]+)", fusion.attributes)
    if found is None:
        raise ValueError(f"{fusion.name} is a fusion that calls nothing")
    return module.computations[found[1]]


def _written(module: Module, inside: Computation, name: str) -> int:
    """Bytes of one result that a fusion writes: only the update, for updates in place."""
    result = inside.instructions[name]
    if result.opcode == "parameter" or not _main(result.arrays):
        return 0
    if result.opcode == "bitcast":
        return _written(module, inside, result.operands[0])
    if result.opcode == "dynamic-update-slice":
        return sum(array.num_bytes for array in inside.instructions[result.operands[1]].arrays)
    if result.opcode == "fusion":
        inner = _called(module, result)
        last = list(inner.instructions.values())[-1]
        if last.opcode != "tuple":
            return _written(module, inner, last.name)
    return _main(result.arrays)


def _main(arrays: Iterable[Array]) -> int:
    """Total bytes of the arrays that are in main memory."""
    return sum(array.num_bytes for array in arrays if not array.space)


class Buffer(NamedTuple):
    """Arrays of one type and shape that a program allocates.

    Attributes:
        dtype: HLO type of the array, for example `bf16`.
        shape: shape on one device.
        num_bytes: bytes of one such array.
        count: number of instructions that make one.
    """

    dtype: str
    shape: tuple[int, ...]
    num_bytes: int
    count: int


def buffers(module: Module, largest: int = 20) -> list[Buffer]:
    """The largest arrays that the program makes outside fusions, grouped by type and shape.

    Args:
        module: the program.
        largest: number of groups to return.
    """
    counts: Counter[tuple[str, tuple[int, ...]]] = Counter()
    passed_on = ("bitcast", "get-tuple-element", "parameter", "tuple", "while")
    for computation, instruction, _ in module.walk():
        if computation.name in module.fused:
            continue
        if instruction.opcode not in passed_on or computation.name == module.entry:
            counts.update((array.dtype, array.shape) for array in instruction.arrays)
    found = [Buffer(*key, Array(*key).num_bytes, count) for key, count in counts.items()]
    return sorted(found, key=lambda one: (-one.num_bytes, one.dtype))[:largest]


def whole_stacks(module: Module, shapes: Sequence[tuple[int, ...]]) -> list[Buffer]:
    """Arrays that hold an unsharded stack of all blocks' weights, although it should be sharded.

    Args:
        module: the program.
        shapes: unsharded shapes of the stacked weights.

    Returns:
        The arrays with one of these shapes; the order of dimensions and dimensions of 1 are
        ignored.
    """
    wanted = {tuple(sorted(size for size in shape if size > 1)) for shape in shapes}
    return [
        one
        for one in buffers(module, largest=10**6)
        if tuple(sorted(size for size in one.shape if size > 1)) in wanted
    ]

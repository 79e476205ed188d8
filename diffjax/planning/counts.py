"""What a compiled program does, counted with the turns of its loops: products, traffic, buffers."""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from diffjax.planning.groups import groups, slices_of
from diffjax.planning.hlo import Array, Computation, Instruction, Module

_WINDOW = re.compile(r"\b(\w+)=([\dx_\-]+)")
_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_LIBRARY = re.compile(r'custom_call_target="__(cu(?:blas|dnn)\$[^"]*)"')
_NOT_READ = frozenset(
    {
        "after-all", "async-done", "async-update", "bitcast", "call", "conditional", "constant",
        "get-tuple-element", "iota", "optimization-barrier", "parameter", "partition-id",
        "replica-id", "tuple", "while",
    }
)  # fmt: skip


def matrix_flops(module: Module) -> int:
    """Operations of all matrix products and convolutions that one device runs.

    A multiply-add is two. Of a convolution, only the products of a kernel element with an element
    of the input count: neither padding nor the zeros between the pixels of a dilated input. (XLA
    writes batched products on TPU as such convolutions.) Kernels of their own, as those of Pallas,
    show what their author declared.
    """
    return sum(
        times * _flops(computation, instruction)
        for computation, instruction, times in module.walk()
    )


def _flops(computation: Computation, instruction: Instruction) -> int:
    if instruction.opcode == "dot":
        left = computation.shape_of(instruction.operands[0])
        contracted = _numbers(instruction.attributes, "lhs_contracting_dims")
        outputs = math.prod(instruction.arrays[0].shape)
        return 2 * outputs * math.prod(left[axis] for axis in contracted)
    if instruction.opcode == "convolution":
        image, kernel = map(computation.shape_of, instruction.operands[:2])
        return _convolution(image, kernel, instruction.arrays[0].shape, instruction)
    if instruction.opcode == "custom-call":
        if library := _LIBRARY.search(instruction.attributes):
            return _of_library(library[1], computation, instruction)
        declared = re.search(r'"cost_estimate":\{[^}]*?"flops":"?(\d+)', instruction.attributes)
        return int(declared[1]) if declared else 0
    return 0


def _of_library(routine: str, computation: Computation, instruction: Instruction) -> int:
    """Of a call of cuBLAS or cuDNN; its shapes are in the order of the arguments."""
    made = instruction.arrays[0].shape
    first, second = map(computation.shape_of, instruction.operands[:2])
    if routine.startswith("cublas$"):
        numbers = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', instruction.attributes)
        axes = re.findall(r"\d+", numbers[1]) if numbers else []
        return 2 * math.prod(made) * math.prod(first[int(axis)] for axis in axes)
    if routine.startswith("cudnn$fmha"):
        # Two products forward; backward five, of which the first is the forward one once more.
        batch, length, heads, width = first
        products = 5 if routine.endswith("Backward") else 2
        return products * 2 * batch * heads * length * second[1] * width
    # All are told as the forward convolution that they belong to.
    if routine == "cudnn$convBackwardInput":
        return _convolution(made, second, first, instruction)
    if routine == "cudnn$convBackwardFilter":
        return _convolution(first, made, second, instruction)
    return _convolution(first, second, made, instruction)


def _convolution(
    image: Sequence[int], kernel: Sequence[int], output: Sequence[int], instruction: Instruction
) -> int:
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    if labels is None:
        raise ValueError(f"{instruction.name} is a convolution without dim_labels")
    in_, of, out = labels.groups()
    flops = 2 * kernel[of.index("i")] * output[out.index("b")] * output[out.index("f")]
    window = _window(instruction.attributes)
    for axis in range(len(out) - 2):
        digit = str(axis)
        sizes = image[in_.index(digit)], kernel[of.index(digit)], output[out.index(digit)]
        flops *= _places(*sizes, *(window[name][axis] for name in window))
    return flops


def _places(
    size: int, kernel: int, output: int, stride: int, low: int, lhs_dilate: int, rhs_dilate: int
) -> int:
    """How many pairs of an output and a kernel element meet an element of the input."""
    found = 0
    for k in range(kernel):
        first = k * rhs_dilate - low
        # Elements of the input lie at multiples of lhs_dilate.
        found += sum(
            place % lhs_dilate == 0 and 0 <= place < size * lhs_dilate
            for place in range(first, first + output * stride, stride)
        )
    return found


def _window(attributes: str) -> dict[str, list[int]]:
    """Stride, lower padding and dilations of each spatial dimension."""
    text = re.search(r"window=\{([^}]*)\}", attributes)
    fields = dict(_WINDOW.findall(text[1])) if text else {}
    dims = len(fields["size"].split("x")) if "size" in fields else 0
    ones = "x".join(["1"] * dims)
    pads = fields.get("pad", "x".join(["0_0"] * dims))
    return {
        "stride": _sizes(fields.get("stride", ones)),
        "low": [int(pad.split("_")[0]) for pad in pads.split("x") if pad],
        "lhs_dilate": _sizes(fields.get("lhs_dilate", ones)),
        "rhs_dilate": _sizes(fields.get("rhs_dilate", ones)),
    }


def _sizes(text: str) -> list[int]:
    return [int(size) for size in text.split("x") if size]


def _numbers(attributes: str, name: str) -> list[int]:
    found = re.search(rf"\b{name}=\{{([\d,]*)\}}", attributes)
    return [int(number) for number in found[1].split(",") if number] if found else []


@dataclass(frozen=True)
class Collective:
    """One kind of exchange between devices.

    Attributes:
        kind: `all-gather`, `all-reduce`, `reduce-scatter`, `all-to-all`, `collective-permute`.
        devices: that take part in each.
        count: how often one run of the program does it.
        wire_bytes: that one device receives for all of them, and as many sends.
        slow_bytes: the part of them that comes from other slices, over the slow links.
    """

    kind: str
    devices: int
    count: int
    wire_bytes: float
    slow_bytes: float = 0.0


def collectives(module: Module, slice_size: int = 0) -> list[Collective]:
    """All traffic of one run, by kind and number of devices; the heaviest first.

    Received bytes are those of a ring, which no algorithm can beat but for an all-reduce that the
    network itself adds up. For n devices and an array of b bytes (the whole one):

        all-gather, reduce-scatter, all-to-all  b·(n−1)/n
        all-reduce                              2·b·(n−1)/n
        collective-permute                      b

    Where the n devices are on s slices, a slice receives of the others at least that with s for n,
    which its n/s devices share.

    Args:
        module: the program.
        slice_size: devices of a slice, which are numbered together; 0 is all of them.
    """
    counts: Counter[tuple[str, int]] = Counter()
    wire: dict[tuple[str, int], float] = defaultdict(float)
    slow: dict[tuple[str, int], float] = defaultdict(float)
    started = _started(module)
    for computation, instruction, times in module.walk():
        kind = instruction.opcode.removesuffix("-start")
        if kind not in _KINDS or not _begins(module, computation, instruction, started):
            continue
        if kind == "all-reduce" and _is_scattered(module, computation, instruction):
            kind = "reduce-scatter"
        together = groups(instruction)
        devices = _group_size(kind, together)
        slices = max((slices_of(one, slice_size) for one in together if slice_size), default=1)
        moved = times * _whole_bytes(computation, instruction, kind)
        key = kind, devices
        counts[key] += times
        wire[key] += moved * _received(kind, devices)
        slow[key] += moved * _from_other_slices(kind, slices, devices)
    found = [Collective(*key, counts[key], wire[key], slow[key]) for key in counts]
    return sorted(found, key=lambda one: -one.wire_bytes)


def _received(kind: str, devices: int) -> float:
    """Of an array, how many times its size one of so many devices receives."""
    if kind == "collective-permute":
        return 1.0
    return (devices - 1) / devices * (2 if kind == "all-reduce" else 1)


def _from_other_slices(kind: str, slices: int, devices: int) -> float:
    """The same of what comes from other slices, of which a slice's devices share each copy."""
    shared = 1 if kind == "collective-permute" else devices / slices
    return _received(kind, slices) / shared if slices > 1 else 0.0


def _group_size(kind: str, together: Sequence[Sequence[int]]) -> int:
    """How many devices take part together."""
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
    """Channels of exchanges that run beside other work: TPUs show them in each fusion they span."""
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
    """Whether this is where an exchange begins, not where it is shown once more."""
    if computation.name not in module.fused or _channel(instruction) not in started:
        return True
    return _starts_one(computation)


def _is_scattered(module: Module, computation: Computation, instruction: Instruction) -> bool:
    """Whether an all-reduce inside a fusion is at once cut down to this device's part of it."""
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
        return made - taken  # which shows its input once more
    return made if kind == "all-gather" else taken


def memory_bytes(module: Module) -> int:
    """Bytes that one device reads from and writes to its main memory, as far as the text shows.

    Each instruction outside fusions reads its operands and writes its results once, unless they
    stay on the chip; of an array that is only sliced or updated in part, that part counts.
    """
    total = 0
    for computation, instruction, times in module.walk():
        if computation.name in module.fused or instruction.opcode in _NOT_READ:
            continue
        total += times * _touched(module, computation, instruction)
    return total


def _touched(module: Module, computation: Computation, instruction: Instruction) -> int:
    made = instruction.arrays
    if _LIBRARY.search(instruction.attributes):
        made = made[:-1]  # The last one is where the library may scribble.
    operands = [computation.instructions[name].arrays for name in instruction.operands]
    if instruction.opcode.endswith("-start"):
        # Its results are where it reads and where it writes, of which one may be a part only.
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
    """Bytes that a fusion moves: its parameters as far as they are read, and its results."""
    parameters = [i for i in inner.instructions.values() if i.opcode == "parameter"]
    root = list(inner.instructions.values())[-1]
    results = root.operands if root.opcode == "tuple" else (root.name,)
    read = sum(_read(module, inner, parameter.name) for parameter in parameters)
    return read + sum(_written(module, inner, name) for name in results)


def _read(module: Module, inside: Computation, name: str) -> int:
    """Bytes that a fusion reads of one value: slices of it, where nothing else is taken."""
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
    """What an operand of a fusion is called inside it."""
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
    """Bytes that a fusion writes of one result: the update, where an array is updated in place."""
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
    """Bytes of those arrays that are in main memory."""
    return sum(array.num_bytes for array in arrays if not array.space)


class Buffer(NamedTuple):
    """Arrays of one type and shape that stand in memory at some time.

    Attributes:
        dtype: of the array.
        shape: of the array.
        num_bytes: of one of them.
        count: instructions that make one.
    """

    dtype: str
    shape: tuple[int, ...]
    num_bytes: int
    count: int


def buffers(module: Module, largest: int = 20) -> list[Buffer]:
    """The largest arrays that the program ever makes outside fusions, by type and shape."""
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
    """Arrays that hold a weight stack with nothing of it split over the devices.

    Args:
        module: the program.
        shapes: whole shapes of stacked weights that should be split.

    Returns:
        Those of these shapes, in any order of dimensions, but for dimensions of 1.
    """
    wanted = {tuple(sorted(size for size in shape if size > 1)) for shape in shapes}
    return [
        one
        for one in buffers(module, largest=10**6)
        if tuple(sorted(size for size in one.shape if size > 1)) in wanted
    ]

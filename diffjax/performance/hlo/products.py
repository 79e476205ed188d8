"""Counts the FLOPs of matrix products and convolutions in a compiled program, loops included."""

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

from diffjax.performance.hlo.parser import Computation, Instruction, Module

_WINDOW = re.compile(r"\b(\w+)=([\dx_\-]+)")
_LIBRARY = re.compile(r'custom_call_target="__(cu(?:blas|dnn)\$[^"]*)"')
# The fused backward kernel computes the gradients of queries, keys and values together.
_SPLASH = re.compile(r"splash_mha_(fwd|dkv)")
_SPLASH_PRODUCTS = {"fwd": 2, "dkv": 5}
# The arrays of a call that are the image, the kernel and the output of the forward convolution.
_CONVOLUTIONS = {
    "cudnn$convBackwardInput": ("made", "second", "first"),
    "cudnn$convBackwardFilter": ("first", "made", "second"),
}


def compiled_matrix_flops(module: Module) -> int:
    """FLOPs of all matrix products and convolutions that one device executes.

    A multiply-add counts as two FLOPs. In a convolution, only products of a kernel element with an
    input element count, not products with padding or with the zeros of a dilated input. (On TPU,
    XLA writes batched products as such convolutions.) Custom kernels, such as those of Pallas,
    count the FLOPs that they declare; those of splash attention are computed from its shapes.
    """
    return sum(
        times * _flops(computation, instruction)
        for computation, instruction, times in module.walk()
    )


def library_call(instruction: Instruction) -> str | None:
    """Name of the cuBLAS or cuDNN routine that an instruction calls; None if it calls neither."""
    found = _LIBRARY.search(instruction.attributes)
    return found[1] if found else None


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
        if routine := library_call(instruction):
            return _of_library(routine, computation, instruction)
        if kernel := _SPLASH.match(instruction.name):
            return _of_splash(kernel[1], computation, instruction)
        declared = re.search(r'"cost_estimate":\{[^}]*?"flops":"?(\d+)', instruction.attributes)
        return int(declared[1]) if declared else 0
    return 0


def _of_splash(kernel: str, computation: Computation, instruction: Instruction) -> int:
    """FLOPs of Pallas's splash attention, which declares none; arrays: `[B, heads, T, width]`."""
    shapes = map(computation.shape_of, instruction.operands)
    query, key = [shape for shape in shapes if len(shape) == 4][:2]
    return _SPLASH_PRODUCTS[kernel] * 2 * math.prod(query) * key[2]


def _of_library(routine: str, computation: Computation, instruction: Instruction) -> int:
    """FLOPs of a call of cuBLAS or cuDNN; its shapes are in the order of the arguments."""
    made = instruction.arrays[0].shape
    first, second = map(computation.shape_of, instruction.operands[:2])
    if routine.startswith("cublas$"):
        numbers = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', instruction.attributes)
        axes = re.findall(r"\d+", numbers[1]) if numbers else []
        return 2 * math.prod(made) * math.prod(first[int(axis)] for axis in axes)
    if routine.startswith("cudnn$fmha"):
        # Two products forward; five backward, the first of which repeats a forward product.
        batch, length, heads, width = first
        products = 5 if routine.endswith("Backward") else 2
        return products * 2 * batch * heads * length * second[1] * width
    # Backward convolutions count as the forward convolution that they belong to.
    shapes = {"first": first, "second": second, "made": made}
    image, kernel, output = _CONVOLUTIONS.get(routine, ("first", "second", "made"))
    return _convolution(shapes[image], shapes[kernel], shapes[output], instruction)


def _convolution(
    image: Sequence[int], kernel: Sequence[int], output: Sequence[int], instruction: Instruction
) -> int:
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    if labels is None:
        raise ValueError(f"{instruction.name} is a convolution without dim_labels")
    in_, of, out = labels.groups()
    flops = 2 * kernel[of.index("i")] * output[out.index("b")] * output[out.index("f")]
    windows = _windows(instruction.attributes)
    for axis, window in zip(range(len(out) - 2), windows, strict=True):
        digit = str(axis)
        sizes = image[in_.index(digit)], kernel[of.index(digit)], output[out.index(digit)]
        flops *= _places(*sizes, window)
    return flops


class _Window(NamedTuple):
    """How a convolution moves along one dimension: HLO's stride, lower padding and dilations."""

    stride: int
    low: int
    lhs_dilate: int
    rhs_dilate: int


def _places(size: int, kernel: int, output: int, window: _Window) -> int:
    """Number of pairs of an output and a kernel element that multiply a real input element."""
    found = 0
    for k in range(kernel):
        first = k * window.rhs_dilate - window.low
        # Elements of the input lie at multiples of its dilation.
        found += sum(
            place % window.lhs_dilate == 0 and 0 <= place < size * window.lhs_dilate
            for place in range(first, first + output * window.stride, window.stride)
        )
    return found


def _windows(attributes: str) -> list[_Window]:
    """The window of each spatial dimension of a convolution."""
    text = re.search(r"window=\{([^}]*)\}", attributes)
    fields = dict(_WINDOW.findall(text[1])) if text else {}
    dims = len(fields["size"].split("x")) if "size" in fields else 0
    ones = "x".join(["1"] * dims)
    pads = fields.get("pad", "x".join(["0_0"] * dims))
    columns = (
        _sizes(fields.get("stride", ones)),
        [int(pad.split("_")[0]) for pad in pads.split("x") if pad],
        _sizes(fields.get("lhs_dilate", ones)),
        _sizes(fields.get("rhs_dilate", ones)),
    )
    return [_Window(*row) for row in zip(*columns, strict=True)]


def _sizes(text: str) -> list[int]:
    return [int(size) for size in text.split("x") if size]


def _numbers(attributes: str, name: str) -> list[int]:
    found = re.search(rf"\b{name}=\{{([\d,]*)\}}", attributes)
    return [int(number) for number in found[1].split(",") if number] if found else []

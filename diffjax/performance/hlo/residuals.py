"""Measures the activations that a compiled training step saves for its backward pass."""

import re

from diffjax.performance.hlo.parser import Computation, Instruction, Module

# JAX writes this into the names of all instructions of a function's transpose.
_BACKWARD = re.compile(r'op_name="[^"]*\btranspose\(')
_SAME = ("bitcast", "copy", "copy-start", "copy-done", "get-tuple-element", "optimization-barrier")
_NOT_MADE = ("constant", "iota", "parameter", "tuple")


def residual_bytes(module: Module) -> int:
    """Bytes in main memory that the forward pass makes and the backward pass reads.

    JAX names each instruction after its origin, which identifies the backward pass. Results of
    other instructions that the backward pass reads are counted; arguments of the program are not.
    With gradient accumulation, only the forward pass of one part of the batch counts. A value that
    is passed on under another name counts once.
    """
    return max(
        (
            _kept(module, computation)
            for name, computation in module.computations.items()
            if module.executions[name] and name not in module.fused
        ),
        default=0,
    )


def _kept(module: Module, computation: Computation) -> int:
    instructions = computation.instructions
    backward = {one.name for one in instructions.values() if _BACKWARD.search(one.attributes)}
    used = {name for each in backward for name in instructions[each].operands} - backward
    sources = {source for name in used for source in _sources(module, computation, name, None)}
    total = 0
    for name, element in sources:
        made = instructions[name]
        if made.opcode not in _NOT_MADE and name not in backward:
            arrays = made.arrays if element is None else made.arrays[element : element + 1]
            total += sum(array.num_bytes for array in arrays if not array.space)
    return total


def _sources(
    module: Module, computation: Computation, name: str, element: int | None
) -> set[tuple[str, int | None]]:
    """The instructions that computed a value; copies and other renamings are followed back."""
    made = computation.instructions[name]
    if made.opcode == "get-tuple-element":
        found = re.search(r"index=(\d+)", made.attributes)
        return _sources(module, computation, made.operands[0], int(found[1]) if found else None)
    if made.opcode in _SAME and made.operands:
        return _sources(module, computation, made.operands[0], element)
    if made.opcode == "tuple":
        parts = made.operands if element is None else made.operands[element : element + 1]
        return {one for part in parts for one in _sources(module, computation, part, None)}
    if made.opcode == "while":
        elements = range(len(made.arrays)) if element is None else (element,)
        found = set()
        for each in elements:
            if _is_carried(module, made, each):
                found |= _sources(module, computation, made.operands[0], each)
            else:
                found.add((name, each))
        return found
    return {(name, element)}


def _is_carried(module: Module, loop: Instruction, element: int) -> bool:
    """Whether a loop carries an element of its tuple unchanged."""
    body = re.search(r"\bbody=%?([\w.\-]+)", loop.attributes)
    inside = module.computations.get(body[1]) if body else None
    if inside is None:
        return False
    root = list(inside.instructions.values())[-1]
    if root.opcode != "tuple" or element >= len(root.operands):
        return False
    last = inside.instructions[root.operands[element]]
    index = re.search(r"index=(\d+)", last.attributes)
    return last.opcode == "get-tuple-element" and index is not None and int(index[1]) == element

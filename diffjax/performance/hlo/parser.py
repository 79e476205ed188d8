"""Parses optimised HLO, the text that XLA prints of a compiled program.

`Compiled.as_text()` is the program of one device: shapes are those of its shards. Loops are `while`
instructions, so counts have to be multiplied by the trip counts of the loops.
"""

import itertools
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

_BITS = {"pred": 8, "bf16": 16, "tf32": 32, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\](\{[^}]*\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r"\s*([\w\-]+)\(")
# The metadata of a Pallas kernel is on separate lines inside an instruction.
_CONTINUED = re.compile(r'\n(?="|\}\})')
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(
    r"\b(body|condition|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)"
)
_CALLED_LISTS = re.compile(r"\b(?:branch_computations|called_computations)=\{([^}]*)\}")
_KNOWN_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
# These apply a computation to single elements, or were already counted at their start.
_NOT_ENTERED = frozenset(
    {
        "all-reduce", "all-reduce-start", "async-done", "async-update", "map", "reduce",
        "reduce-scatter", "reduce-window", "scatter", "select-and-scatter", "sort",
    }
)  # fmt: skip


class Array(NamedTuple):
    """Type, dimensions and memory space of one array.

    Attributes:
        dtype: as HLO names it: `f32`, `bf16`, …
        shape: shape of one device's shard.
        space: memory space: 0 is the device's main memory; others are on the chip.
    """

    dtype: str
    shape: tuple[int, ...]
    space: int = 0

    @property
    def num_bytes(self) -> int:
        """Bytes without padding."""
        return math.prod(self.shape) * bits(self.dtype) // 8


class Instruction(NamedTuple):
    """One line of HLO.

    Attributes:
        name: unique in its computation.
        opcode: `dot`, `fusion`, `while`, …
        arrays: its results; several if the result is a tuple.
        operands: names of its operands.
        inside: the text between its parentheses.
        attributes: the text after the parentheses.
    """

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    inside: str
    attributes: str


class Computation(NamedTuple):
    """Instructions by name, in the order of execution; the last one is the result."""

    name: str
    instructions: Mapping[str, Instruction]

    def shape_of(self, operand: str) -> tuple[int, ...]:
        """Shape of the single result of an instruction."""
        return self.instructions[operand].arrays[0].shape


@dataclass(frozen=True)
class Module:
    """A compiled program.

    Attributes:
        computations: all computations by name.
        entry: name of the computation that is executed.
        unknown_trips: trip count of the loop in the entry computation whose trip count is not in
            the text, if there is exactly one such loop; None if it is unknown. All other such
            loops count once.
    """

    computations: Mapping[str, Computation]
    entry: str
    unknown_trips: int | None = None

    @cached_property
    def executions(self) -> Mapping[str, int]:
        """How often each computation runs in one execution of the program; all branches count.

        `unknown_loops` lists the loops whose trip counts are not in the text.
        """
        counts = dict.fromkeys(self.computations, 0)
        # In the text, callees come before their callers.
        counts[self.entry] = 1
        for name in reversed(list(self.computations)):
            if counts[name]:
                for instruction in self.computations[name].instructions.values():
                    for called, times in self._calls(self.computations[name], instruction):
                        counts[called] += counts[name] * times
        return counts

    @cached_property
    def fused(self) -> frozenset[str]:
        """Names of computations inside fusions; their intermediate results are not in memory."""
        found: set[str] = set()
        for computation in self.computations.values():
            for instruction in computation.instructions.values():
                if instruction.opcode == "fusion" or computation.name in found:
                    found |= {called for called, _ in self._calls(computation, instruction)}
        return frozenset(found | self._below(found))

    def _below(self, names: set[str]) -> set[str]:
        below: set[str] = set()
        todo = list(names)
        while todo:
            computation = self.computations[todo.pop()]
            for instruction in computation.instructions.values():
                new = {called for called, _ in self._calls(computation, instruction)} - below
                below |= new
                todo += new
        return below

    def walk(self) -> Iterator[tuple[Computation, Instruction, int]]:
        """Yields each instruction that runs, with its computation and its number of executions."""
        for name, computation in self.computations.items():
            if times := self.executions[name]:
                for instruction in computation.instructions.values():
                    yield computation, instruction, times

    @cached_property
    def unknown_loops(self) -> tuple[str, ...]:
        """Names of executed loops whose trip count is neither in the text nor `unknown_trips`."""
        return tuple(
            instruction.name
            for computation, instruction, _ in self.walk()
            if instruction.opcode == "while"
            and self.trips(computation, instruction) is None
            and instruction != self._own_loop
        )

    @cached_property
    def _own_loop(self) -> Instruction | None:
        """The loop whose trip count is `unknown_trips`."""
        entry = self.computations[self.entry]
        unknown = [
            instruction
            for instruction in entry.instructions.values()
            if instruction.opcode == "while" and self.trips(entry, instruction) is None
        ]
        return unknown[0] if len(unknown) == 1 and self.unknown_trips is not None else None

    def _calls(
        self, computation: Computation, instruction: Instruction
    ) -> Iterator[tuple[str, int]]:
        """Yields the computations that an instruction calls, and how often per execution."""
        if instruction.opcode in _NOT_ENTERED:
            return
        called = _CALLED.findall(instruction.attributes)
        for names in _CALLED_LISTS.findall(instruction.attributes):
            called += [("branch", name.strip(" %")) for name in names.split(",") if name.strip()]
        turns = 1
        if instruction.opcode == "while":
            found = self.trips(computation, instruction)
            if found is None:
                found = self.unknown_trips if instruction == self._own_loop else None
            turns = 1 if found is None else found
        for role, name in called:
            if name in self.computations:
                yield name, turns if role == "body" else 1

    def trips(self, computation: Computation, loop: Instruction) -> int | None:
        """Trip count of a `while` loop; None if it can't be derived from the text.

        On some platforms XLA writes it into the text. On others it follows from the loop counter,
        if its start, its step and its limit in the condition are constants.
        """
        if known := _KNOWN_TRIPS.search(loop.attributes):
            return int(known[1])
        roles = dict(_CALLED.findall(loop.attributes))
        condition, body = (self.computations.get(roles.get(r, "")) for r in ("condition", "body"))
        if condition is None or body is None:
            return None
        return _Counter(self, computation, loop, condition, body).trips()


class _Counter:
    """Derives the trip count of one loop from its counter."""

    def __init__(
        self,
        module: Module,
        outside: Computation,
        loop: Instruction,
        condition: Computation,
        body: Computation,
    ):
        self._module, self._condition, self._body = module, condition, body
        start = outside.instructions[loop.operands[0]]
        self._starts = (
            [self._constant(outside, operand) for operand in start.operands]
            if start.opcode == "tuple"
            else []
        )

    def trips(self) -> int | None:
        """The trip count; None if it can't be derived."""
        root = list(self._condition.instructions.values())[-1]
        compare, operands = self._comparison(root)
        if compare is None or len(operands) != 2:
            return None
        index = self._element(self._condition, operands[0])
        limit = self._value(self._condition, operands[1])
        direction = re.search(r"direction=(\w+)", compare.attributes)
        if index is None or limit is None or direction is None or index >= len(self._starts):
            return None
        start, step = self._starts[index], self._step(index)
        if start is None or not step:
            return None
        extra = {"LT": 0, "GT": 0, "NE": 0, "LE": 1, "GE": 1}.get(direction[1])
        if extra is None:
            return None
        return max(0, math.ceil((limit - start + (extra if step > 0 else -extra)) / step))

    def _comparison(self, root: Instruction) -> tuple[Instruction | None, tuple[str, ...]]:
        """The comparison at the end of the condition, alone or in a fusion, and its operands."""
        if root.opcode == "compare":
            return root, root.operands
        if root.opcode != "fusion":
            return None, ()
        fused = self._module.computations[dict(_CALLED.findall(root.attributes))["calls"]]
        compare = list(fused.instructions.values())[-1]
        if compare.opcode != "compare":
            return None, ()
        inner = [fused.instructions[name] for name in compare.operands]
        if any(instruction.opcode != "parameter" for instruction in inner):
            return None, ()
        return compare, tuple(root.operands[int(instruction.inside)] for instruction in inner)

    def _step(self, index: int) -> int | None:
        """The constant that one iteration adds to an element of the loop's tuple."""
        root = list(self._body.instructions.values())[-1]
        if root.opcode != "tuple":
            return None
        update = _through_copies(self._body, root.operands[index])
        operands, opcode = update.operands, update.opcode
        if opcode == "fusion":
            fused = self._module.computations[dict(_CALLED.findall(update.attributes))["calls"]]
            opcode = list(fused.instructions.values())[-1].opcode
        if opcode != "add" or len(operands) != 2:
            return None
        for counter, step in itertools.permutations(operands):
            if self._element(self._body, counter) == index:
                return self._value(self._body, step)
        return None

    def _value(self, inside: Computation, name: str) -> int | None:
        """The value of a constant, including constants that the loop carries unchanged."""
        value = self._constant(inside, name)
        index = self._element(inside, name)
        if value is None and index is not None and index < len(self._starts):
            return self._starts[index]
        return value

    @staticmethod
    def _constant(computation: Computation, name: str) -> int | None:
        instruction = _through_copies(computation, name)
        if instruction.opcode != "constant" or not re.fullmatch(r"-?\d+", instruction.inside):
            return None
        return int(instruction.inside)

    @staticmethod
    def _element(computation: Computation, name: str) -> int | None:
        """Index in the loop's tuple of the element that this instruction reads; None if none."""
        instruction = _through_copies(computation, name)
        found = re.search(r"index=(\d+)", instruction.attributes)
        if instruction.opcode != "get-tuple-element" or found is None:
            return None
        return int(found[1])


def _through_copies(computation: Computation, name: str) -> Instruction:
    instruction = computation.instructions[name]
    while instruction.opcode in ("copy", "bitcast", "convert"):
        instruction = computation.instructions[instruction.operands[0]]
    return instruction


def parse(text: str, unknown_trips: int | None = None) -> Module:
    """Parses the text of `Compiled.as_text()`.

    Args:
        text: optimised HLO.
        unknown_trips: trip count of the entry computation's loop of unknown length (see `Module`).

    Example:
        >>> import jax, jax.numpy as jnp
        >>> square = jax.ShapeDtypeStruct((8, 8), jnp.float32)
        >>> module = parse(jax.jit(jnp.dot).lower(square, square).compile().as_text())
        >>> module.executions[module.entry]
        1
    """
    computations: dict[str, Computation] = {}
    entry, instructions = "", None
    for line in _CONTINUED.sub(" ", text).splitlines():
        if instructions is None:
            header = _HEADER.match(line)
            if header and "(" in line:
                instructions = {}
                computations[header[2]] = Computation(header[2], instructions)
                entry = header[2] if header[1] else entry
        elif line.startswith("}"):
            instructions = None
        elif found := _INSTRUCTION.match(line):
            instruction = _parse_instruction(found[1], line[found.end() :])
            instructions[instruction.name] = instruction
    return Module(computations, entry, unknown_trips)


def _parse_instruction(name: str, rest: str) -> Instruction:
    end = _closing(rest, 0) if rest.startswith("(") else rest.index(" ")
    opcode = _OPCODE.match(rest, end)
    if opcode is None:
        raise ValueError(f"not an instruction of HLO: {name} = {rest[:200]}")
    close = _closing(rest, opcode.end() - 1)
    inside = rest[opcode.end() : close - 1]
    return Instruction(
        name,
        opcode[1],
        parse_arrays(rest[:end]),
        tuple(_NAME.findall(inside)),
        inside,
        rest[close:],
    )


def parse_arrays(text: str) -> tuple[Array, ...]:
    """All arrays in the text of an HLO type; tuples are flattened.

    Example:
        >>> parse_arrays("(bf16[2,3]{1,0:T(8,128)S(1)}, f32[])")
        (Array(dtype='bf16', shape=(2, 3), space=1), Array(dtype='f32', shape=(), space=0))
    """
    arrays = []
    for dtype, dims, layout in _ARRAY.findall(text):
        shape = tuple(int(size.strip("<=")) for size in dims.split(",") if size)
        space = re.search(r"S\((\d+)\)", layout)
        arrays.append(Array(dtype, shape, int(space[1]) if space else 0))
    return tuple(arrays)


def _closing(text: str, start: int) -> int:
    """The position after the parenthesis that closes the one at `start`."""
    depth = 0
    for place in range(start, len(text)):
        depth += (text[place] == "(") - (text[place] == ")")
        if not depth:
            return place + 1
    raise ValueError(f"a parenthesis is never closed: {text[start : start + 200]}")


def bits(dtype: str) -> int:
    """Bits of one element of an HLO type.

    Example:
        >>> bits("bf16"), bits("s4"), bits("f8e4m3fn"), bits("c64")
        (16, 4, 8, 64)
    """
    if dtype in _BITS:
        return _BITS[dtype]
    digits = re.match(r"[a-z]+(\d+)", dtype)
    return int(digits[1]) if digits else 0

"""Reads the text of a compiled XLA program: computations, shapes, and how often each one runs.

The text is that of `compiled.as_text()`: one chip's part, in the order of its schedule. Loops need
trip counts that the program tells: those of `lax.scan` do.
"""

import functools
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from evac_jax.errors import DataError

_DTYPE = re.compile(r"pred|token|(?:b?f|[suc])(\d+)\w*")
_INSTRUCTION = re.compile(r"\s*(?:ROOT )?%([\w.\-]+) = ")
_COMPUTATION = re.compile(r"(ENTRY )?%([\w.\-]+) \(.*\{$")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\]")
_CALLED = re.compile(
    r"\b(body|condition|to_apply|calls|branch_computations)=\{?((?:%[\w.\-]+,? ?)+)"
)


@dataclass(frozen=True)
class Array:
    """Shape of an array, such as bf16[8,4096]."""

    dtype: str
    dims: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of entries."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Size in memory without padding."""
        known = _DTYPE.fullmatch(self.dtype)
        bits = (known[1] if known else "") or {"pred": 8, "token": 0}[self.dtype]
        return self.size * int(bits) // 8


@dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
        name: without "%".
        shape: text of the result's shape.
        opcode: such as "dot" or "all-gather-start".
        operands: their names.
        attributes: text behind the operands.
        literal: the value of a constant, the number of a parameter.
    """

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    literal: str = ""

    @functools.cached_property
    def arrays(self) -> tuple[Array, ...]:
        """The arrays of the result; several of a tuple."""
        return arrays_of(self.shape)

    @functools.cached_property
    def called(self) -> dict[str, tuple[str, ...]]:
        """{"body", "condition", "calls" ..: names of computations}."""
        return {
            kind: tuple(re.findall(r"%([\w.\-]+)", names))
            for kind, names in _CALLED.findall(self.attributes)
        }

    @functools.cached_property
    def config(self) -> dict:
        """What the backend notes about the instruction, {} if nothing."""
        found = re.search(r"backend_config=(\{.*\})", self.attributes)
        if not found:
            return {}
        try:
            return json.JSONDecoder().raw_decode(found[1])[0]
        except ValueError:
            return {}


@dataclass(frozen=True)
class Program:
    """A compiled program.

    Attributes:
        computations: {name: instructions in their order}.
        entry: name of the computation that runs first.
        partitions: number of chips.
    """

    computations: dict[str, tuple[Instruction, ...]]
    entry: str
    partitions: int
    _by_name: dict[str, dict[str, Instruction]] = field(default_factory=dict, compare=False)

    def find(self, computation: str, name: str) -> Instruction:
        """Return an instruction of a computation by its name."""
        if computation not in self._by_name:
            self._by_name[computation] = {i.name: i for i in self.computations[computation]}
        return self._by_name[computation][name]

    @functools.cached_property
    def fused(self) -> frozenset[str]:
        """Names of the computations of fusions."""
        return frozenset(
            name
            for lines in self.computations.values()
            for instruction in lines
            if instruction.opcode == "fusion"
            for name in instruction.called.get("calls", ())
        )

    def runs(self) -> dict[str, int]:
        """Return how often each computation runs; those of fusions and loops included.

        Of a conditional every branch counts, so the result is an upper limit there. Computations
        that reduce, compare or sort entries are left out.

        Raises:
            DataError: the program does not tell how often a loop runs.
        """
        total: dict[str, int] = {}

        def visit(name: str, times: int) -> None:
            total[name] = total.get(name, 0) + times
            for instruction in self.computations[name]:
                for called, factor in self._executed(name, instruction):
                    visit(called, times * factor)

        visit(self.entry, 1)
        return total

    def _executed(self, name: str, instruction: Instruction) -> Iterator[tuple[str, int]]:
        called = instruction.called
        if instruction.opcode == "while":
            yield called["body"][0], self.trips(name, instruction)
            return
        kinds = ["calls", "branch_computations"]
        if instruction.opcode in ("call", "async-start"):
            kinds.append("to_apply")
        for kind in kinds:
            yield from ((other, 1) for other in called.get(kind, ()))

    def trips(self, name: str, loop: Instruction) -> int:
        """Return how often the body of a `while` runs.

        A GPU's program notes it. In a TPU's it follows from the condition, counter < limit, and
        from what the body adds to the counter: 2 where a loop passes shards both ways round a ring.

        Raises:
            DataError: the program does not tell.
        """
        told = re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', loop.attributes)
        if told:
            return int(told[1])
        condition, body = (loop.called[kind][0] for kind in ("condition", "body"))
        match self._symbol(condition, self.computations[condition][-1].name):
            case ("compare", ("element", int(index)), int(limit)):
                result = self.computations[body][-1].name
                first, last = (
                    self._element(*where, index)
                    for where in ((name, loop.operands[0]), (body, result))
                )
                match first, last:
                    case int(), ("add", ("element", int(same)), int(step)) if same == index:
                        return -(-(limit - first) // step)
        raise DataError(
            f"while %{loop.name} in %{name}: expected a known trip count or a counter from a "
            "constant to a constant, as lax.scan gives them"
        )

    def _element(self, name: str, state: str, index: int) -> Any:
        """Return what an element of a tuple is made of."""
        found = self._source(name, state)
        return self._symbol(name, found.operands[index]) if found.opcode == "tuple" else None

    def _symbol(self, name: str, value: str, given: Sequence[Any] = ()) -> Any:
        """Return what an integer is made of.

        Args:
            given: what the operands of a fusion are, if `name` is its computation.

        Returns:
            a constant; ("element", i), that of a loop's state; ("add", a, b), a constant last;
            ("compare", a, b) for a < b; None for anything else.
        """
        found = self._source(name, value)
        index = re.search(r"index=(\d+)", found.attributes)
        if found.opcode == "constant":
            return int(found.literal) if found.literal.lstrip("-").isdigit() else None
        if found.opcode == "parameter" and given:
            return given[int(found.literal)]
        if found.opcode == "get-tuple-element" and index:
            return ("element", int(index[1]))
        if found.opcode not in ("add", "compare", "fusion"):
            return None
        parts = [self._symbol(name, operand, given) for operand in found.operands]
        if found.opcode == "fusion":
            (inside,) = found.called["calls"]
            return self._symbol(inside, self.computations[inside][-1].name, parts)
        if found.opcode == "add":
            return ("add", *sorted(parts, key=lambda part: isinstance(part, int)))
        return ("compare", *parts) if "direction=LT" in found.attributes else None

    def _source(self, name: str, value: str) -> Instruction:
        """Return the instruction that made a value, through copies of it."""
        found = self.find(name, value)
        while found.opcode in ("copy", "bitcast", "copy-done", "copy-start"):
            found = self.find(name, found.operands[0])
        return found


def arrays_of(shape: str) -> tuple[Array, ...]:
    """Return the arrays of a shape's text, from left to right."""
    return tuple(
        Array(dtype, tuple(int(n) for n in dims.split(",") if n))
        for dtype, dims in _ARRAY.findall(re.sub(r"\{[^{}]*\}", "", shape))
        if _DTYPE.fullmatch(dtype)
    )


def elements(shape: str) -> list[str]:
    """Return the elements of a tuple's shape; of another shape itself."""
    if not shape.startswith("("):
        return [shape]
    parts, depth, start = [], 0, 1
    for at, letter in enumerate(shape):
        depth += letter in "([{"
        depth -= letter in ")]}"
        if (letter == "," and depth == 1) or depth == 0:
            parts.append(re.sub(r"/\*.*?\*/", "", shape[start:at]).strip())
            start = at + 1
    return [part for part in parts if part]


def read(text: str) -> Program:
    """Return the program of a text.

    Raises:
        DataError: it is no text of a compiled program.
    """
    computations: dict[str, tuple[Instruction, ...]] = {}
    entry, name, lines = "", "", []
    for line in text.splitlines():
        if begins := _COMPUTATION.match(line):
            name, lines = begins[2], []
            entry = name if begins[1] else entry
        elif line.startswith("}") and name:
            computations[name], name = tuple(lines), ""
        elif name and (found := _INSTRUCTION.match(line)):
            lines.append(_instruction(found[1], line[found.end() :]))
    if not entry:
        raise DataError("expected the text of a compiled XLA program, got one without ENTRY")
    partitions = re.search(r"num_partitions=(\d+)", text)
    return Program(computations, entry, int(partitions[1]) if partitions else 1)


def _instruction(name: str, text: str) -> Instruction:
    shape, rest = _cut_shape(text)
    opcode, _, rest = rest.partition("(")
    operands, attributes = _cut_operands(rest)
    return Instruction(
        name,
        shape,
        opcode,
        tuple(re.findall(r"%([\w.\-]+)", operands)),
        attributes,
        operands if opcode in ("constant", "parameter") else "",
    )


def _cut_shape(text: str) -> tuple[str, str]:
    """Return (the shape at the beginning of a text, the rest)."""
    depth = 0
    for at, letter in enumerate(text):
        depth += letter in "([{"
        depth -= letter in ")]}"
        if letter == " " and depth == 0:
            return text[:at], text[at + 1 :]
    return text, ""


def _cut_operands(text: str) -> tuple[str, str]:
    """Return (what stands before the bracket that ends the operands, what follows it)."""
    depth = 1
    for at, letter in enumerate(text):
        depth += letter == "("
        depth -= letter == ")"
        if depth == 0:
            return text[:at], text[at + 1 :]
    return text, ""

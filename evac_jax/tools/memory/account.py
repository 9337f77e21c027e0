"""What a compiled program computes and what a chip receives, counted in its text.

XLA's own `cost_analysis` gives nothing for GPUs and counts the body of a loop once for TPUs.
"""

import functools
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from evac_jax.errors import DataError
from evac_jax.tools.memory import hlo
from evac_jax.tools.memory.hlo import Instruction, Program

COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "collective-permute", "all-to-all")
MATMULS = ("__cublas$lt$matmul", "__cublas$gemm")
ATTENTION = "__cudnn$fmha"


@dataclass(frozen=True)
class Collective:
    """A collective of a program.

    Attributes:
        kind: one of `COLLECTIVES`.
        times: how often it runs.
        result_bytes: of the result on one chip, each time.
        chips: that take part together.
        hidden: whether a product is computed while the data are on their way.
        where: computation and name.
    """

    kind: str
    times: int
    result_bytes: int
    chips: int
    hidden: bool
    where: str

    @property
    def received_bytes(self) -> float:
        """What a chip receives in all, where chips pass everything on in a ring.

        Of an all-gather and an all-to-all that is what the chip did not have; a reduce-scatter
        receives its result once from each other chip; an all-reduce is a reduce-scatter with an
        all-gather behind it.
        """
        others = self.chips - 1
        share = {
            "all-gather": others / self.chips,
            "all-to-all": others / self.chips,
            "reduce-scatter": others,
            "all-reduce": 2 * others / self.chips,
            "collective-permute": 1,
        }
        return self.times * self.result_bytes * share[self.kind]


@dataclass(frozen=True)
class Account:
    """Operations and traffic of one chip in one call of a program.

    Attributes:
        flops: of products (dot, convolution, attention); a multiplication with its addition is 2.
        collectives: all of them.
        fused_attention: whether a library's kernel attends without writing the scores.
    """

    flops: float
    collectives: tuple[Collective, ...]
    fused_attention: bool = False

    def received(self, kind: str, *, hidden: bool | None = None) -> float:
        """Return the bytes that collectives of a kind receive; `hidden` picks a part of them."""
        return sum(
            (
                found.received_bytes
                for found in self.collectives
                if found.kind == kind and hidden in (None, found.hidden)
            ),
            0.0,
        )

    @property
    def total_received(self) -> float:
        """Bytes that all collectives receive."""
        return sum(self.received(kind) for kind in COLLECTIVES)


def account(text: str) -> Account:
    """Count what a program does.

    Args:
        text: of a compiled program, in the order of its schedule.

    Raises:
        DataError: it cannot be read, or does not tell how often a loop runs.
    """
    program = hlo.read(text)
    runs, products = program.runs(), _Products(program)
    flops = sum(
        times * products.own(name, instruction)
        for name, times in runs.items()
        for instruction in program.computations[name]
    )
    collectives = _each_once(
        found for name, times in runs.items() for found in _collectives(products, name, times)
    )
    return Account(float(flops), tuple(collectives), f'custom_call_target="{ATTENTION}' in text)


class _Products:
    """Operations of a program's products, by instruction."""

    def __init__(self, program: Program):
        self.program = program
        self._inside: dict[str, float] = {}

    def own(self, name: str, instruction: Instruction) -> float:
        """Return the operations of an instruction itself."""
        opcode = instruction.opcode
        if opcode == "dot":
            return self._dot(name, instruction, instruction.attributes)
        if opcode == "convolution":
            return self._convolution(name, instruction)
        if opcode == "custom-call":
            target = _text(instruction, r'custom_call_target="([^"]*)"')
            if target.startswith(MATMULS):
                return self._matmul(name, instruction)
            if target.startswith(ATTENTION):
                return self._attention(name, instruction, backward="Backward" in target)
        return 0.0

    def inside(self, name: str) -> float:
        """Return the operations of one run of a computation, with all that it calls."""
        if name not in self._inside:
            self._inside[name] = sum(
                self.of(name, instruction) for instruction in self.program.computations[name]
            )
        return self._inside[name]

    def of(self, name: str, instruction: Instruction) -> float:
        """Return the operations of an instruction, with those of the computations it calls."""
        called = instruction.called
        names = [n for kind in ("body", "calls", "to_apply") for n in called.get(kind, ())]
        return self.own(name, instruction) + sum(map(self.inside, names))

    def _operand(self, name: str, instruction: Instruction, index: int) -> hlo.Array:
        return self.program.find(name, instruction.operands[index]).arrays[0]

    def _dot(self, name: str, instruction: Instruction, attributes: str) -> float:
        left = self._operand(name, instruction, 0)
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", attributes)
        dims = [int(d) for d in contracted[1].split(",") if d] if contracted else []
        return 2.0 * instruction.arrays[0].size * math.prod(left.dims[d] for d in dims)

    def _matmul(self, name: str, instruction: Instruction) -> float:
        numbers = instruction.config["gemm_backend_config"]["dot_dimension_numbers"]
        left = self._operand(name, instruction, 0)
        dims = [int(d) for d in numbers["lhs_contracting_dimensions"]]
        return 2.0 * instruction.arrays[0].size * math.prod(left.dims[d] for d in dims)

    def _attention(self, name: str, instruction: Instruction, *, backward: bool) -> float:
        """Two products of scores and values; five for the gradients, where scores come anew."""
        queries, keys = (self._operand(name, instruction, i) for i in (0, 1))
        length = keys.dims[-3 if len(keys.dims) > 3 else -2]
        return (10.0 if backward else 4.0) * queries.size * length

    def _convolution(self, name: str, instruction: Instruction) -> float:
        """2 x output channels and batch x input channels x positions that are no padding."""
        labels = _text(instruction, r"dim_labels=([\w?]+_[\w?]+->[\w?]+)")
        left, _, rest = labels.partition("_")
        kernel, _, out = rest.partition("->")
        lhs, rhs = (self._operand(name, instruction, i) for i in (0, 1))
        result = instruction.arrays[0]
        total = 2.0 * result.dims[out.index("b")] * result.dims[out.index("f")]
        total *= rhs.dims[kernel.index("i")]
        window = _window(instruction.attributes)
        for axis in range(len(labels.partition("_")[0]) - 2):
            label = str(axis)
            total *= _valid_positions(
                lhs.dims[left.index(label)],
                rhs.dims[kernel.index(label)],
                result.dims[out.index(label)],
                window(axis, "stride"),
                window(axis, "pad"),
                window(axis, "lhs_dilate"),
                window(axis, "rhs_dilate"),
            )
        return total


def _window(attributes: str):
    """Return (axis, field) -> value of a convolution's window; the low end of a padding."""
    text = re.search(r"window=\{([^}]*)\}", attributes)
    fields = dict(part.split("=") for part in text[1].split()) if text else {}

    def value(axis: int, name: str) -> int:
        if name not in fields:
            return 0 if name == "pad" else 1
        return int(fields[name].split("x")[axis].split("_")[0])

    return value


@functools.cache
def _valid_positions(
    size: int, kernel: int, out: int, stride: int, pad: int, dilate: int, kernel_dilate: int
) -> int:
    """Return how many (output, kernel) positions of an axis meet an entry of the input."""
    count = 0
    for at in range(out):
        for k in range(kernel):
            place = at * stride + k * kernel_dilate - pad
            count += 0 <= place < (size - 1) * dilate + 1 and place % dilate == 0
    return count


def _collectives(products: _Products, name: str, times: int) -> Iterator[tuple[str, Collective]]:
    """Yield (channel, collective) of one computation that runs `times` times.

    The channel is "" where nothing can repeat it, which is outside fusions.
    """
    program = products.program
    lines, fused = program.computations[name], name in program.fused
    for at, instruction in enumerate(lines):
        kind = instruction.opcode.removesuffix("-start")
        if kind not in COLLECTIVES:
            continue
        started = instruction.opcode.endswith("-start")
        shape = instruction.shape
        if started and kind != "all-reduce":  # (operands, results, ..)
            shape = hlo.elements(shape)[1]
        num_bytes = sum(array.bytes for array in hlo.arrays_of(shape))
        chips = _chips(instruction, program.partitions)
        if kind == "all-reduce" and name.startswith("all-reduce-scatter"):
            # A TPU's reduce-scatter: a fusion of an all-reduce with the slice that a chip keeps.
            kind, num_bytes = "reduce-scatter", num_bytes // chips
        hidden = started and _works_meanwhile(products, name, at)
        channel = re.search(r"channel_id=(\d+)", instruction.attributes)
        yield (
            f"channel {channel[1]}" if fused and channel else "",
            Collective(kind, times, num_bytes, chips, hidden, f"{name}/{instruction.name}"),
        )


def _each_once(found: Iterable[tuple[str, Collective]]) -> list[Collective]:
    """Return collectives without those of fusions that repeat another one's channel.

    A TPU's program may have a collective in the fusion that starts it and in the one that ends it.
    """
    kept: dict[str, Collective] = {}
    for channel, collective in found:
        kept.setdefault(channel or collective.where, collective)
    return list(kept.values())


def _works_meanwhile(products: _Products, name: str, at: int) -> bool:
    """Whether a product stands between a start and its done."""
    lines = products.program.computations[name]
    for instruction in lines[at + 1 :]:
        if instruction.opcode.endswith("-done") and lines[at].name in instruction.operands:
            return False
        if products.of(name, instruction):
            return True
    return False


def _chips(instruction: Instruction, partitions: int) -> int:
    """Return how many chips take part in a collective together."""
    text = instruction.attributes
    if "source_target_pairs=" in text:
        return partitions
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", text):
        return int(found[2])
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", text):
        sizes = {n: int(s) for n, s in re.findall(r"'(\w+)'=(\d+)", found[1])}
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", found[2])
        return math.prod(int(part) if part else sizes[axis] for axis, part in axes)
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", text):
        return len(found[1].split(","))
    if "replica_groups={}" in text or "replica_groups" not in text:
        return partitions
    raise DataError(f"%{instruction.name}: expected replica groups, got {text[:200]}")


def _text(instruction: Instruction, pattern: str) -> str:
    found = re.search(pattern, instruction.attributes)
    if not found:
        raise DataError(f"%{instruction.name}: expected {pattern}, got {instruction.attributes}")
    return found[1]

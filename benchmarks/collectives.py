"""Reads from HLO text what a compiled JAX program sends between devices."""

import math
import re

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BYTES = {"pred": 1, "u8": 1, "s8": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8}


def collectives(program: str) -> dict[str, dict[str, int]]:
    """Return {kind: {"count", "bytes"}} of a program's collectives; loops count with every pass.

    Bytes are those of the results: for an all-gather the whole array, for an all-reduce the array
    that every device gets.

    Args:
        program: HLO text of one device's part, as `compiled.as_text()` gives it; loops need known
            trip counts, which `lax.scan` gives.
    """
    bodies, entry = _computations(program)
    found: dict[str, dict[str, int]] = {}

    def visit(name: str, times: int) -> None:
        for line in bodies.get(name, ()):
            operation = re.match(r"\s*(?:ROOT )?%?[\w.\-]+ = (.*?) ([\w\-]+)\(", line)
            if operation is None:
                continue
            shapes, kind = operation[1], operation[2].removesuffix("-start")
            if kind in COLLECTIVES:
                total = found.setdefault(kind, {"count": 0, "bytes": 0})
                total["count"] += times
                total["bytes"] += times * _shape_bytes(shapes)
            trips = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
            for called in re.findall(r"(?:body|to_apply|calls)=%?([\w.\-]+)", line):
                visit(called, times * (int(trips[1]) if trips else 1))

    visit(entry, 1)
    return found


def _computations(program: str) -> tuple[dict[str, list[str]], str]:
    """Return the lines of each computation by name, and the name of the entry computation."""
    bodies: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in program.splitlines():
        if match := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line):
            lines = bodies[match[2]] = []
            entry = match[2] if match[1] else entry
        else:
            lines.append(line)
    return bodies, entry


def _shape_bytes(shapes: str) -> int:
    return sum(
        BYTES[kind] * math.prod(int(n) for n in dims.split(",") if n)
        for kind, dims in re.findall(r"(\w+)\[([\d,]*)\]", shapes)
    )

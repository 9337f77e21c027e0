"""The unit of the estimate: parts of memory, and the phases in which each is held."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

GB = 1e9


@dataclass(frozen=True)
class Part:
    """Something that takes memory.

    Attributes:
        name: for the table.
        num_bytes: on one device, or on the host.
        phases: phases of an iteration in which it is held; () = always.
    """

    name: str
    num_bytes: float
    phases: tuple[str, ...] = ()

    def times(self, count: float) -> "Part":
        """Return the same part `count` times over."""
        return replace(self, num_bytes=self.num_bytes * count)


def peak(parts: Sequence[Part]) -> tuple[float, str]:
    """Return (largest number of bytes held at once, its phase; "" if all phases are equal)."""
    phases = list(dict.fromkeys(phase for part in parts for phase in part.phases)) or [""]
    sums = {
        phase: sum(p.num_bytes for p in parts if phase in (p.phases or phases)) for phase in phases
    }
    worst = max(sums, key=lambda phase: sums[phase])
    return sums[worst], worst


def table(title: str, parts: Iterable[Part]) -> str:
    """Return a heading with the peak, and a line for each part of 5 MB or more."""
    parts = list(parts)
    most, phase = peak(parts)
    lines = [f"{title}: {most / GB:.2f} GB" + (f" at most, in {phase}" if phase else "")]
    for part in parts:
        if part.num_bytes >= 5e6:
            when = f"   {' and '.join(part.phases)} only" if part.phases else ""
            lines.append(f"  {part.num_bytes / GB:9.2f}  {part.name}{when}")
    return "\n".join(lines)

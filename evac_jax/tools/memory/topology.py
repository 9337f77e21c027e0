"""Chips that are not here: their data files, and the devices that XLA compiles for.

A topology is named CHIP:SHAPE. Of a TPU the shape is that of the slice, as Google names it
("v5p:4x4x4", "v5e:2x4"); of GPUs it is hosts x GPUs of a host ("h100:2x8").
"""

import math
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evac_jax.errors import ConfigError, nearest

CHIPS = Path(__file__).parent / "chips"
# Same for every GPU since compute capability 3.0 (CUDA C++ Programming Guide, technical
# specifications of each compute capability).
GPU_LIMITS = {
    "threads_per_block_limit": 1024,
    "threads_per_warp": 32,
    "block_dim_limit_x": 2**31 - 1,
    "block_dim_limit_y": 2**16 - 1,
    "block_dim_limit_z": 2**16 - 1,
}
CUDNN = (9, 10, 0)  # the oldest that jax-cuda13-plugin 0.10.2 accepts


@dataclass(frozen=True)
class Topology:
    """Chips and how they are connected.

    Attributes:
        name: CHIP:SHAPE as given.
        chip: name of the data file in chips/.
        shape: of a TPU slice; (hosts, GPUs of a host) of GPUs.
    """

    name: str
    chip: str
    shape: tuple[int, ...]

    @classmethod
    def parse(cls, name: str) -> "Topology":
        """Return the topology called `name`.

        Raises:
            ConfigError: unknown chip, or a shape that chips of this kind do not have.
        """
        chip, _, shape = name.lower().partition(":")
        known = sorted(path.stem for path in CHIPS.glob("*.toml"))
        if chip not in known:
            raise ConfigError(
                f"--topology: expected CHIP:SHAPE with a chip of {', '.join(known)}, got {name!r}."
                + nearest(chip, known)
            )
        sizes = tuple(int(size) for size in re.findall(r"\d+", shape))
        wanted = "HOSTSxGPUS, such as 1x8" if _facts(chip)["platform"] == "cuda" else "2x4 or 2x2x2"
        lengths = (2,) if _facts(chip)["platform"] == "cuda" else (2, 3)
        if shape != "x".join(map(str, sizes)) or len(sizes) not in lengths or 0 in sizes:
            raise ConfigError(f"--topology: expected {chip}:SHAPE with {wanted}, got {name!r}")
        return cls(name, chip, sizes)

    @property
    def platform(self) -> str:
        """The platform that JAX lowers for: "cuda" or "tpu"."""
        return _facts(self.chip)["platform"]

    @property
    def count(self) -> int:
        """Number of chips."""
        return math.prod(self.shape)

    @property
    def chip_name(self) -> str:
        """The chip as its maker calls it."""
        return _facts(self.chip)["name"]

    @property
    def memory_bytes(self) -> int:
        """Memory of one chip."""
        return _facts(self.chip)["memory"]["bytes"]

    @property
    def rates(self) -> dict[str, float]:
        """Rates of its maker's data sheet.

        Returns:
            "operations" a second in bfloat16; bytes a second that a chip receives by its "link"
            from the chips "linked" with it; bytes a second that these receive from "outside".

        Raises:
            ConfigError: its data file has none.
        """
        facts = _facts(self.chip)
        if "rates" not in facts:
            raise ConfigError(f"{CHIPS / self.chip}.toml: expected a table [rates], as of h100")
        return facts["rates"]

    def target(self) -> str:
        """Return what XLA is told about the chip: text of a GpuTargetConfigProto, "" for a TPU."""
        return _gpu_target(_facts(self.chip)) if self.platform == "cuda" else ""

    def devices(self) -> list[Any]:
        """Return the devices that JAX compiles for, one for each chip.

        Raises:
            ConfigError: this JAX has no compiler for the chip, or the slice does not exist.
        """
        from jax.experimental import topologies

        shape = "x".join(map(str, self.shape))
        try:
            if self.platform == "cuda":  # partitions x hosts x GPUs of a host
                found = topologies.get_topology_desc(
                    self.chip, "cuda", topology=f"1x{shape}", target_config=self.target()
                )
            else:
                found = topologies.get_topology_desc(
                    topology_name=f"{self.chip}:{shape}", platform="tpu"
                )
        except Exception as error:  # every backend raises another type
            raise ConfigError(f"--topology {self.name}: {error}") from error
        if len(found.devices) != self.count:
            raise ConfigError(
                f"--topology {self.name}: expected {self.count} devices, got {len(found.devices)}"
            )
        return list(found.devices)


def _facts(chip: str) -> dict[str, Any]:
    return tomllib.loads((CHIPS / f"{chip}.toml").read_text())


def _gpu_target(facts: dict[str, Any]) -> str:
    fields = dict(facts["target"])
    major, minor = fields.pop("capability")
    numbers = GPU_LIMITS | fields | {"device_memory_size": facts["memory"]["bytes"]}
    lines = [f"  {name}: {value}" for name, value in numbers.items()]
    lines.append(f"  cuda_compute_capability {{ major: {major} minor: {minor} }}")
    version = dict(zip(("major", "minor", "patch"), CUDNN, strict=True))
    version_text = " ".join(f"{name}: {value}" for name, value in version.items())
    return "\n".join(
        [
            *("gpu_device_info {", *lines, "}", 'platform_name: "CUDA"'),
            f"dnn_version_info {{ {version_text} }}",
            f'device_description_str: "{facts["name"]}"',
        ]
    )

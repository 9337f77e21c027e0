"""Compiles every preset for chips that are not here: memory, operations and traffic of a chip.

    python -m benchmarks.compiled [--memory] [--only NAME ...] [--list] [--cache DIR] [--out FILE]

The real `sample` and `update` are compiled in `.venv-aot` (`make aot`), by the same code as
`evac_jax.tools.memory.compile`. Every chip gets the micro-batch of one of the published run's 8
GPUs: batch and environments grow with the chips; below 8 only the batch shrinks. What was compiled
is kept in --cache, so that a second run only traces the programs, a minute each at most. "estimate"
is what `evac_jax.tools.memory` tells without compiling.

    --memory   only the updates, and of those only memory: the table of docs/memory.md
    --only     some rows, by their names; the last line then tells only what they tell
    --list     names, presets and topologies, nothing else
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.cost_model import Policy, Work, update_bytes
from evac_jax.devices import sharding
from evac_jax.errors import EvacJaxError
from evac_jax.memory import trainer
from evac_jax.memory.parts import GB, peak
from evac_jax.tools.memory.account import COLLECTIVES
from evac_jax.tools.memory.compile import CACHE, PYTHON, ROOT, Compiled, compile_ahead
from evac_jax.tools.memory.compiler import Request
from evac_jax.tools.memory.setup import Setup
from evac_jax.tools.memory.topology import Topology

PUBLISHED = {"env.num_envs": 16, "algo.global_batch": 256, "algo.micro_batch": 32}
GPUS = 8  # of the published run


@dataclass(frozen=True)
class Row:
    """A preset on chips.

    Attributes:
        name: for --only and the last line.
        config: FILE:PRESET.
        topology: CHIP:SHAPE.
        flags: beyond the batch's.
        batch: fields that grow with the chips, as on 8 of them; None = as in the preset.
        programs: that are compiled.
    """

    name: str
    config: str
    topology: str
    flags: tuple[str, ...] = ()
    batch: dict[str, int] | None = None
    programs: tuple[str, ...] = ("update",)

    def request(self, program: str) -> Request:
        """Return what is asked of the compiler."""
        chips = Topology.parse(self.topology).count
        sizes = {field: count * chips // GPUS for field, count in (self.batch or {}).items()}
        if chips < GPUS:  # a multiple of the simulators
            sizes.pop("env.num_envs", None)
        grown = tuple(f"--config.{field}={size}" for field, size in sizes.items())
        return Request(
            f"configs/{self.config}", (*grown, *self.flags), "", "", self.topology, program
        )


def rows() -> list[Row]:
    """Return all rows: every preset, and the layouts whose figures the pages show."""
    spatial, lora = "grpo.py:libero_spatial", "grpo.py:lora"
    both, copies = ("sample", "update"), ("--config.mesh.data=8",)
    cut = ("--config.mesh.data=1", "--config.mesh.fsdp=-1")
    return [
        Row("spatial8", spatial, "h100:1x8", programs=both),
        Row("spatial64", spatial, "h100:8x8", copies, PUBLISHED),
        Row("spatial1x64", spatial, "h100:1x64", (), PUBLISHED),
        Row("spatial4", spatial, "h100:1x4", (), PUBLISHED),
        Row("spatial2", spatial, "h100:1x2", (), PUBLISHED),
        Row("spatial1", spatial, "h100:1x1", (), PUBLISHED),
        Row("lora8", lora, "h100:1x8", programs=both),
        Row("lora8_cut", lora, "h100:1x8", cut),
        Row("one_gpu", "grpo.py:one_gpu_80gb", "h100:1x1"),
        Row("ppo_spatial8", "ppo.py:libero_spatial", "h100:1x8"),
        Row("ppo_lora8", "ppo.py:lora", "h100:1x8"),
        Row("ppo_one_gpu", "ppo.py:one_gpu_80gb", "h100:1x1"),
        Row("spatial8_v5p", spatial, "v5p:2x2x2"),
        Row("spatial8_v6e", spatial, "v6e:2x4"),
        Row("lora8_v5e", lora, "v5e:2x4"),
    ]


@dataclass(frozen=True)
class Found:
    """What one row gave.

    Attributes:
        row: that was compiled.
        programs: {"sample", "update": XLA's account}.
        estimate: bytes of a chip by `evac_jax.tools.memory`, without compiling.
        law: operations and bytes that a chip computes and receives in an update by the formulae
            of docs/scaling.md.
    """

    row: Row
    programs: dict[str, Compiled]
    estimate: float
    law: tuple[float, float] = (0.0, 0.0)

    @property
    def ratio(self) -> float:
        """Estimate over XLA's peak of the update; 0 if XLA refused it."""
        update = self.programs["update"]
        return self.estimate / update.peak if update.peak else 0.0


def measure(row: Row, cache: Path, programs: Sequence[str]) -> Found:
    """Compile a row's programs, or find them in `cache`."""
    topology, setup = Topology.parse(row.topology), row.request("update").setup()
    parts = trainer.trainer_parts(
        setup.config, setup.sizes, setup.episode, topology.count, topology.platform
    )
    told = {name: compile_ahead(row.request(name), ROOT / PYTHON, cache) for name in programs}
    return Found(row, told, peak(parts)[0], law(setup, topology.count))


def law(setup: Setup, chips: int) -> tuple[float, float]:
    """Return the operations and received bytes of a chip in an update by the cost model."""
    config, policy = setup.config, Policy.of(setup.sizes)
    samples = config.episodes_per_iteration * setup.episode.chunks // chips
    micro = (config.algo.micro_batch or config.algo.global_batch) // chips
    work = Work(
        *(1, 1, samples),
        micro_batch=micro,
        optimizer_batch=config.algo.global_batch // chips,
        update_epochs=config.algo.update_epochs,
    )
    data, fsdp = sharding.resolved(config.mesh.data, config.mesh.fsdp, chips)
    received = sum(update_bytes(policy, work, fsdp, data).values())
    return work.update_epochs * samples * policy.update, received


def memory_line(found: Found) -> str:
    """Return a row of the table of docs/memory.md."""
    update, row = found.programs["update"], found.row
    cells = (
        *(row.name, f"`{row.config}`", row.topology, f"{update.arguments / GB:.2f}"),
        *(f"{update.temporaries / GB:.2f}", f"{update.peak / GB:.2f}"),
        *(f"{found.estimate / GB:.2f}", f"{found.ratio:.3f}"),
    )
    return f"| {' | '.join(cells)} |"


def traffic_lines(found: Found) -> list[str]:
    """Return a row for each program: operations, TB by kind, the share that is hidden, the law."""
    lines = []
    for name, told in found.programs.items():
        account = told.account
        kinds = [f"{account.received(kind) / 1e12:.4g}" for kind in COLLECTIVES]
        hidden = sum(account.received(kind, hidden=True) for kind in COLLECTIVES)
        total = account.total_received
        formulae = ("-", "-")
        if name == "update":
            formulae = f"{found.law[0]:.4g}", f"{found.law[1] / 1e12:.4g}"
        cells = (
            *(found.row.name, name, f"{account.flops:.4g}", *kinds, f"{total / 1e12:.4g}"),
            *(f"{hidden / total:.2f}" if total else "-", *formulae, f"{told.seconds:.0f}"),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def last_line(found: dict[str, Found]) -> str:
    """Return what programs read; figures of rows that were left out are missing."""
    told: dict[str, str] = {}
    if row := found.get("lora8"):
        told["lora8_tb"] = f"{row.programs['update'].account.total_received / 1e12:.3f}"
    if row := found.get("spatial64"):
        told["spatial64_tb"] = f"{row.programs['update'].account.total_received / 1e12:.3f}"
    if row := found.get("spatial8"):
        told["spatial8_peak_gb"] = f"{row.programs['update'].peak / GB:.2f}"
    if ratios := [row.ratio for row in found.values() if row.ratio]:
        told["memory_ratio_min"] = f"{min(ratios):.3f}"
        told["memory_ratio_max"] = f"{max(ratios):.3f}"
    if row := found.get("spatial8"):
        fused = all(program.account.fused_attention for program in row.programs.values())
        told["fused_attention"] = str(int(fused))
    return " ".join(f"{name}={value}" for name, value in told.items())


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [row.name for row in rows()]
    parser.add_argument("--memory", action="store_true", help="only the memory of the updates")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME")
    parser.add_argument("--list", action="store_true", help="print the rows")
    parser.add_argument("--cache", type=Path, default=ROOT / CACHE, help="what was compiled")
    parser.add_argument("--out", type=Path, help="also write the figures to this JSON file")
    return parser.parse_args()


def main() -> None:
    """Print both tables; the last line is for programs."""
    args = _options()
    wanted = [row for row in rows() if row.name in args.only]
    if args.list:
        for row in wanted:
            print(f"{row.name:14} {row.config:24} {row.topology:10} {' '.join(row.programs)}")
        return
    found: dict[str, Found] = {}
    began = time.monotonic()
    for row in wanted:
        try:
            found[row.name] = measure(row, args.cache, ["update"] if args.memory else row.programs)
        except EvacJaxError as error:
            sys.exit(f"{row.name}: {error}")
        minutes = (time.monotonic() - began) / 60
        print(f"{row.name}: {minutes:.0f} minutes so far", file=sys.stderr, flush=True)
    print(
        "| row | preset | chips | arguments GB | temporaries GB | peak GB | estimate GB | ratio |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    print("\n".join(memory_line(row) for row in found.values()))
    if not args.memory:
        kinds = " | ".join(f"{kind} TB" for kind in COLLECTIVES)
        print(
            f"\n| row | program | operations | {kinds} | all TB | hidden | law: "
            "operations | TB | compiled s |"
        )
        print("| --- | --- | --- |" + " --- |" * (len(COLLECTIVES) + 5))
        print("\n".join(line for row in found.values() for line in traffic_lines(row)))
    if args.out:
        args.out.write_text(json.dumps([_plain(row) for row in found.values()], indent=2) + "\n")
    print(last_line(found))


def _plain(found: Found) -> dict[str, Any]:
    memory = Topology.parse(found.row.topology).memory_bytes
    programs = {name: told.as_json(memory) for name, told in found.programs.items()}
    return {
        "name": found.row.name,
        "config": found.row.config,
        "topology": found.row.topology,
        "estimate_bytes": found.estimate,
        "programs": programs,
    }


if __name__ == "__main__":
    main()

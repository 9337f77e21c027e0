r"""Rehearses one iteration of the full-size policy and of the full-size world model on a CPU.

    python -m benchmarks.full_size [--work DIR]                   # 40 GB of disk, 23 GB of memory
    python -m benchmarks.full_size --parts files world_model      # 8 GB of memory
    python -m benchmarks.full_size --sizes tiny --work DIR        # the machinery only; minutes

Random weights are written in the layouts of the published files and imported by the public tools:
a policy of 7.54 B parameters, and EVAC of 2.28 B with image tower, classifier and pose model. Each
then takes part in one iteration of GRPO by `launch.py`: two environments of one chunk, micro-batch
1, LoRA of rank 32, bfloat16. `world_model`: EVAC, 256 pixels, two denoising steps, with the
miniature's policy. `policy`: the 7 B policy in the miniature's world. Both together do not fit into
24 GB. The adapters are exported and, those of `policy`, imported again. An entropy bonus makes a
gradient even where random episodes all fail.

Nothing about quality follows: random weights imagine noise. It shows that everything fits
together, and what memory it takes beside the estimate of `evac_jax.tools.memory`.

Every stage is one command, and one runs at a time. Finished ones are kept under --work and found
again by their commands; `logs` holds what they said. The last line is

    policy_iteration= world_model_iteration= policy_peak_gb= world_model_peak_gb= grad_norm=
    memory_ratio= minutes=

`ok`, or in one word why not (status 1); "skipped" if --parts leaves it out. Peaks are of trainer
and simulator together, 1e9 bytes; grad_norm is the 7 B policy's; memory_ratio is estimate over
peak, the one farther from 1; minutes are those of all stages. docs/full_size.md.
"""

import argparse
import dataclasses
import json
import math
import os
import shutil
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from absl import logging

from benchmarks.peaks import COMMAND, SIMULATOR
from benchmarks.public_weights import SIZES, UNNORM_KEY
from evac_jax.errors import ConfigError, EvacJaxError
from evac_jax.files import cards
from evac_jax.telemetry.json_lines import read_metrics
from evac_jax.tools.command_line import run_tool
from evac_jax.tools.recipes import commands
from evac_jax.tools.recipes.stages import WORK, Stage, Workshop, needed_for

PRESET = "configs/grpo.py"
FILES, WORLD_MODEL, POLICY = PARTS = ("files", "world_model", "policy")
IMPORTED = {
    "world_model": "evac.ckpt",
    "reward": "resnet_rm.pth",
    "pose_model": "action_predictor.pth",
}
ALL_CORES = 1024  # of a stage: as many as there are
# 1e9 bytes that must be free: disk for everything, memory for each part.
DISK_GB = {"full": 40.0, "tiny": 0.1}
MEMORY_GB = {
    "full": {FILES: 4.0, WORLD_MODEL: 8.0, POLICY: 23.0},
    "tiny": dict.fromkeys(PARTS, 1.0),
}
RANK = 32
OK, SKIPPED = "ok", "skipped"
# Of both iterations.
SHARED = {
    "env.num_envs": 2,
    "env.max_episode_steps": 8,
    "algo.group_size": 2,
    "algo.global_batch": 2,
    "algo.micro_batch": 1,
    "algo.entropy_bonus": 0.01,
    "policy.lora_rank": RANK,
    "policy.lora_alpha": float(RANK),
    "train.iterations": 1,
    "eval.episodes": 0,
    "eval.ground_truth": "none",
    "simulator.processes": 1,
    # A chunk takes minutes, and another program may use the cores.
    "simulator.timeout_s": 36000.0,
    "simulator.start_timeout_s": 36000.0,
    "log.tensorboard": False,
}
OF = {
    WORLD_MODEL: {
        "world_model.checkpoint": f"{WORK}/world_model",
        "world_model.steps": 2,
        "reward.checkpoint": f"{WORK}/reward",
        "reward.success_frames": 1,
        "reward.judged_frames": 0,
        "env.pose_model": f"{WORK}/pose_model",
        "env.initial_states": "npy",
        "env.initial_states_path": f"{WORK}/public/starts",
        "env.train_starts": "(0, -1)",
        "eval.starts": "(0, -1)",
        "simulator.dtype": "bfloat16",
    },
    POLICY: {
        "policy.checkpoint": f"{WORK}/policy_weights",
        "policy.unnorm_key": UNNORM_KEY,
        "policy.max_prompt_length": 128,
        "policy.temperature": 1.6,
        "policy.param_dtype": "bfloat16",
        "policy.compute_dtype": "bfloat16",
        "policy.remat": "full",
        "policy.scan_layers": True,
    },
}


def settings(part: str) -> dict[str, object]:
    """Return {"section.field": value} of the iteration of `WORLD_MODEL` or `POLICY`."""
    threads = {"simulator.threads": len(os.sched_getaffinity(0))} if part == WORLD_MODEL else {}
    return SHARED | OF[part] | threads


def make_stages(sizes: str) -> list[Stage]:
    """Return all stages, a key of `SIZES` given; each has the name of what it makes."""
    stages: list[Stage] = []

    def add(name: str, command: Sequence[str], *inputs: str) -> None:
        measured = ("-m", "benchmarks.peaks", "--out", f"{WORK}/{name}.peaks", "--", *command)
        stages.append(Stage(name, measured, inputs, name, cores=ALL_CORES))

    def tool(name: str, **options: object) -> tuple[str, ...]:
        return ("-m", f"benchmarks.{name}", *commands.options(**options))

    def at(name: str) -> str:
        return f"{WORK}/{name}"

    add("public", tool("public_weights", kind="evac", sizes=sizes, out=at("public")))
    for name, file in IMPORTED.items():
        options = {"weights": at(f"public/{file}"), "out": at(name)}
        if name == "world_model" and sizes != "full":
            options["config"] = at("public/sizes.json")
        add(name, commands.tool("world_model.import_evac", **options), "public")
    weights = "policy_weights"
    add(weights, tool("public_weights", kind="policy", sizes=sizes, out=at(weights)))
    for part, inputs in {WORLD_MODEL: ("public", *IMPORTED), POLICY: (weights,)}.items():
        run, adapter = f"{part}_iteration", f"{part}_adapter"
        add(run, commands.launch(PRESET, WORK, run, settings(part)), *inputs)
        add(adapter, (*commands.export(at(run), at(adapter), best=False), "--adapter"), run)
    again = tool("adapter_again", run=at("policy_iteration"), adapter=at("policy_adapter"))
    again += commands.options(out=at("policy_again"))
    add("policy_again", again, "policy_adapter")
    return stages


def stages_of(stages: Sequence[Stage], parts: Sequence[str]) -> set[str]:
    """Return the names of the stages that parts need."""
    last = {
        FILES: ("policy_weights", *IMPORTED),
        WORLD_MODEL: ("world_model_adapter",),
        POLICY: ("policy_again",),
    }
    return needed_for(stages, [name for part in parts for name in last[part]])


def refuse_too_little_room(work: Path, sizes: str, parts: Sequence[str]) -> None:
    """Check disk and memory before anything is written.

    Raises:
        ConfigError: there is too little of one; says what to do.
    """
    held = sum(path.stat().st_blocks * 512 for path in work.rglob("*") if path.is_file()) / 1e9
    free, needed = shutil.disk_usage(work).free / 1e9, DISK_GB[sizes] - held
    if free < needed:
        raise ConfigError(
            f"--work: expected {needed:.0f} GB of free disk at {work}, got {free:.0f}; name a "
            "folder on a larger disk"
        )
    memory = max(MEMORY_GB[sizes][part] for part in parts)
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    available = 1024 * int(lines["MemAvailable"].split()[0]) / 1e9
    if available < memory:
        raise ConfigError(
            f"--parts {' '.join(parts)}: expected {memory:.0f} GB of available memory, got "
            f"{available:.0f}; end other programs, or leave out --parts {POLICY}, which needs most"
        )


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One iteration.

    Attributes:
        verdict: "ok", or in one word what is wrong.
        grad_norm: before clipping.
        peaks, estimates: bytes of the trainer and of the simulator.
        seconds: of the whole command.
    """

    verdict: str
    grad_norm: float = math.nan
    peaks: Mapping[str, int] = dataclasses.field(default_factory=dict)
    estimates: Mapping[str, float] = dataclasses.field(default_factory=dict)
    seconds: float = math.nan

    @property
    def peak_gb(self) -> float:
        """Peak of all processes together."""
        return sum(self.peaks.values()) / 1e9 if self.peaks else math.nan

    @property
    def ratio(self) -> float:
        """Estimate over peak."""
        return sum(self.estimates.values()) / 1e9 / self.peak_gb if self.estimates else math.nan


def verdict(metrics: Mapping[str, float | None], adapter: Path, again: Path | None) -> str:
    """Return "ok", or in one word what is wrong with an iteration.

    Args:
        metrics: of the iteration.
        adapter: the exported one.
        again: the same after an import; None = it was not imported.
    """
    from safetensors.numpy import load_file

    loss, norm = metrics.get("actor/loss"), metrics.get("actor/grad_norm")
    if loss is None or norm is None or not (math.isfinite(loss) and math.isfinite(norm)):
        return "not_finite"
    if metrics["actor/skipped_updates"]:
        return "not_updated"
    if not norm > 0:
        return "no_gradient"
    # Every B begins at zero, so that a new adapter changes nothing.
    file = "adapter_model.safetensors"
    pairs = load_file(adapter / file)
    if not any(value.any() for name, value in pairs.items() if ".lora_B." in name):
        return "unchanged"
    if again is not None and cards.sha256(adapter / file) != cards.sha256(again / file):
        return "not_equal"
    return OK


def estimates(work: Path, part: str) -> dict[str, float]:
    """Return the bytes of both processes of an iteration by `evac_jax.tools.memory`."""
    from evac_jax.memory.parts import peak
    from evac_jax.tools.memory import __main__ as memory
    from evac_jax.tools.memory.layouts import BARE_PROCESS, layouts

    told = {name: str(value).replace(WORK, str(work)) for name, value in settings(part).items()}
    config = memory.read_config(PRESET, [f"--config.{n}={value}" for n, value in told.items()])
    host = layouts(memory.read_setup(config, "", ""), 0)[0].host
    logging.info("estimate of %s\n%s", part, host.describe())
    found = {title: peak(parts)[0] * count for title, parts, count in host.held}
    return {
        COMMAND: found["trainer"] + BARE_PROCESS,
        SIMULATOR: found["simulator process"] + found["frame slots"] + BARE_PROCESS,
    }


def outcome(work: Path, part: str) -> Outcome:
    """Return what the finished stages of an iteration left."""
    run = work / f"{part}_iteration"
    metrics = next(told for told in read_metrics(run) if told["iteration"] == 1)
    again = work / "policy_again" if part == POLICY else None
    measured = json.loads((work / f"{run.name}.peaks").read_text())
    return Outcome(
        verdict(metrics, work / f"{part}_adapter", again),
        metrics.get("actor/grad_norm") or math.nan,
        measured["peak_bytes"],
        estimates(work, part),
        measured["seconds"],
    )


def table(outcomes: Mapping[str, Outcome]) -> str:
    """Return one line for each process of each iteration that ran."""
    lines = [f"{'iteration':13}{'process':>12}{'peak GB':>10}{'estimate GB':>13}{'seconds':>9}"]
    for part, found in outcomes.items():
        for process, peak in found.peaks.items():
            name = "trainer" if process == COMMAND else process
            lines.append(
                f"{part:13}{name:>12}{peak / 1e9:10.2f}{found.estimates[process] / 1e9:13.2f}"
                f"{found.seconds:9.0f}"
            )
    return "\n".join(lines)


def last_line(outcomes: Mapping[str, Outcome], minutes: float) -> str:
    """Return the line for programs."""
    policy, world_model = (outcomes.get(p, Outcome(SKIPPED)) for p in (POLICY, WORLD_MODEL))
    ratios = [found.ratio for found in (policy, world_model) if not math.isnan(found.ratio)]
    ratio = max(ratios, key=lambda r: abs(math.log(r)), default=math.nan)
    return (
        f"policy_iteration={policy.verdict} world_model_iteration={world_model.verdict} "
        f"policy_peak_gb={policy.peak_gb:.2f} world_model_peak_gb={world_model.peak_gb:.2f} "
        f"grad_norm={policy.grad_norm:.3g} memory_ratio={ratio:.2f} minutes={minutes:.1f}"
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's values."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--work", type=Path, default=Path("runs/full_size"), help="default: runs/full_size")
    add("--sizes", choices=SIZES, default="full")
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Print a table; the last line is for programs."""
    args = parse(argv)
    logging.set_verbosity(logging.INFO)
    args.work.mkdir(parents=True, exist_ok=True)
    refuse_too_little_room(args.work, args.sizes, args.parts)
    shop = Workshop(args.work, cores=len(os.sched_getaffinity(0)))
    stages, outcomes = make_stages(args.sizes), {}
    for part in (part for part in PARTS if part in args.parts):
        try:
            shop.run(stages, only=stages_of(stages, [part]))
        except EvacJaxError as error:
            if part == FILES:
                raise
            sys.stderr.write(f"\n{error}\n")
            outcomes[part] = Outcome("failed")
            continue
        if part != FILES:
            outcomes[part] = outcome(shop.work, part)
    done = [shop.record(stage.name) for stage in stages]
    print(table(outcomes))
    print(last_line(outcomes, sum(record.get("seconds", 0.0) for record in done) / 60))
    if any(found.verdict != OK for found in outcomes.values()):
        sys.exit(1)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the stage under way as well
    run_tool(main)

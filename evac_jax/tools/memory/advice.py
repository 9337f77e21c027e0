"""What to change if a run does not fit, and which preset needs the least hardware."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping

from evac_jax.config.schema import TrainConfig
from evac_jax.errors import ConfigError
from evac_jax.memory.parts import GB
from evac_jax.tools.memory.layouts import COLLOCATED, Layout, indivisible, layout
from evac_jax.tools.memory.setup import Setup

DEVICE_COUNTS = (1, 2, 4, 8, 16, 32, 64)
# Changes; those that cost the run least come first. "devices" and "half" are computed values.
LEVERS: tuple[dict[str, object], ...] = (
    {"policy.remat": "full"},
    {"algo.micro_batch": "devices"},
    {"simulator.dtype": "bfloat16"},
    {"env.num_envs": "half"},
    {"policy.compute_dtype": "bfloat16"},
    {"policy.lora_rank": 32, "policy.param_dtype": "bfloat16"},
)
WORTH_WHILE = 0.99  # a change that saves less than a hundredth is left out


def changed(config: TrainConfig, values: Mapping[str, object]) -> TrainConfig:
    """Return the configuration with {"section.field": value} changed."""
    for name, value in values.items():
        section, field = name.split(".")
        part = dataclasses.replace(getattr(config, section), **{field: value})
        config = dataclasses.replace(config, **{section: part})
    return config


def _worked_out(config: TrainConfig, lever: Mapping[str, object], devices: int) -> dict:
    """Return the values of a change for this run, {} if it is not possible (any more)."""
    values = dict(lever)
    if values.get("algo.micro_batch"):
        values = {"algo.micro_batch": devices}
    if values.get("env.num_envs"):
        group = getattr(config.algo, "group_size", 1) * config.simulator.processes
        envs = config.env.num_envs // 2
        if not envs or envs % group or envs % devices:
            return {}
        values = {"env.num_envs": envs, "rollout.epochs": config.rollout.epochs * 2}
    return values


def steps(setup: Setup, devices: int, name: str) -> Iterator[tuple[dict, Layout]]:
    """Yield (all changes so far, the layout with them) after each change."""
    best, so_far = layout(setup, devices, name), {}
    for lever in LEVERS:
        while values := _worked_out(setup.config, lever, max(devices, 1)):
            trial = dataclasses.replace(setup, config=changed(setup.config, values))
            found = layout(trial, devices, name)
            if found.device_bytes > WORTH_WHILE * best.device_bytes:
                break
            setup, best, so_far = trial, found, so_far | values
            yield so_far, best


def advice(setup: Setup, devices: int, name: str, limit: float) -> str:
    """Return the flags that make a layout fit in `limit` bytes per device, or come closest."""
    tried = []
    for step in steps(setup, devices, name):
        tried.append(step)
        if step[1].device_bytes <= limit:
            break
    if not tried:
        return "nothing in the configuration makes it smaller; take more or larger devices"
    flags, found = tried[-1]
    text = " ".join(f"--config.{field}={value}" for field, value in flags.items())
    text += f"  ({found.device_bytes / GB:.1f} GB)"
    if found.device_bytes <= limit:
        return f"fits with {text}"
    return f"not even with {text}; take more or larger devices"


def fewest_devices(setup: Setup, limit: float) -> tuple[int, Layout] | None:
    """Return the smallest number of devices on which a run fits, collocated; None if above 64.

    Numbers that do not divide the batches are left out.
    """
    for devices in DEVICE_COUNTS:
        if not indivisible(setup.config, devices):
            found = layout(setup, devices, COLLOCATED)
            if found.device_bytes <= limit:
                return devices, found
    return None


def presets_table(names: list[str], setup_of: Callable[[str], Setup], limit: float) -> str:
    """Return a line for each preset and the name of the one that needs the least hardware."""
    lines, needs = [], {}
    for name in names:
        try:
            fewest = fewest_devices(setup_of(name), limit)
        except ConfigError as error:
            lines.append(f"  {name:16} {error}")
            continue
        if fewest is None:
            lines.append(f"  {name:16} does not fit on {DEVICE_COUNTS[-1]} devices")
            continue
        needs[name] = fewest[0]
        lines.append(f"  {name:16} {fewest[0]} x {limit / GB:.0f} GB, collocated: {fewest[1].line}")
    if needs:
        lines.append(f"cheapest preset that fits: {min(needs, key=lambda name: needs[name])}")
    else:
        lines.append("no preset fits")
    return "\n".join(lines)

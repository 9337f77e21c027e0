"""Folders of runs as a trainer leaves them, without training."""

import copy
import json
from pathlib import Path

import numpy as np

from evac_jax.config.build import default_config, to_dict
from evac_jax.telemetry import video


def make_run(folder: Path, *, iterations: int = 4, of: int | None = None, **settings) -> Path:
    """Write a run that was evaluated at 0, 2, 4 ..; success rises by 10 points an iteration.

    Args:
        of: iterations that it is to have; more than `iterations` = it is under way.
        settings: "section__field" -> value of its configuration.
    """
    folder.mkdir(parents=True)
    config = copy.deepcopy(to_dict(default_config("grpo")))
    config["train"]["iterations"] = of or iterations
    for name, value in settings.items():
        section, _, field = name.partition("__")
        if field:
            config[section][field] = value
        else:
            config[section] = value
    (folder / "config.json").write_text(json.dumps(config))
    lines = []
    for iteration in range(iterations + 1):
        line = {"iteration": iteration}
        if iteration:
            line |= {
                "env/success_rate": 0.1 * iteration,
                "env/num_trajectories": 128.0,
                "actor/entropy": 3.0 - 0.1 * iteration,
                "actor/skipped_updates": 0.0,
                "time/step": 10.0,
                "time/env": 8.0,
                "time/env/imagine": 6.0,
                "time/actor": 1.0,
            }
        if iteration % 2 == 0:
            line |= {
                "eval/imagined/success_rate": 0.1 + 0.1 * iteration,
                "eval/imagined/num_trajectories": 10.0,
            }
        lines.append(line)
    write_lines(folder / "metrics.jsonl", lines)
    if iterations >= (of or iterations):
        (folder / "summary.json").write_text("{}")
    return folder


def write_lines(path: Path, lines: list[dict]) -> None:
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))


def add_films(folder: Path, iteration: int, starts: dict[str, list[int]], *, shared: bool) -> None:
    """Add film strips: {"imagined": start ids, "ground_truth": start ids}."""
    films = []
    for place, numbers in starts.items():
        for index, start in enumerate(numbers):
            strip = f"{place}_{iteration}_{index}.png"
            frames = np.full((9, 8, 8, 3), 20 * index, np.uint8)
            video.write_strip(folder / "videos" / strip, frames)
            films.append(
                {"place": place, "video": "", "strip": strip, "start": start}
                | {"instruction": f"lift {start}", "success": place == "imagined"}
            )
    values = {"iteration": iteration, "shared_starts": shared, "films": films}
    path = folder / "videos" / f"iteration_{iteration:05d}.json"
    path.write_text(json.dumps(values))

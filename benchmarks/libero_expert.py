r"""Plays the initial states of a LIBERO suite with a scripted player; docs/libero.md.

    python -m benchmarks.libero_expert [--suite libero_spatial] [--kind expert] [--per_task 50] \
        [--action_repeat 1] [--out FILE]

LIBERO is the one that `make libero` has installed, unless --python or --root name another. Nothing
is rendered but the first frame. Results go to FILE, one line per episode; started again, the
command goes on where it was. The last line is for programs: the share of successes.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from evac_jax.config.libero import LiberoConfig
from evac_jax.sim.libero_players import KINDS, LiberoPlayer, scripted_tasks
from evac_jax.sim.libero_pool import LiberoPool
from evac_jax.telemetry.report import wilson_interval
from evac_jax.tools.command_line import KINDS as NUMBERS
from evac_jax.tools.command_line import add_libero, libero_of, run_tool

Outcome = tuple[int, bool, int]  # start id, success, actions until it


def play(pool: LiberoPool, start: int, player: LiberoPlayer, steps: int) -> Outcome:
    """Play one episode until it succeeds, or for `steps` actions."""
    pose = pool.start([0], np.array([start]))[1][0]
    for t in range(steps):
        action = player.act(pose, pool.look([0])[0])
        played = pool.play([0], [action[None]], [False], blind=True)[0]
        pose = played.poses[-1]
        if played.success.any():
            return start, True, t + 1
    return start, False, steps


def expert_success(
    config: LiberoConfig,
    *,
    kind: str = "expert",
    per_task: int | None = None,
    seed: int = 0,
    out: Path | None = None,
) -> dict[str, list[Outcome]]:
    """Return the episodes of every task that scripts can do, by the task's name.

    Args:
        kind: of player.
        per_task: initial states, the first ones; None = all.
        seed: of the player.
        out: file to which episodes are appended; those that it holds are not played again.
    """
    done, repeat = {}, config.action_repeat
    what = {"suite": config.suite, "steps_at_most": config.episode_steps, "action_repeat": repeat}
    what |= {"kind": kind, "seed": seed}
    if out is not None and out.exists():
        rows = map(json.loads, out.read_text().splitlines())
        done = {row["start"]: row for row in rows if row.items() >= what.items()}
    pool = LiberoPool(config, 1)
    try:
        suite, found = pool.suite, {}
        count = suite.num_starts // len(suite.tasks) if per_task is None else per_task
        for number, task in scripted_tasks(pool.bddl_files, suite).items():
            for start in range(number, count * len(suite.tasks), len(suite.tasks)):
                row = done.get(start)
                if row is None:
                    rng = np.random.default_rng([seed, start])
                    player = LiberoPlayer(kind, task, rng, repeat=repeat)
                    result = play(pool, start, player, config.episode_steps)
                    row = dict(zip(("start", "success", "steps"), result, strict=True))
                    if out is not None:
                        with out.open("a") as file:
                            file.write(json.dumps(row | what) + "\n")
                outcome = row["start"], row["success"], row["steps"]
                found.setdefault(suite.tasks[number], []).append(outcome)
            print(_shown(suite.tasks[number], found[suite.tasks[number]]), flush=True)
    finally:
        pool.close()
    return found


def share(found: Mapping[str, Sequence[Outcome]]) -> float:
    """Return the share of successes among the episodes of all tasks."""
    return float(np.mean([success for part in found.values() for _, success, _ in part]))


def _shown(name: str, episodes: Sequence[Outcome]) -> str:
    good = [steps for _, success, steps in episodes if success]
    low, high = wilson_interval(len(good), len(episodes))
    span = f"{min(good)}-{max(good)}, mean {np.mean(good):.0f} actions" if good else "-"
    return (
        f"{len(good):4d}/{len(episodes)} = {len(good) / len(episodes):.3f} [{low:.3f}, {high:.3f}]"
        f"  {span:30s}  {name}"
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_libero(parser)
    parser.add_argument(
        "--image_size", type=NUMBERS["count"], default=64, help="as config.libero.image_size"
    )
    parser.add_argument("--action_repeat", type=NUMBERS["count"], default=1, help="2: at 10 Hz")
    parser.add_argument("--kind", choices=KINDS, default="expert", help="of player")
    parser.add_argument(
        "--per_task", type=NUMBERS["count"], help="initial states of every task; all if left out"
    )
    parser.add_argument("--seed", type=NUMBERS["natural"], default=0, help="of the player")
    parser.add_argument("--out", type=Path, help="file of results, to go on later")
    args = parser.parse_args()
    config = libero_of(args, image_size=args.image_size, action_repeat=args.action_repeat)
    found = expert_success(
        config, kind=args.kind, per_task=args.per_task, seed=args.seed, out=args.out
    )
    episodes = [episode for part in found.values() for episode in part]
    print(_shown("all", episodes))
    print(f"{args.kind}_success={share(found):.4f}")


if __name__ == "__main__":
    run_tool(main)

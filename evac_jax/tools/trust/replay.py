"""Plays the actions of recorded episodes in imagination, as reinforcement learning does.

The environment class is the same as in training. It starts from an episode's first frame:
action -> pose network -> imagined frames -> success classifier -> rules of the episode. Only the
first frame, the instruction and the actions of the recording are inputs; the rest is the truth for
the comparison.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from absl import logging

from evac_jax.bridge.environment import IDLE
from evac_jax.config import vlm_card
from evac_jax.errors import ConfigError
from evac_jax.files.recordings import Episodes
from evac_jax.sim import env as sim_env
from evac_jax.sim.env_config import WorldModelEnvConfig
from evac_jax.sim.recorded_starts import RecordedStarts
from evac_jax.sim.reward import make_judge
from evac_jax.tools.trust.scores import Records, compare

FILM_FRAMES = 9  # frames that are kept of each episode that may be shown
NO_STARTS = {"initial_states": "", "initial_states_path": ""}  # a recording has them
RIGHT, FALSE, MISSED, NOTHING = "right", "false", "missed", "no success"


@dataclasses.dataclass(frozen=True)
class Film:
    """An episode to show: verdict, kind, and frames uint8 [n V H W 3], imagined and real."""

    verdict: str
    source: str
    imagined: np.ndarray
    real: np.ndarray


def check_judge(settings: dict, instructions: Sequence[str]) -> None:
    """Check that what judges is there and can judge, before anything is imagined.

    Classifiers, which are small, are loaded; a vision-language model is only looked at.

    Args:
        settings: fields of `WorldModelEnvConfig`.
        instructions: of the episodes.

    Raises:
        ConfigError: a folder does not exist, or a classifier does not know an instruction.
        CheckpointError: a classifier cannot be loaded.
        DataError: a folder holds no vision-language model.
    """
    if not settings.get("reward"):
        raise ConfigError("--reward: expected the folder of what judges success, got nothing")
    config = WorldModelEnvConfig.from_dict(settings | NO_STARTS)
    if config.judge == "vlm":
        vlm_card.check_is_model(config.reward)
    else:
        make_judge(dataclasses.replace(config, device="cpu"), instructions)


def make_environment(
    settings: dict, source: RecordedStarts, steps: int, batch: int, pictures: int
) -> sim_env.WorldModelEnv:
    """Return the RL environment for a recording; `settings` are fields of `WorldModelEnvConfig`.

    `steps` is the length of the longest episode. `batch` episodes are imagined at the same time;
    all frames of the first `pictures` of them are decoded.

    Two things differ from training, without changing a verdict. Actions are used as they were
    executed. Imagination continues after a success (which is latched); otherwise late frames would
    be compared only for failed episodes.
    """
    own = {
        **NO_STARTS,
        "num_envs": batch,
        "clip_envs": pictures,
        "max_episode_steps": steps,
        "gripper": "none",
        "ignore_terminations": True,
        "auto_reset": False,
    }
    return sim_env.make(settings | own, source)


def replay(
    env: sim_env.WorldModelEnv,
    data: Episodes,
    *,
    seed: int = 0,
    colors: np.ndarray | None = None,
) -> tuple[Records, list[Film]]:
    """Imagine every episode of `data` from its first frame and its actions, and compare.

    Verdicts and poses are compared for all episodes, pictures for those that the environment
    decodes completely.

    Args:
        env: made for this recording by `make_environment`.
        data: the truth.
        seed: of the imagination's noise.
        colors: RGB [C 3] of the blocks to track in the first view; None tracks nothing.

    Returns:
        The comparison, and up to one film per verdict and kind of episode.
    """
    steps = int(data.length.max())
    records = Records.empty(data.num_episodes, steps, 0 if colors is None else len(colors) + 1)
    records.source[:], records.real[:] = data.source, data.success_once()
    films: dict[tuple[str, str], Film] = {}
    # Episodes of similar length share a batch, so that short ones do not wait for much longer ones.
    order = np.argsort(data.length, kind="stable")
    batch = env.spec.num_envs
    for first in range(0, len(order), batch):
        episodes = order[first : first + batch]
        kept = _replay_batch(env, data, episodes, seed + first // batch, records, colors)
        for row, episode in enumerate(episodes[: len(kept)]):
            film = _film(records, data, int(episode), kept[row])
            films.setdefault((film.verdict, film.source), film)
        done = first + len(episodes)
        logging.info("imagined %d of %d episodes", done, data.num_episodes)
    return records, list(films.values())


def _replay_batch(env, data, episodes, seed, records, colors) -> np.ndarray:
    """Fill the records of `episodes`; return frames of those filmed, uint8 [n FILM V H W 3]."""
    spec, count = env.spec, len(episodes)
    chunk = spec.action.chunk
    length = data.length[episodes]
    starts = np.full(spec.num_envs, IDLE, np.int64)
    starts[:count] = episodes
    frames = torch.zeros(spec.num_envs, *spec.image_shape, dtype=torch.uint8)
    clip = torch.zeros(spec.clip_envs, chunk, *spec.image_shape, dtype=torch.uint8)
    filmed = min(count, spec.clip_envs)
    env.reset(starts, seed, frames, clip)
    shown = _film_steps(length[:filmed])  # [n FILM]
    kept = np.repeat(frames[:filmed, None].numpy(), shown.shape[1], axis=1)
    for begin in range(0, int(length.max()), chunk):
        steps = begin + np.arange(chunk)
        alive = steps < length[:, None]  # [n K]
        actions = np.zeros((spec.num_envs, chunk, spec.action.dim), np.float32)
        rows = data.rows(episodes[:, None], np.minimum(steps, length[:, None]))
        actions[:count] = data.actions[rows] * alive[..., None]
        result = env.step(actions, frames, clip)
        imagined = clip[:filmed].numpy()
        # The success of an episode is read at the step where its recording ends.
        inside = begin < length
        records.imagined[episodes[inside]] = result.success[:count][inside]

        row, step = np.nonzero(alive)
        where = episodes[row], begin + step
        after = data.rows(where[0], where[1] + 1)
        poses = env.window.poses[:count, -chunk:].cpu().numpy()[row, step]
        away = poses[:, :3] - data.poses[after, :3]
        records.pose_mm[where] = 1000 * np.linalg.norm(away, axis=1)
        row, step = np.nonzero(alive[:filmed])  # the first ones of the same list
        where, after = (where[0][: len(row)], where[1][: len(row)]), after[: len(row)]
        compare(records, where, imagined[row, step], data.frames[after], colors)
        row, place = np.nonzero((shown > begin) & (shown <= begin + chunk))
        kept[row, place] = imagined[row, shown[row, place] - begin - 1]
    return kept


def _film_steps(length: np.ndarray) -> np.ndarray:
    """Steps at equal distances from the first frame (0) to the last (`length`), int [n FILM]."""
    return np.rint(np.linspace(0, length, FILM_FRAMES, axis=1)).astype(np.int64)


def _film(records: Records, data: Episodes, episode: int, imagined: np.ndarray) -> Film:
    dreamt, true = bool(records.imagined[episode]), bool(records.real[episode])
    verdict = {
        (True, True): RIGHT, (True, False): FALSE, (False, True): MISSED, (False, False): NOTHING,
    }[dreamt, true]  # fmt: skip
    rows = data.rows(np.array(episode), _film_steps(data.length[episode : episode + 1])[0])
    source = data.sources[data.source[episode]]
    return Film(verdict, source, imagined.copy(), np.array(data.frames[rows]))

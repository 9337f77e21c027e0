"""Chooses the threshold with which a vision-language model (VLM) judges success.

    python -m evac_jax.tools.reward.vlm_threshold --model DIR --data RECORDING --out DIR2

Nothing is trained. The model judges recorded episodes as it will judge imagined ones
(evac_jax/sim/vlm.py): after each chunk's last frame; a chunk that a recording ends in is judged at
its last frame. The threshold is chosen on the training part: at most the share --false_success of
the claimed successes is false, and as few true ones as possible are missed. With --imagined
(evac_jax.tools.world_model.imagine_dataset) it is chosen on imagined episodes, which a run judges.
The held-out parts, real and imagined, then show what it is worth. The folder --out is what
reward.checkpoint and `evac_jax.tools.trust --reward` take. The last line is for programs.
"""

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from absl import logging

from evac_jax.config import hub
from evac_jax.config.schema import RewardConfig
from evac_jax.config.vlm import PROMPT, VlmConfig
from evac_jax.config.vlm_card import VlmCard
from evac_jax.errors import ConfigError, DataError, TrainingError
from evac_jax.files import cards, recordings
from evac_jax.files.atomic import keep, replacing, whole_folder
from evac_jax.files.recordings import Episodes
from evac_jax.sim.vlm import VlmJudge
from evac_jax.telemetry import report
from evac_jax.tools.command_line import Parser, refuse_existing, run_tool
from evac_jax.tools.reward import calibration
from evac_jax.tools.reward.train import by_episode

AT_ONCE = 32  # episodes whose frames are remembered at the same time
LEAST = -80.0  # of a threshold; below it a probability is zero in float32


def verdicts(judge: VlmJudge, data: Episodes, chunk: int) -> np.ndarray:
    """Return the mean log-probability at every frame, float32 [N T+1]; -inf where there is none.

    Args:
        judge: the model.
        data: N episodes; T is the length of the longest.
        chunk: frames that are imagined together.

    Raises:
        ConfigError: even the longest episode ends before a verdict.
    """
    longest = int(data.length.max())
    values = np.full((data.num_episodes, longest + 1), -math.inf, np.float32)
    for begin in range(0, data.num_episodes, AT_ONCE):
        episodes = np.arange(begin, min(begin + AT_ONCE, data.num_episodes))
        watch = judge.watch(len(episodes), -(-longest // chunk))
        watch.start(np.arange(len(episodes)), data.frames[data.first[episodes], 0])
        for step in range(0, longest, chunk):
            rows = np.flatnonzero(data.length[episodes] > step)
            alive = episodes[rows]
            now = np.minimum(step + chunk, data.length[alive])
            frames = data.frames[data.rows(alive, now), 0]
            texts = [data.instructions[task] for task in data.task[alive]]
            values[alive, now] = watch.means(rows, frames, texts)
        logging.info("judged %d of %d episodes", episodes[-1] + 1, data.num_episodes)
    return values


def choose(values: np.ndarray, success: np.ndarray, allowed: float) -> dict:
    """Return the verdicts at the threshold chosen, see `calibration.choose_threshold`.

    Args:
        values: of `verdicts` [N T+1].
        success: the truth [N T+1].
        allowed: largest share of the claimed successes that may be false.

    Raises:
        TrainingError: no verdict.
    """
    # An episode is claimed by its highest value, so nothing changes between two of these.
    highest = np.unique(values.max(1))
    highest = highest[np.isfinite(highest)].astype(np.float64)
    if not len(highest):
        raise TrainingError("cannot choose a threshold: every episode ends before a verdict")
    places = np.concatenate((highest[:1] - 1, (highest[1:] + highest[:-1]) / 2))
    return calibration.choose_threshold(
        values, success, 1, allowed, np.clip(np.round(places, 6), LEAST, 0)
    )


def check(vlm: VlmConfig, chunk: int, success: np.ndarray, parts: Mapping[str, Episodes]) -> None:
    """Check what a choice needs before a model judges for hours.

    Args:
        vlm: how the model will judge.
        chunk: frames that are imagined together.
        success: which of the episodes that the threshold is chosen on are successes, bool [n].
        parts: name -> episodes that will be judged.

    Raises:
        ConfigError: a part's longest episode ends before a verdict.
        DataError: episodes of one kind only.
    """
    for name, part in parts.items():
        longest = int(part.length.max())
        if vlm.too_long_for(-(-longest // chunk)):
            raise ConfigError(
                f"--every, --average: a verdict needs {vlm.every} x {vlm.average} chunks of "
                f"{chunk} frames, the longest episode to judge ({name}) has {longest}; lower one "
                "of them, or record longer episodes"
            )
    if success.all() or not success.any():
        raise DataError(
            f"cannot choose a threshold: all {len(success)} episodes are "
            f"{'successes' if success.all() else 'failures'}; record episodes of both kinds"
        )


def drawn(data: Episodes, count: int, seed: int) -> Episodes:
    """Return at most so many episodes, drawn by `seed`; 0 = all."""
    rows = np.random.default_rng(seed).permutation(data.num_episodes)[: count or None]
    return data.select(np.sort(rows))


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the command line's values."""
    parser, usual = Parser("reward.vlm_threshold", __doc__), VlmConfig()
    add = parser.add_argument
    add("--model", required=True, help="folder of a VLM of transformers, or hf://OWNER/NAME")
    add("--data", required=True, nargs="+", help="folders of recorded episodes")
    add("--imagined", nargs="+", default=[], help="folders of imagined episodes")
    add("--out", required=True, help="new folder for threshold and card")
    add("--episodes", type="natural", default=256, help="judged of each part at most; 0 = all")
    calibration.add_options(parser)
    add("--prompt", default=PROMPT, help="as config.reward.vlm.prompt, and so on")
    for name in ("frames", "every", "average", "batch"):
        add(f"--{name}", type="count", default=getattr(usual, name))
    add("--dtype", choices=("bfloat16", "float32", "float16"), default=usual.dtype)
    parser.add_device()
    parser.add_threads()
    parser.add_seed("the draw of episodes")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = parse(argv)
    logging.set_verbosity(logging.INFO)
    torch.set_num_threads(args.threads)
    names = ("prompt", "frames", "every", "average", "batch", "dtype")
    vlm = VlmConfig(**{name: getattr(args, name) for name in names})
    if problems := vlm.problems():
        raise ConfigError("\n".join(f"--{problem}" for problem in problems))
    out = Path(args.out)
    refuse_existing(out)
    kinds = {"real": recordings.load(*args.data)}
    if args.imagined:
        kinds["imagined"] = recordings.load(*args.imagined)
    parts = {
        kind: [drawn(part, args.episodes, args.seed) for part in data.both_parts()]
        for kind, data in kinds.items()
    }
    decisive = "imagined" if args.imagined else "real"
    chosen_on = parts[decisive][0]
    judged = {"chosen_on": chosen_on} | {kind: held_out for kind, (_, held_out) in parts.items()}
    check(vlm, args.chunk, chosen_on.success_once(), judged)
    model = hub.local(args.model)
    judge = VlmJudge.load(model, (), vlm, args.device)
    with whole_folder(out) as folder:
        folder.mkdir()
        aside = out.with_name(f"{out.name}.verdicts.npz")
        keep(aside)  # of an earlier call
        values: dict[str, np.ndarray] = {}
        for name, part in judged.items():
            values[name] = verdicts(judge, part, args.chunk)
            with replacing(aside) as temporary:
                np.savez(temporary, allow_pickle=False, **values)
            logging.info("judged %s; kept in %s until the threshold is chosen", name, aside)
        truth = {name: by_episode(part, np.asarray(part.success)) for name, part in judged.items()}
        chosen = choose(values["chosen_on"], truth["chosen_on"], args.false_success)
        threshold = chosen["threshold"]
        scores = {
            kind: calibration.judge(values[kind], truth[kind], threshold, 1) for kind in kinds
        }
        card = VlmCard.make(model, threshold, args.chunk, vlm)
        card.write(folder)
        facts = {
            "threshold": threshold,
            "allowed_false_success": args.false_success,
            "chosen_on": {"kind": decisive, "episodes": chosen_on.num_episodes, **chosen},
            "scores": scores,
            "held_out_episodes": {kind: judged[kind].num_episodes for kind in kinds},
            "model": hub.address_of(model),
        }
        cards.write_json(folder / "card.json", cards.card(**facts))
    aside.unlink()
    _tell(out, card, chosen, scores, args.false_success)


def _tell(out: Path, card: VlmCard, chosen: dict, scores: dict, allowed: float) -> None:
    """Say what was found, and how a run uses it."""
    # Presets have other frames than the defaults, so those are always said.
    usual = RewardConfig(success_frames=0, judged_frames=0)
    flags = " ".join([f"--config.reward.checkpoint={out}", *card.flags(usual)])
    report.show(f"held-out: {scores}\n\nIn a run:\n  {flags}\n")
    for name, verdict in {"chosen on": chosen, **scores}.items():
        if verdict["false_success"] > allowed:
            logging.warning(
                "%s: %.0f %% of the claimed successes are false, more than the %.0f %% asked for",
                *(name, 100 * verdict["false_success"], 100 * allowed),
            )
    last = scores.get("imagined", scores["real"])
    sys.stdout.write(
        f"threshold={card.threshold} false_success={last['false_success']:.3f} "
        f"missed_success={last['missed_success']:.3f}\n"
    )


if __name__ == "__main__":
    run_tool(main)

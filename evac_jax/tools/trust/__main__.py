r"""The trust report: how well episodes in a world model agree with what would really happen.

    python -m evac_jax.tools.trust --preset=miniature --out DIR
    python -m evac_jax.tools.trust --world_model DIR --reward DIR \
        --pose_model DIR --data RECORDING --threshold 0.8 --out DIR

The actions of recorded episodes are played in imagination, from the first frame on, as in
training. The recording shows what really happened. --data is your recording; with a preset and
without --data, episodes are recorded in the preset's ground truth, on scenes that nothing else
uses. The tool writes report.json and report.html, which is self-contained. The last line is for
programs.
"""

import argparse
import dataclasses
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from absl import logging

from evac_jax.config import vlm_card
from evac_jax.config.build import from_config_dict
from evac_jax.config.flags import load_preset
from evac_jax.config.schema import MINIATURE_WEIGHTS, TrainConfig
from evac_jax.errors import DataError
from evac_jax.evac import model_folders
from evac_jax.evac.weight_files import find_file
from evac_jax.files import cards, recordings
from evac_jax.files.atomic import keep
from evac_jax.files.recordings import Episodes
from evac_jax.miniature.render import BLOCK_COLORS
from evac_jax.miniature.tasks import INSTRUCTIONS
from evac_jax.sim.recorded_starts import RecordedStarts
from evac_jax.simulators import world_model_specs
from evac_jax.telemetry import report
from evac_jax.tools.command_line import Parser, number, run_tool
from evac_jax.tools.episodes import collect
from evac_jax.tools.resume import check_folder
from evac_jax.tools.trust import page
from evac_jax.tools.trust.replay import Film, check_judge, make_environment, replay
from evac_jax.tools.trust.scores import summarise
from policies.ranges import Range

REPORT, PAGE = "report.json", "report.html"
ROOT = Path(__file__).parents[3]
PRESETS = {"miniature": "configs/grpo.py:miniature"}
TRAINED_POLICY = Path(MINIATURE_WEIGHTS) / "policy_trained"
SEED = 100_000  # of the recording that is made for a preset; far from the seeds of others
BATCH = 64  # episodes that are played at the same time
CPU_BATCH = 8  # episodes per network call on a CPU; more do not fit into its caches
# Flag -> field of the environment's settings.
FIELDS = {
    "world_model": "world_model",
    "veto": "veto",
    "pose_model": "pose_model",
    "threshold": "threshold",
    "success_frames": "success_frames",
    "judged_frames": "judged_frames",
    "steps": "steps",
    "eta": "eta",
    "dtype": "dtype",
}
OF_THE_REWARD = ("threshold", "veto", "success_frames", "judged_frames")


def preset_config(name: str) -> TrainConfig:
    """Return the configuration of a preset."""
    return from_config_dict(load_preset(str(ROOT / PRESETS[name])).to_dict())


def settings_of(args: argparse.Namespace, config: TrainConfig | None) -> dict:
    """Return the settings of the imagination: the preset's, overridden by the command line."""
    settings = dict(world_model_specs(config)[0]["config"]) if config else {}
    if args.reward:
        settings |= judged_by(args.reward)
    given = {field: getattr(args, flag) for flag, field in FIELDS.items()}
    settings |= {field: value for field, value in given.items() if value is not None}
    at_once = CPU_BATCH if args.device == "cpu" else 0
    return settings | {"device": args.device, "seed": args.seed, "max_batch": at_once}


def second(args: argparse.Namespace) -> argparse.Namespace:
    """Return the command line for the second reward; flags about the first are left out."""
    own = dict.fromkeys(OF_THE_REWARD) | {"reward": args.second_reward}
    return argparse.Namespace(**vars(args) | own)


def judged_by(reward: str) -> dict:
    """Return the settings of a folder that judges: of classifiers, or of `reward.vlm_threshold`."""
    card = vlm_card.read(reward)
    if card is None:
        return {"judge": "classifier", "reward": reward}
    return card.settings() | vlm_card.simulated(reward)


def weights_of(settings: dict) -> dict[str, Path]:
    """Return the folders of all networks that imagine and judge, by the setting that names each."""
    folders = {name: settings.get(name) for name in ("world_model", "pose_model")}
    for i, folder in enumerate((settings.get("reward") or "").split(",")):
        folders["reward" + f"[{i}]" * (i > 0)] = folder
    return {name: Path(folder) for name, folder in folders.items() if folder}


def digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file of weights in a folder, of a model of ours or of others."""
    config = folder / model_folders.CONFIG_FILE
    named = cards.read_json(config).get("weights") if config.is_file() else None
    files = [find_file(folder / named)] if named else sorted(folder.glob("*.safetensors"))
    return {file.name: cards.sha256(file) for file in files}


def record(config: TrainConfig, trained: Path | None, per_kind: int, seed: int) -> Episodes:
    """Play fresh scenes of the miniature's ground truth, `per_kind` of each kind, and load them.

    Args:
        config: names the start policy and the temperature with which policies are sampled.
        trained: folder of a policy after training; None = only the other three kinds.
        per_kind: episodes of each kind.
        seed: of scenes and players.
    """
    players, heat = {"expert": "expert", "noisy": "noisy"}, config.policy.temperature
    players["start policy"] = f"policy:{config.policy.checkpoint}@{heat}"
    if trained is not None:
        players["trained policy"] = f"policy:{trained}@{heat}"
    folder = Path(tempfile.mkdtemp(prefix="episodes-"))
    try:
        out = folder / "recording"
        collect.collect(
            out,
            per_kind * len(players),
            dict.fromkeys(players.values(), 1.0),
            seed=seed,
            steps=config.env.max_episode_steps,
            policy=config.policy,
        )
        # The arrays are mapped, so they stay readable after the files are deleted.
        data = recordings.load(out)
    finally:
        shutil.rmtree(folder)
    return dataclasses.replace(data, card=data.card | {"sources": list(players)})


def choose(data: Episodes, part: str, per_kind: int, seed: int) -> Episodes:
    """Return at most `per_kind` episodes of every source, drawn by `seed`.

    Args:
        data: a recording.
        part: "held_out" or "all".
        per_kind: number of episodes; 0 = all.
        seed: of the draw.

    Raises:
        DataError: there are no such episodes.
    """
    if part == "held_out":
        data = data.split()[1]
    if not data.num_episodes:
        raise DataError(
            "--data: no episode of the recording is held out; record more, or give --part=all if "
            "nothing was trained on it"
        )
    rng, chosen = np.random.default_rng(seed), []
    for source in np.unique(data.source):
        rows = rng.permutation(np.flatnonzero(data.source == source))
        chosen.append(rows[: per_kind or None])
    return data.select(np.sort(np.concatenate(chosen)))


def validate(
    data: Episodes, settings: dict, *, seed: int = 0, batch: int = BATCH, pictures: float = 1.0
) -> tuple[dict, list[Film]]:
    """Return the figures of the report and the films, see `scores` and `replay`.

    Args:
        data: the truth.
        settings: fields of `WorldModelEnvConfig`.
        seed: of the imagination's noise.
        batch: episodes that are played at the same time.
        pictures: share of them whose pictures are compared; success is judged for all.
    """
    source = RecordedStarts(data)
    batch = min(batch, data.num_episodes)
    filmed = max(1, round(pictures * batch))
    env = make_environment(settings, source, int(data.length.max()), batch, filmed)
    # Only in the miniature it is known what things look like.
    tabletop = set(source.instructions) <= set(INSTRUCTIONS)
    colors = BLOCK_COLORS if tabletop else None
    records, films = replay(env, data, seed=seed, colors=colors)
    chunk = env.spec.action.chunk
    env.close()
    figures = summarise(records, data.sources, chunk)
    figures["notes"] = [*env.spec.notes, *([] if tabletop else [OBJECTS_SKIPPED])]
    names = ("steps", "eta", "threshold", "success_frames", "judged_frames", "dtype")
    used = {name: settings[name] for name in names if name in settings}
    figures["settings"] = {"chunk": chunk, **used, "seed": seed}
    return figures, films


OBJECTS_SKIPPED = (
    "Object error was not measured: things are found by their colour, which is known of the "
    "miniature's blocks only."
)
NO_TRAINED_POLICY = (
    "There is no trained policy among the episodes: three kinds only. Give its folder to --trained."
)


def last_line(figures: dict) -> str:
    """Return the line for programs; a figure that does not exist is NaN."""
    values = {name: math.nan if v is None else v for name, v in figures.items()}
    return (
        f"agreement={values['agreement']:.2f} false_success={values['false_success']:.2f} "
        f"psnr_1={values['psnr_1']:.1f} psnr_4={values['psnr_4']:.1f}"
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's values."""
    parser = Parser("trust", __doc__)
    parser.add_argument("--preset", choices=sorted(PRESETS), help="settings, weights, recording")
    parser.add_argument(
        "--out",
        default="runs/trust",
        help="folder of the report; an earlier one there is kept as report_1, and so on",
    )
    parser.add_argument("--data", nargs="+", help="recordings to compare with")
    parser.add_argument(
        "--part", choices=("held_out", "all"), default="held_out", help="episodes of --data to use"
    )
    parser.add_argument(
        "--episodes", type="natural", default=128, help="of every kind at most; 0 = all of --data"
    )
    parser.add_argument("--trained", type=Path, help="policy after training, a Hugging Face folder")
    parser.add_argument("--world_model", help="folder of weights; default: the preset's")
    parser.add_argument(
        "--reward", help="likewise of the success classifier, of several (A,B), or of vlm_threshold"
    )
    parser.add_argument(
        "--second_reward",
        help="another one to compare with, by the preset's or its own threshold and frames; all is "
        "imagined a second time",
    )
    parser.add_argument(
        "--veto", type="share", help="of several classifiers that disagree; 0 = none"
    )
    parser.add_argument("--pose_model", help="likewise of the pose network")
    parser.add_argument(
        "--threshold", type=number(float, Range(-80, 1)), help="probability that counts as success"
    )
    parser.add_argument("--success_frames", type="count", help="frames in a row that must show it")
    parser.add_argument(
        "--judged_frames", type="natural", help="last frames of a chunk judged; 0 = all"
    )
    parser.add_argument("--steps", type="count", help="denoising steps")
    parser.add_argument("--eta", type="share", help="denoising noise, 0..1")
    parser.add_argument("--dtype", help="precision of the world model")
    parser.add_device()
    parser.add_argument("--batch", type="count", default=BATCH, help="episodes played side by side")
    parser.add_argument(
        "--pictures",
        type="share_above_0",
        default=0.5,
        help="share of episodes whose pictures are compared",
    )
    parser.add_threads()
    parser.add_seed("imagination, scenes and players")
    args = parser.parse_args(argv)
    if not args.preset and not args.data:
        parser.error("expected --data RECORDING, or --preset to make one in its ground truth")
    if not args.episodes and not args.data:
        parser.error("--episodes: expected at least 1 without --data, got 0")
    return args


def run(args: argparse.Namespace) -> dict:
    """Write the report of a command line; return it."""
    out, began = Path(args.out), time.process_time()
    check_folder(out, REPORT)
    config = preset_config(args.preset) if args.preset else None
    settings, notes = settings_of(args, config), []
    other = settings_of(second(args), config) if args.second_reward else None
    weights = weights_of(settings)
    if other is not None:
        told = weights_of({"reward": other["reward"]}).items()
        weights |= {f"second_{part}": folder for part, folder in told}
    data = None
    if args.data:
        data = choose(recordings.load(*args.data), args.part, args.episodes, args.seed)
    for judging in filter(None, (settings, other)):
        check_judge(judging, INSTRUCTIONS if data is None else data.asked)
    if data is None:
        trained = args.trained or (TRAINED_POLICY if TRAINED_POLICY.is_dir() else None)
        notes += [NO_TRAINED_POLICY] if trained is None else []
        assert config is not None  # the parser wants --data or --preset
        data = record(config, trained, args.episodes, SEED + args.seed)
        weights["start policy"] = Path(config.policy.checkpoint)
        weights |= {"trained policy": trained} if trained else {}
    used = {part: digests(folder) for part, folder in weights.items()}
    result, films = validate(
        data, settings, seed=args.seed, batch=args.batch, pictures=args.pictures
    )
    result |= {"notes": notes + result["notes"], "weights": used}
    out.mkdir(parents=True, exist_ok=True)
    for file in (out / PAGE, out / REPORT):
        keep(file)

    def save() -> None:
        cpu_seconds = round(time.process_time() - began)
        result.update(cards.card(cpu_seconds=cpu_seconds, data=_provenance(data)))
        cards.write_json(out / REPORT, result)

    save()  # before anything more is imagined or drawn
    if other is not None:
        # The noise is the same, so both judge the same frames; no pictures are compared again.
        judged, _ = validate(data, other, seed=args.seed, batch=args.batch, pictures=1e-9)
        result["second_reward"] = {
            "name": Path(args.second_reward).name,
            "settings": judged["settings"],
            "overall": {name: judged["overall"][name] for name in ("episodes", *page.SHARES)},
        }
        save()
    page.write(out / PAGE, result, films)
    return result


def _provenance(data: Episodes) -> dict:
    """The description in the recording's card, without its long lists."""
    return {name: data.card[name] for name in ("command", "seed", "sha256") if name in data.card}


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = parse(argv)
    logging.set_verbosity(logging.INFO)
    torch.set_num_threads(args.threads)
    result = run(args)
    said = [page.judge(result["overall"])[1], *page.findings(result), *result["notes"]]
    report.show("\n".join([*said, f"\n{Path(args.out) / PAGE}", ""]))
    sys.stdout.write(last_line(result["figures"]) + "\n")


if __name__ == "__main__":
    run_tool(main)

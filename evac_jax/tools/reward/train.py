"""Trains the success classifier on recorded frames and chooses its threshold.

    python -m evac_jax.tools.reward.train --data DIR --imagined DIR2 --out DIR3 --steps 2000

The classifier will judge imagined frames, which are blurred and have slightly wrong colours.
Therefore it is trained on disturbed frames. With --autoencoder it also sees frames that the world
model's autoencoder has encoded and decoded. With --imagined it also sees imagined episodes
(evac_jax.tools.world_model.imagine_dataset), labelled with what really happened. Frames that look
like success although the episode failed in reality are hard negatives; the tool searches for them
twice during training and draws them more often. At the end the classifier is calibrated on held-out
imagined episodes, so that with a threshold of 0.5 at most the share --false_success of the claimed
successes is false (see `calibration`). Frames are not flipped, because the camera never shows
mirrored scenes.
"""

import argparse
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from absl import logging
from torch import Tensor, nn

from evac_jax.errors import DataError, EvacJaxError, TrainingError
from evac_jax.evac import model_folders
from evac_jax.files import cards, recordings
from evac_jax.files.atomic import keep, whole_folder
from evac_jax.files.recordings import Episodes
from evac_jax.sim.reward import RewardConfig, RewardNet
from evac_jax.tools import torch_training
from evac_jax.tools.command_line import Parser, refuse_existing, run_tool
from evac_jax.tools.finite import check_finite
from evac_jax.tools.reward import calibration
from evac_jax.tools.reward.margin import NO_MARGIN, near_change

POSITIVES, OTHER_TASK = 0.35, 0.15  # of a batch; the rest fails
NEAR_END = 0.7  # of the failing frames come from the second half of their episodes
HARD = 0.15  # of a batch, as soon as hard negatives are known
MINE_AT = (0.4, 0.7)  # shares of the training after which the tool searches for them
MINED = 4096  # frames that each search looks at
IMAGINED = "imagined:"  # names of sources of imagined episodes begin with this


class FrameSampler:
    """Draws class-balanced batches from recorded episodes.

    Besides successes and failures, a batch contains successes with another task's instruction,
    which count as failures. Without them the classifier might ignore the instruction. A classifier
    without instructions (`num_instructions` 0) gets none of these.

    Args:
        margin: frames that are never drawn, see `margin.near_change`.

    Raises:
        DataError: no frame with or none without success is left.
    """

    def __init__(
        self,
        data: Episodes,
        num_instructions: int,
        rng: np.random.Generator,
        margin: Sequence[int] = NO_MARGIN,
    ):
        self._data, self._rng, self._num_instructions = data, rng, num_instructions
        # Rows of frames, and the episode and the step that each belongs to.
        episode = np.repeat(np.arange(data.num_episodes), data.length + 1)
        step = np.concatenate([np.arange(length + 1) for length in data.length])
        clear = ~near_change(data, *margin)[data.first[episode] + step]
        episode, step = episode[clear], step[clear]
        self._row, self._task = data.first[episode] + step, data.task[episode]
        success, late = np.asarray(data.success)[self._row], step > (data.length // 2)[episode]
        self._success = np.flatnonzero(success)
        self._late, self._early = np.flatnonzero(~success & late), np.flatnonzero(~success & ~late)
        pools = {"success": self._success, "early failure": self._early, "late failure": self._late}
        if missing := [name for name, pool in pools.items() if not len(pool)]:
            raise DataError(
                f"no frame of {', '.join(missing)} to train on, in {data.num_episodes} episodes "
                f"with a margin of {tuple(margin)} frames; record more, or narrow the margin"
            )
        imagined = np.array([source.startswith(IMAGINED) for source in data.sources])
        failed = imagined[data.source] & ~data.success_once()
        self._suspects, self._hard = np.flatnonzero(failed[episode] & late), np.array([], int)

    def draw(self, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return frames uint8 [N H W 3], instructions [N] int64 and labels [N] float32."""
        positives = int(size * POSITIVES)
        other = int(size * OTHER_TASK) if self._num_instructions > 1 else 0
        hard = int(size * HARD) if len(self._hard) else 0
        late = int((size - positives - other - hard) * NEAR_END)
        early = size - positives - other - hard - late
        pools = (self._success, self._success, self._hard, self._late, self._early)
        where = np.concatenate(
            [
                pool[self._rng.integers(len(pool), size=count)]
                for pool, count in zip(pools, (positives, other, hard, late, early), strict=True)
                if count
            ]
        )
        frames, task = self._read(where)
        if other:
            shift = torch.from_numpy(self._rng.integers(1, self._num_instructions, size=other))
            asked = slice(positives, positives + other)
            task[asked] = (task[asked] + shift) % self._num_instructions
        labels = torch.zeros(size)
        labels[:positives] = 1
        return frames, task, labels

    def mine(self, model: RewardNet) -> int:
        """Search for imagined frames of failed episodes that `model` judges as success.

        Returns how many were found; later batches contain them.
        """
        if not len(self._suspects):
            return 0
        some = self._rng.choice(self._suspects, min(MINED, len(self._suspects)), replace=False)
        chances = [
            score(model, *self._read(part)) for part in np.array_split(some, len(some) // 64 + 1)
        ]
        self._hard = some[np.concatenate(chances) > 0]
        return len(self._hard)

    def _read(self, where: np.ndarray) -> tuple[Tensor, Tensor]:
        frames = np.ascontiguousarray(self._data.frames[self._row[where], 0])
        return torch.from_numpy(frames), torch.from_numpy(self._task[where].astype(np.int64))


@torch.inference_mode()
def score(model: RewardNet, frames: Tensor, task: Tensor) -> np.ndarray:
    """Return the logits [N] of frames uint8 [N H W 3] under their instructions."""
    training_mode = model.training
    model.eval()
    device = _device(model)
    frames, task = frames.to(device), task.to(device)
    logits = model(to_network(frames), task if model.config.num_instructions else None)
    model.train(training_mode)
    return logits.cpu().numpy()


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def to_network(frames: Tensor) -> Tensor:
    """uint8 [N H W 3] as the classifier takes it, float32 [N 3 H W] in [-1, 1]."""
    return frames.permute(0, 3, 1, 2).float() / 127.5 - 1


def disturb(frames: Tensor) -> Tensor:
    """Return frames [N 3 H W] in [-1, 1], disturbed as an imperfect world model might do it.

    Disturbances are blur, noise, brightness, a tint, and a ghost image of another frame; each frame
    has its own strengths.
    """
    count = len(frames)

    def strength(low: float, high: float, channels: int = 1) -> Tensor:
        return torch.empty(count, channels, 1, 1, device=frames.device).uniform_(low, high)

    coarse = F.interpolate(F.avg_pool2d(frames, 2), scale_factor=2, mode="bilinear")
    frames = frames.lerp(coarse, strength(0, 1))
    frames = frames.lerp(frames.roll(1, 0), strength(0, 0.1))
    shift = strength(-0.08, 0.08) + strength(-0.05, 0.05, channels=3)
    frames = torch.addcmul(shift, frames, strength(0.9, 1.1))
    return frames.addcmul_(torch.randn_like(frames), strength(0, 0.06)).clamp_(-1, 1)


def shift(frames: Tensor, most: int) -> Tensor:
    """Return frames [N C H W], each moved by up to `most` pixels along each axis, edges repeated.

    A place in the picture then says less, and how things lie to each other says more (Kostrikov et
    al. 2020, arXiv:2004.13649).
    """
    count, _, height, width = frames.shape
    padded = F.pad(frames, (most,) * 4, mode="replicate")
    moved = torch.randint(2 * most + 1, (2, count, 1), device=frames.device)
    rows = moved[0] + torch.arange(height, device=frames.device)
    columns = moved[1] + torch.arange(width, device=frames.device)
    each = torch.arange(count, device=frames.device)[:, None, None]
    return padded[each, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


@torch.inference_mode()
def through_codec(codec: nn.Module, frames: Tensor) -> Tensor:
    """Return frames [N 3 H W] after the world model's encoder and decoder."""
    return codec.decode(codec.encode(frames)[0]).clamp(-1, 1)


def train(
    data: Episodes,
    config: RewardConfig,
    *,
    steps: int,
    batch: int = 64,
    lr: float = 3e-3,
    seed: int = 0,
    codec: nn.Module | None = None,
    device: str = "cpu",
    margin: Sequence[int] = NO_MARGIN,
    disturbed: bool = True,
    most_shift: int = 0,
) -> RewardNet:
    """Return a classifier trained on the frames of `data`, on `device`, where `codec` must be.

    Args:
        margin: frames to leave out, see `margin.near_change`.
        disturbed: disturb frames, see `disturb`.
        most_shift: move them by up to as many pixels, see `shift`.

    Raises:
        TrainingError: loss or gradient is not finite.
    """
    torch.manual_seed(seed)
    sampler = FrameSampler(data, config.num_instructions, np.random.default_rng(seed), margin)
    # With fewer channels oneDNN corrupts the heap in the backward pass on CPUs without AVX-512.
    layout = torch.channels_last if config.width >= 8 else torch.contiguous_format
    model = RewardNet(config).to(device, memory_format=layout).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.02)
    losses: list[float] = []
    mine_at = {int(share * steps) for share in MINE_AT}
    for step in range(steps):
        if step in mine_at:
            logging.info("step %d: %d hard negatives", step, sampler.mine(model))
        torch_training.set_lr(optimizer, torch_training.cosine_lr(step, steps, lr, warmup=100))
        frames, task, labels = (part.to(device) for part in sampler.draw(batch))
        images = to_network(frames)
        if codec is not None:
            images[::2] = through_codec(codec, images[::2])
        images = shift(images, most_shift) if most_shift else images
        images = disturb(images) if disturbed else images
        images = images.contiguous(memory_format=layout)
        logits = model(images, task if config.num_instructions else None)
        loss = F.binary_cross_entropy_with_logits(logits, labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        losses.append(loss.item())
        advice = "Nothing was written; give another --seed, or look at the recordings"
        check_finite(step + 1, advice, loss=losses[-1], norm_of_the_gradient=float(norm))
        optimizer.step()
        if (step + 1) % 200 == 0:
            logging.info("step %d/%d  loss %.4f", step + 1, steps, np.mean(losses[-200:]))
    return model.eval()


def scores(model: RewardNet, data: Episodes, codec: nn.Module | None = None) -> np.ndarray:
    """Return the logits of all frames of all episodes, see `by_episode`."""
    flat = np.zeros(len(data.success), np.float32)
    for n in range(data.num_episodes):
        rows = data.rows(n, np.arange(data.length[n] + 1))
        frames = torch.from_numpy(np.array(data.frames[rows, 0]))
        if codec is not None:
            seen = through_codec(codec, to_network(frames.to(_device(model))))
            frames = ((seen.permute(0, 2, 3, 1) + 1) * 127.5).round().to(torch.uint8)
        flat[rows] = score(model, frames, torch.full((len(frames),), int(data.task[n])))
    return by_episode(data, flat, -np.inf)


def by_episode(data: Episodes, flat: np.ndarray, empty: float | bool = 0) -> np.ndarray:
    """Return values per frame [F] as [N T+1], T = longest episode; shorter ones end in `empty`."""
    steps = np.arange(int(data.length.max()) + 1)
    inside = steps <= data.length[:, None]
    rows = data.first[:, None] + np.where(inside, steps, 0)
    return np.where(inside, np.asarray(flat)[rows], np.array(empty, flat.dtype))


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the command line's values."""
    parser = Parser("reward.train", __doc__)
    add = parser.add_argument
    add("--data", required=True, nargs="+", help="folders of recorded episodes")
    add("--imagined", nargs="+", default=[], help="folders of imagined episodes")
    add("--out", required=True, help="new folder for weights, config and card")
    add("--steps", type="count", default=2000, help="of the optimizer")
    add(
        "--width",
        type="count",
        default=12,
        help="channels of the first stage; published ones have 64",
    )
    add("--single_task", action="store_true", help="do not tell it the instruction, as published")
    add("--autoencoder", help="folder of the world model's codec")
    add("--success_frames", type="count", default=2, help="in a row that make a success, as in RL")
    calibration.add_options(parser)
    add("--judged_frames", type="natural", default=0, help="last frames of a chunk judged; 0 = all")
    add(
        "--margin",
        type="natural",
        nargs=2,
        default=NO_MARGIN,
        metavar=("BEFORE", "AFTER"),
        help="frames on either side of a change of the label that neither train nor score it",
    )
    text = "move frames of the training by up to as many pixels, so that less is learned by heart"
    add("--shift", type="natural", default=0, metavar="PIXELS", help=text)
    parser.add_device()
    parser.add_threads()
    parser.add_seed("weights and batches")
    args = parser.parse_args(argv)
    if not args.success_frames <= (args.judged_frames or args.chunk) <= args.chunk:
        parser.error(
            "expected --success_frames <= --judged_frames <= --chunk, got "
            f"{args.success_frames}, {args.judged_frames}, {args.chunk}"
        )
    return args


def sampling_of(imagined: Sequence[str]) -> dict | None:
    """Return the steps and eta with which recordings were imagined; None where no card tells.

    Raises:
        DataError: they differ.
    """
    told = [cards.read(Path(folder)).get("sampling") for folder in imagined]
    if any(one != told[0] for one in told):
        raise DataError(
            f"--imagined: expected all to be imagined alike, as in reinforcement learning; their "
            f"cards say {told}"
        )
    return told[0] if told else None


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = parse(argv)
    logging.set_verbosity(logging.INFO)
    torch.set_num_threads(args.threads)
    refuse_existing(args.out)
    data = recordings.load(*args.data, *args.imagined)
    sampling = sampling_of(args.imagined)
    known = data.asked  # a card may list tasks that nobody played
    train_part, held_out = data.numbered_as(known).both_parts()
    if args.imagined:  # what it will judge; these folders may number the tasks otherwise
        _, held_out = recordings.load(*args.imagined).numbered_as(known).split()
    if not held_out.num_episodes:
        raise DataError("--imagined: none of the episodes is held out; imagine more of them")
    began = time.process_time()
    codec = None
    if args.autoencoder:
        codec = model_folders.load_model(args.autoencoder, kind="Autoencoder", device=args.device)
    steps = int(held_out.length.max())
    judged = calibration.judged_steps(steps, args.chunk, args.judged_frames)
    judged = judged & by_episode(held_out, np.ones(len(held_out.success), bool))
    success = by_episode(held_out, np.asarray(held_out.success))
    clear = ~by_episode(held_out, near_change(held_out, *args.margin))
    calibration.check_labels(success[judged & clear])
    calibration.check_streak(judged, args.success_frames)
    instructions = () if args.single_task else known
    config = RewardConfig(width=args.width, num_instructions=len(instructions))

    def scored(model: RewardNet) -> np.ndarray:
        return np.where(judged, scores(model, held_out, codec), -np.inf)

    out = Path(args.out)
    with whole_folder(out) as folder:
        model = train(
            train_part,
            config,
            steps=args.steps,
            seed=args.seed,
            codec=codec,
            device=args.device,
            margin=args.margin,
            most_shift=args.shift,
        )
        aside = _set_aside(out, model)
        try:
            fitted, verdict = _calibrated(model, folder, scored, success, clear, args)
        except (EvacJaxError, OSError) as error:
            raise TrainingError(f"{error}. It is kept in {aside}") from error
        facts = cards.card(
            scores=verdict | {"threshold": 0.5},
            calibration=fitted,
            allowed_false_success=args.false_success,
            held_out_episodes=held_out.num_episodes,
            cpu_seconds=round(time.process_time() - began),
            instructions=known,
            judged_frames=args.judged_frames,
            margin=list(args.margin),
            chunk=args.chunk,
            sampling=sampling,
            data=train_part.card,
            sha256=cards.sha256(folder / model_folders.WEIGHTS_FILE),
        )
        cards.write_json(folder / "card.json", facts)
    shutil.rmtree(aside)
    logging.info("held-out: %s", facts["scores"])
    if verdict["false_success"] > args.false_success:
        logging.warning(
            "%.0f %% of the claimed successes are false, more than the %.0f %% asked for",
            *(100 * verdict["false_success"], 100 * args.false_success),
        )


def _set_aside(out: Path, model: RewardNet) -> Path:
    """Save what was trained beside `out`, before anything can fail; return the folder."""
    aside = out.with_name(f"{out.name}.uncalibrated")
    keep(aside)  # of an earlier call
    with whole_folder(aside) as folder:
        model_folders.save_model(folder, model)
    logging.info("trained; it is kept in %s until it is calibrated", aside)
    return aside


def _calibrated(
    model: RewardNet,
    folder: Path,
    scored: Callable[[RewardNet], np.ndarray],
    success: np.ndarray,
    clear: np.ndarray,
    args: argparse.Namespace,
) -> tuple[dict, dict]:
    """Calibrate a classifier, save it and judge what is saved; return the fit and the verdict."""
    frames = args.success_frames
    fitted = calibration.calibrate(model, scored(model), success, frames, args.false_success, clear)
    # Half precision halves the file; the stored weights are those that are judged.
    model_folders.save_model(folder, model, torch.float16)
    stored = model_folders.load_model(folder, kind="RewardNet", device=args.device)
    assert isinstance(stored, RewardNet)
    return fitted, calibration.judge(scored(stored), success, 0.0, frames, clear)


if __name__ == "__main__":
    run_tool(main)

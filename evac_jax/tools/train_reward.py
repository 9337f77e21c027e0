"""Trains the success classifier on recorded frames and chooses its threshold.

    python -m evac_jax.tools.train_reward --data DIR --imagined DIR2 --out DIR3 --steps 2000

It will judge imagined frames, which are blurred and slightly off in colour, so it is trained on
disturbed ones, with --autoencoder also on frames that went through the world model's codec, and
with --imagined on imagined episodes (evac_jax.tools.imagine_dataset) labelled with what really
happened; the threshold is then chosen on held-out ones of these. No flips: they would show scenes
that the camera cannot see.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from absl import logging
from torch import Tensor, nn

from evac_jax import dataset
from evac_jax.dataset import Episodes
from evac_jax.evac import checkpoint
from evac_jax.sim.reward import RewardConfig, RewardNet
from evac_jax.tools import cards, training

POSITIVES, OTHER_TASK = 0.35, 0.15  # of a batch; the rest fails
NEAR_END = 0.7  # of the failing frames come from the second half of their episodes
THRESHOLDS = np.arange(0.05, 1.0, 0.01)


class FrameSampler:
    """Draws class-balanced batches from recorded episodes.

    Besides successes and failures a batch holds successes asked about with another instruction,
    which are failures: without them the classifier may ignore the instruction.
    """

    def __init__(self, data: Episodes, num_instructions: int, rng: np.random.Generator):
        self._data, self._rng, self._num_instructions = data, rng, num_instructions
        # Rows of frames, and the episode and the step that each belongs to.
        episode = np.repeat(np.arange(data.num_episodes), data.length + 1)
        step = np.concatenate([np.arange(length + 1) for length in data.length])
        self._row, self._task = data.first[episode] + step, data.task[episode]
        success, late = np.asarray(data.success)[self._row], step > (data.length // 2)[episode]
        self._success = np.flatnonzero(success)
        self._late, self._early = np.flatnonzero(~success & late), np.flatnonzero(~success & ~late)

    def draw(self, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return frames uint8 [N H W 3], instructions [N] int64 and labels [N] float32."""
        positives, other = int(size * POSITIVES), int(size * OTHER_TASK)
        late = int((size - positives - other) * NEAR_END)
        early = size - positives - other - late
        pools = (self._success, self._success, self._late, self._early)
        where = np.concatenate(
            [
                pool[self._rng.integers(len(pool), size=count)]
                for pool, count in zip(pools, (positives, other, late, early), strict=True)
            ]
        )
        frames = np.ascontiguousarray(self._data.frames[self._row[where], 0])
        task = self._task[where].astype(np.int64)
        shift = self._rng.integers(1, self._num_instructions, size=other)
        asked = slice(positives, positives + other)
        task[asked] = (task[asked] + shift) % self._num_instructions
        labels = torch.zeros(size)
        labels[:positives] = 1
        return torch.from_numpy(frames), torch.from_numpy(task), labels


def to_network(frames: Tensor) -> Tensor:
    """uint8 [N H W 3] as the classifier takes it, float32 [N 3 H W] in [-1, 1]."""
    return frames.permute(0, 3, 1, 2).float() / 127.5 - 1


def disturb(frames: Tensor) -> Tensor:
    """Return frames [N 3 H W] in [-1, 1] as an imperfect world model might show them.

    Each with its own strength: blur, noise, brightness, a tint, and a ghost of another frame.
    """
    count = len(frames)

    def strength(low: float, high: float, channels: int = 1) -> Tensor:
        return torch.empty(count, channels, 1, 1).uniform_(low, high)

    coarse = F.interpolate(F.avg_pool2d(frames, 2), scale_factor=2, mode="bilinear")
    frames = frames.lerp(coarse, strength(0, 1))
    frames = frames.lerp(frames.roll(1, 0), strength(0, 0.1))
    shift = strength(-0.08, 0.08) + strength(-0.05, 0.05, channels=3)
    frames = torch.addcmul(shift, frames, strength(0.9, 1.1))
    return frames.addcmul_(torch.randn_like(frames), strength(0, 0.06)).clamp_(-1, 1)


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
) -> RewardNet:
    """Return a classifier fitted to the frames of `data`."""
    torch.manual_seed(seed)
    sampler = FrameSampler(data, config.num_instructions, np.random.default_rng(seed))
    model = RewardNet(config).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.02)
    losses: list[float] = []
    for step in range(steps):
        training.set_lr(optimizer, training.cosine_lr(step, steps, lr, warmup=100))
        frames, task, labels = sampler.draw(batch)
        images = to_network(frames)
        if codec is not None:
            images[::2] = through_codec(codec, images[::2])
        logits = model(disturb(images).contiguous(memory_format=torch.channels_last), task)
        loss = F.binary_cross_entropy_with_logits(logits, labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if (step + 1) % 200 == 0:
            logging.info("step %d/%d  loss %.4f", step + 1, steps, np.mean(losses[-200:]))
    return model.eval()


@torch.inference_mode()
def probabilities(model: RewardNet, data: Episodes, codec: nn.Module | None = None) -> np.ndarray:
    """Return the probability of success of every frame of every episode, see `by_episode`."""
    flat = np.zeros(len(data.success), np.float32)
    for n in range(data.num_episodes):
        rows = data.rows(n, np.arange(data.length[n] + 1))
        images = to_network(torch.from_numpy(np.array(data.frames[rows, 0])))
        if codec is not None:
            images = through_codec(codec, images)
        task = torch.full((len(images),), int(data.task[n]))
        flat[rows] = model.probability(images, task).numpy()
    return by_episode(data, flat)


def by_episode(data: Episodes, flat: np.ndarray) -> np.ndarray:
    """Return values per frame [F] as [N T+1], T the longest episode; 0 behind a shorter one."""
    steps = np.arange(int(data.length.max()) + 1)
    inside = steps <= data.length[:, None]
    rows = data.first[:, None] + np.where(inside, steps, 0)
    return np.where(inside, np.asarray(flat)[rows], np.zeros((), flat.dtype))


def judge(values: np.ndarray, success: np.ndarray, threshold: float, frames: int) -> dict:
    """Return the quality of the verdicts at one threshold.

    "false_success" is the share of claimed successes that are none, "missed_success" the share of
    true ones that are not claimed.

    Args:
        values: probabilities [N T].
        success: truth [N T].
        threshold: probability from which a frame counts.
        frames: consecutive frames that make an episode a success.
    """
    hit = values >= threshold
    streak = np.lib.stride_tricks.sliding_window_view(hit, frames, axis=1).all(-1)
    claimed, true = streak.any(1), np.asarray(success).any(1)
    right = (hit & success).sum()
    return {
        "threshold": round(float(threshold), 2),
        "success_frames": frames,
        "frame_precision": float(right / max(hit.sum(), 1)),
        "frame_recall": float(right / max(success.sum(), 1)),
        "frame_accuracy": float((hit == success).mean()),
        "false_success": float((claimed & ~true).sum() / max(claimed.sum(), 1)),
        "agreement": float((claimed == true).mean()),
        "missed_success": float((~claimed)[true].mean()) if true.any() else 0.0,
    }


def choose_threshold(values: np.ndarray, success: np.ndarray, frames: int, allowed: float) -> dict:
    """Return the verdicts at the threshold that misses least among those that are strict enough.

    Strict enough: at most the share `allowed` of the claimed successes is false. Among equals
    the middle one is taken, which leaves room on both sides. The strictest of all is taken where
    none suffices.
    """
    verdicts = [judge(values, success, threshold, frames) for threshold in THRESHOLDS]
    strict = [verdict for verdict in verdicts if verdict["false_success"] <= allowed]
    if not strict:
        return verdicts[-1]
    least = min(verdict["missed_success"] for verdict in strict)
    equals = [verdict for verdict in strict if verdict["missed_success"] == least]
    return equals[len(equals) // 2]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, nargs="+", help="folders of recorded episodes")
    parser.add_argument("--out", required=True, help="folder for weights, config and card")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--width", type=int, default=12)
    parser.add_argument("--autoencoder", help="folder of the world model's codec")
    parser.add_argument("--success_frames", type=int, default=2)
    parser.add_argument(
        "--false_success", type=float, default=0.1, help="largest share of claims to be false"
    )
    parser.add_argument("--imagined", nargs="+", default=[], help="folders of imagined episodes")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.set_verbosity(logging.INFO)
    torch.set_num_threads(args.threads)
    train_part, held_out = dataset.load(*args.data, *args.imagined).split()
    if args.imagined:  # what it will judge
        _, held_out = dataset.load(*args.imagined).split()
    began = time.process_time()
    codec = None
    if args.autoencoder:
        codec = checkpoint.load_model(args.autoencoder, kind="Autoencoder")
    instructions = train_part.instructions
    config = RewardConfig(width=args.width, num_instructions=len(instructions))
    model = train(train_part, config, steps=args.steps, seed=args.seed, codec=codec)
    out = Path(args.out)
    # Half precision halves the file; what is scored below is what was stored.
    checkpoint.save_model(out, model, torch.float16)
    model = checkpoint.load_model(out, kind="RewardNet")
    values = probabilities(model, held_out, codec)
    success = by_episode(held_out, held_out.success)
    scores = choose_threshold(values, success, args.success_frames, args.false_success)
    facts = cards.card(
        scores=scores,
        scores_at_0_8=judge(values, success, 0.8, args.success_frames),
        allowed_false_success=args.false_success,
        held_out_episodes=held_out.num_episodes,
        cpu_seconds=round(time.process_time() - began),
        instructions=instructions,
        data=train_part.card,
        sha256=cards.sha256(out / checkpoint.WEIGHTS_FILE),
    )
    cards.write_json(out / "card.json", facts)
    logging.info("held-out: %s", scores)
    logging.info("at 0.8:   %s", facts["scores_at_0_8"])


if __name__ == "__main__":
    main()

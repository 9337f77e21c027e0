"""Judges whole episodes with a success classifier, and calibrates it so that 0.5 is the threshold.

A classifier is less certain on imagined frames than on recorded ones. Besides, a user does not want
to choose a probability, but the share of claimed successes that may be false. `calibrate` solves
both with held-out imagined episodes. It writes the result into the classifier's last layer, so a
threshold of 0.5 is right wherever the classifier is loaded.

Source: Platt 1999, "Probabilistic outputs for support vector machines".
"""

import numpy as np
import torch
import torch.nn.functional as F

from evac_jax.errors import DataError, TrainingError
from evac_jax.sim.reward import RewardNet
from evac_jax.telemetry.report import wilson_interval
from evac_jax.tools.command_line import Parser

LOGITS = np.linspace(-6.0, 6.0, 241)  # thresholds to try


def add_options(parser: Parser) -> None:
    """Add what every calibration of a judge is told."""
    add = parser.add_argument
    add("--chunk", type="count", default=8, help="frames that are imagined together")
    text = "largest share of claims to be false"
    add("--false_success", type="share_below_1", default=0.1, help=text)


def judged_steps(steps: int, chunk: int, last: int) -> np.ndarray:
    """Which frames 0 .. `steps` reinforcement learning judges, bool [steps + 1].

    Args:
        steps: actions of an episode.
        chunk: number of frames that are imagined together, after frame 0.
        last: number of frames at the end of every chunk that are judged; 0 = all.
    """
    place = (np.arange(steps + 1) - 1) % chunk
    return (np.arange(steps + 1) > 0) & (place >= chunk - (last or chunk))


def judge(
    values: np.ndarray,
    success: np.ndarray,
    threshold: float,
    frames: int,
    clear: np.ndarray | None = None,
) -> dict:
    """Return the quality of the verdicts at one threshold.

    "false_success" is the share of claimed successes that are false, "missed_success" the share of
    true successes that are not claimed.

    Args:
        values: value of every frame [N T]; -inf if a frame is not judged.
        success: the truth [N T].
        threshold: a frame counts if its value is at least this.
        frames: number of consecutive frames that make an episode a success.
        clear: which frames the figures "frame_.." count, [N T]; None = all. Episodes are judged by
            all of their frames, as in reinforcement learning.
    """
    hit = values >= threshold
    windows = np.lib.stride_tricks.sliding_window_view(hit, frames, axis=1)
    streak = np.all(windows, axis=-1)
    claimed, true = streak.any(1), np.asarray(success).any(1)
    judged = np.isfinite(values) & (True if clear is None else clear)
    right = (hit & success & judged).sum()
    false = int((claimed & ~true).sum())
    return {
        "threshold": round(float(threshold), 6),
        "success_frames": frames,
        "frame_precision": float(right / max((hit & judged).sum(), 1)),
        "frame_recall": float(right / max((success & judged).sum(), 1)),
        "frame_accuracy": float((hit == success)[judged].mean()),
        "false_success": false / max(int(claimed.sum()), 1),
        "false_success_95": wilson_interval(false, max(int(claimed.sum()), 1)),
        "agreement": float((claimed == true).mean()),
        "missed_success": float((~claimed)[true].mean()) if true.any() else 0.0,
    }


def choose_threshold(
    values: np.ndarray,
    success: np.ndarray,
    frames: int,
    allowed: float,
    thresholds: np.ndarray = LOGITS,
) -> dict:
    """Return the verdicts at the strict enough threshold that misses the fewest successes.

    Strict enough means that at most the share `allowed` of the claimed successes is false. If
    several thresholds are equal, the middle one is used, which leaves a margin on both sides. If no
    threshold is strict enough, the one with the smallest false share that claims any success is
    used.
    """
    verdicts = [judge(values, success, threshold, frames) for threshold in thresholds]
    claims = [verdict for verdict in verdicts if verdict["missed_success"] < 1]
    strict = [verdict for verdict in claims if verdict["false_success"] <= allowed]
    if not strict:
        return min(claims or verdicts, key=lambda verdict: verdict["false_success"])
    least = min(verdict["missed_success"] for verdict in strict)
    equals = [verdict for verdict in strict if verdict["missed_success"] == least]
    return equals[len(equals) // 2]


def check_labels(labels: np.ndarray) -> None:
    """Check that held-out frames show what a calibration needs, before anything is trained.

    Args:
        labels: bool [N], of the frames that it will take.

    Raises:
        DataError: success or failure is missing.
    """
    if labels.all() or not labels.any():
        raise DataError(
            f"cannot calibrate: all {len(labels)} held-out frames that are judged are "
            f"{'successes' if labels.all() else 'failures'}; record or imagine more episodes of "
            "both kinds"
        )


def check_streak(judged: np.ndarray, frames: int) -> None:
    """Check that a held-out episode can be claimed at all, before anything is trained.

    Args:
        judged: which frames are judged, bool [N T].
        frames: number of consecutive frames that make an episode a success.

    Raises:
        DataError: none has so many judged frames in a row.
    """
    longest = streak = np.zeros(len(judged), int)
    for column in judged.T:
        streak = (streak + 1) * column
        longest = np.maximum(longest, streak)
    if frames > (most := longest.max(initial=0)):
        raise DataError(
            f"--success_frames: expected at most {most}, the most judged frames in a row of a "
            f"held-out episode, got {frames}; lower it, or record longer episodes"
        )


def platt_scale(logits: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Return slope and offset for which sigmoid(slope * logit + offset) fits the labels best.

    Args:
        logits: of frames [N].
        labels: bool [N]; both values must occur.

    Raises:
        DataError: see `check_labels`.
        TrainingError: the logits do not depend on the labels.
    """
    check_labels(labels)
    x = torch.tensor(np.clip(logits, -30, 30), dtype=torch.float64)
    y = torch.tensor(labels, dtype=torch.float64)
    line = torch.tensor((1.0, 0.0), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([line], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = F.binary_cross_entropy_with_logits(line[0] * x + line[1], y)
        value.backward()
        return value

    optimizer.step(loss)
    slope, offset = line.tolist()
    if not slope > 0:
        raise TrainingError(
            f"cannot calibrate: on held-out frames a higher score means less success (slope "
            f"{slope:.3f}); the classifier has learned nothing, train it longer or on more episodes"
        )
    return slope, offset


def calibrate(
    model: RewardNet,
    logits: np.ndarray,
    success: np.ndarray,
    frames: int,
    allowed: float,
    clear: np.ndarray | None = None,
) -> dict:
    """Change the last layer so that 0.5 is the threshold for a stated share of false claims.

    Args:
        model: changed in place.
        logits: its scores of held-out episodes [N T]; -inf if a frame is not judged.
        success: the truth [N T].
        frames: number of consecutive frames that make an episode a success.
        allowed: largest share of the claimed successes that may be false.
        clear: which frames Platt's fit takes, [N T]; None = all that are judged.

    Returns:
        slope, offset: of Platt's fit; threshold: the calibrated probability that is now mapped to
        0.5. If it is above 0.5, true probabilities are higher than those that the classifier shows.
    """
    judged = np.isfinite(logits) & (True if clear is None else clear)
    slope, offset = platt_scale(logits[judged], success[judged])
    threshold = choose_threshold(slope * logits + offset, success, frames, allowed)["threshold"]
    head = model.net[-1]
    with torch.no_grad():
        head.weight.mul_(slope)
        head.bias.mul_(slope).add_(offset - threshold)
    probability = float(torch.tensor(threshold).sigmoid())
    return {"slope": slope, "offset": offset, "threshold": probability}

"""Verdicts of a success classifier on whole episodes, and how to make 0.5 the right threshold.

A classifier that is sure of itself on recorded frames is not on imagined ones, and what a lab
wants to fix is not a probability but how many claimed successes may be false. `calibrate` does
both with held-out imagined episodes and writes the outcome into the classifier's last layer:
whoever loads it uses a threshold of 0.5.

Source: Platt 1999, "Probabilistic outputs for support vector machines".
"""

import numpy as np
import torch
import torch.nn.functional as F

from evac_jax.errors import TrainingError
from evac_jax.report import wilson_interval
from evac_jax.sim.reward import RewardNet

LOGITS = np.linspace(-6.0, 6.0, 241)  # thresholds that are tried


def judged_steps(steps: int, chunk: int, last: int) -> np.ndarray:
    """Which frames 0 .. `steps` reinforcement learning judges, bool [steps + 1].

    Args:
        steps: actions of an episode.
        chunk: frames that are imagined together, behind frame 0.
        last: frames at the end of every chunk that are judged; 0 = all of them.
    """
    place = (np.arange(steps + 1) - 1) % chunk
    return (np.arange(steps + 1) > 0) & (place >= chunk - (last or chunk))


def judge(values: np.ndarray, success: np.ndarray, threshold: float, frames: int) -> dict:
    """Return the quality of the verdicts at one threshold.

    "false_success" is the share of claimed successes that are none, "missed_success" the share of
    true ones that are not claimed.

    Args:
        values: of every frame [N T], -inf where a frame is not judged.
        success: truth [N T].
        threshold: value from which a frame counts.
        frames: consecutive frames that make an episode a success.
    """
    hit = values >= threshold
    streak = np.lib.stride_tricks.sliding_window_view(hit, frames, axis=1).all(-1)
    claimed, true = streak.any(1), np.asarray(success).any(1)
    judged = np.isfinite(values)
    right = (hit & success).sum()
    false = int((claimed & ~true).sum())
    return {
        "threshold": round(float(threshold), 3),
        "success_frames": frames,
        "frame_precision": float(right / max(hit.sum(), 1)),
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
    """Return the verdicts at the threshold that misses least among those that are strict enough.

    Strict enough: at most the share `allowed` of the claimed successes is false. Among equals
    the middle one is taken, which leaves room on both sides. Where none suffices, the one with
    the smallest false share that claims anything is taken.
    """
    verdicts = [judge(values, success, threshold, frames) for threshold in thresholds]
    claims = [verdict for verdict in verdicts if verdict["missed_success"] < 1]
    strict = [verdict for verdict in claims if verdict["false_success"] <= allowed]
    if not strict:
        return min(claims or verdicts, key=lambda verdict: verdict["false_success"])
    least = min(verdict["missed_success"] for verdict in strict)
    equals = [verdict for verdict in strict if verdict["missed_success"] == least]
    return equals[len(equals) // 2]


def platt_scale(logits: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Return slope and offset for which sigmoid(slope * logit + offset) fits the labels best.

    Args:
        logits: of frames [N].
        labels: bool [N], both kinds among them.

    Raises:
        TrainingError: the logits say nothing about the labels, or one kind is missing.
    """
    if labels.all() or not labels.any():
        raise TrainingError(
            f"cannot calibrate: all {len(labels)} held-out frames are "
            f"{'successes' if labels.all() else 'failures'}; record episodes of both kinds"
        )
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
    model: RewardNet, logits: np.ndarray, success: np.ndarray, frames: int, allowed: float
) -> dict:
    """Change the last layer so that 0.5 is the threshold for a stated share of false claims.

    Args:
        model: changed in place.
        logits: its scores of held-out episodes [N T], -inf where a frame is not judged.
        success: truth [N T].
        frames: consecutive frames that make an episode a success.
        allowed: largest share of the claimed successes that may be false.

    Returns:
        slope, offset: of Platt's fit; threshold: the calibrated probability that 0.5 now stands
        for. Above 0.5 it says that true probabilities are higher than the shown ones.
    """
    judged = np.isfinite(logits)
    slope, offset = platt_scale(logits[judged], success[judged])
    threshold = choose_threshold(slope * logits + offset, success, frames, allowed)["threshold"]
    head = model.net[-1]
    with torch.no_grad():
        head.weight.mul_(slope)
        head.bias.mul_(slope).add_(offset - threshold)
    probability = float(torch.tensor(threshold).sigmoid())
    return {"slope": slope, "offset": offset, "threshold": probability}

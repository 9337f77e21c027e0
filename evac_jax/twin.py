"""The twin: a sample of imagined episodes is played again, action by action, in the ground truth.

Learning in imagination exploits errors of the world model and the classifier: imagined success then
rises while real success does not. In a ground truth the same starts and actions show the difference
during the run. Called by the training loop only.
"""

import math
from collections import deque
from collections.abc import Sequence

import numpy as np
from absl import logging

from evac_jax.config.schema import TrainConfig
from evac_jax.devices import sharding
from evac_jax.errors import DataError
from evac_jax.rollout import Played, padded
from evac_jax.simulators import Simulators
from evac_jax.starts import ids_in_ground_truth

Z_ONE_SIDED_95 = 1.6448536269514722  # one-sided 95 % quantile of the normal distribution
REPLAY_SEED = 0  # the ground truth is deterministic for a given start


def replay(real: Simulators, starts: np.ndarray, actions: np.ndarray) -> np.ndarray:
    """Return whether each sequence of actions succeeds in the ground truth, bool [n].

    Args:
        real: its environments take the same chunks and start ids as those that were imagined.
        starts: int64 [n].
        actions: as the policy gave them, float32 [n T K A].

    Raises:
        DataError: another number of sequences than starts, or chunks of another shape.
    """
    spec = real.spec
    wanted = (len(starts), spec.action.chunk, spec.action.dim)
    if actions.ndim != 4 or (len(actions), *actions.shape[2:]) != wanted:
        raise DataError(
            f"replay: expected actions [{wanted[0]} T {wanted[1]} {wanted[2]}] for "
            f"{len(starts)} starts, got {list(actions.shape)}; imagination and ground truth must "
            "share their chunk"
        )
    success = np.zeros(len(starts), bool)
    for index, row in enumerate(padded(np.asarray(starts, np.int64), real.num_envs)):
        rows = slice(index * real.num_envs, (index + 1) * real.num_envs)
        count = len(actions[rows])
        moves = np.zeros((real.num_envs, *actions.shape[1:]), np.float32)
        moves[:count] = actions[rows]
        step = real.reset(row, REPLAY_SEED)
        step.release()
        for t in range(actions.shape[1]):
            step = real.step(np.ascontiguousarray(moves[:, t]))
            step.release()
        success[rows] = step.result.episode["success_once"][:count] > 0
    return success


def excess(imagined: np.ndarray, real: np.ndarray) -> tuple[float, float]:
    """Return the excess of imagined over real success, and its lower bound.

    The second is a one-sided 95 % lower bound for a difference of paired proportions: with b
    episodes that succeed in imagination only, c in truth only, of n,

        p = (b + 1) / (n + 2),  q = (c + 1) / (n + 2),  p - q - z √((p + q - (p - q)²) / (n + 2)).

    Args:
        imagined: bool [n].
        real: of the same episodes, bool [n].

    Source: Bonett & Price 2012, Journal of Educational and Behavioral Statistics 37(4).
    """
    imagined, real = np.asarray(imagined, bool), np.asarray(real, bool)
    n = len(imagined)
    if n == 0:
        return 0.0, -1.0
    only_imagined, only_real = int((imagined & ~real).sum()), int((real & ~imagined).sum())
    p, q = (only_imagined + 1) / (n + 2), (only_real + 1) / (n + 2)
    half = Z_ONE_SIDED_95 * math.sqrt((p + q - (p - q) ** 2) / (n + 2))
    return (only_imagined - only_real) / n, p - q - half


class Twin:
    """Replays a share of every iteration's episodes, and raises the alarm.

    Args:
        config: reads `eval.twin_*` and `seed`.
        real: the ground truth; None only where `eval.twin_fraction` is 0.

    Raises:
        ConfigError: the starts of training have no known counterparts in the ground truth.

    The alarm stands while the lower bound of `excess` over the last `eval.twin_window` replays
    lies above `eval.twin_alarm`. It is tested in every iteration, so over a long run a false
    alarm is more likely than 5 %: look at a gap near `eval.twin_alarm` before you act on it.
    """

    def __init__(self, config: TrainConfig, real: Simulators | None):
        self._options, self._seed, self._real = config.eval, config.seed, real
        self._ids = ids_in_ground_truth(config) if config.eval.twin_fraction else None
        self._window: deque[tuple[bool, bool]] = deque(maxlen=config.eval.twin_window)
        self.alarm = False

    @property
    def must_stop(self) -> bool:
        """Whether the alarm stands and the configuration says to stop then."""
        return self.alarm and self._options.twin_action == "stop"

    def check(self, iteration: int, played: Played) -> dict[str, float]:
        """Replay a sample of an iteration's episodes; return its metrics (docs/metrics.md).

        The sample depends on the seed and the iteration only. Nothing is returned if
        `eval.twin_fraction` is 0, and no share of false successes if no episode succeeded.
        """
        if not self._options.twin_fraction or not len(played.starts):
            return {}
        count = max(1, round(self._options.twin_fraction * len(played.starts)))
        rng = np.random.default_rng([self._seed, iteration])
        rows = np.sort(rng.choice(len(played.starts), count, replace=False))
        imagined = np.asarray(played.success[rows], bool)
        assert self._real is not None, "eval.twin_fraction needs a ground truth: checks.py"
        starts = played.starts[rows] if self._ids is None else self._ids[played.starts[rows]]
        real = replay(self._real, starts, played.actions[rows])
        imagined, real = sharding.gather((imagined, real))  # every host replays its own
        self._window.extend(zip(imagined.tolist(), real.tolist(), strict=True))
        self._raise_alarm(iteration)
        metrics = {
            "eval/imagined_success": float(imagined.mean()),
            "eval/real_success": float(real.mean()),
            "eval/success_agreement": float((imagined == real).mean()),
            "eval/twin_episodes": float(len(real)),
            "eval/twin_alarm": float(self.alarm),
        }
        if imagined.any():
            metrics["eval/false_success"] = float((~real[imagined]).mean())
        return metrics

    def _raise_alarm(self, iteration: int) -> None:
        imagined, real = np.array(self._window, bool).T
        gap, least = excess(imagined, real)
        self.alarm = least > self._options.twin_alarm
        if not self.alarm:
            return
        wrong = int((imagined & ~real).sum())
        logging.warning(
            "iteration %d: the policy may be exploiting its simulator. Of the last %d episodes "
            "replayed in the ground truth %.0f %% succeed in imagination, %.0f %% for real; %d of "
            "%d imagined successes are false. The gap is %.0f points, at least %.0f (one-sided "
            "95 %%), config.eval.twin_alarm allows %.0f. Stop at an earlier checkpoint, raise "
            "config.reward.threshold or config.reward.success_frames, or retrain the classifier "
            "on these failures: docs/reward_hacking.md",
            iteration + 1,
            len(real),
            100 * imagined.mean(),
            100 * real.mean(),
            wrong,
            int(imagined.sum()),
            100 * gap,
            100 * least,
            100 * self._options.twin_alarm,
        )

    def state_dict(self) -> list[list[int]]:
        """Return the last replays, [imagined, real] each, as plain numbers."""
        return [[int(imagined), int(real)] for imagined, real in self._window]

    def load_state_dict(self, state: Sequence[Sequence[int]]) -> None:
        """Continue with the replays of `state`; only the last `eval.twin_window` of them count."""
        self._window.clear()
        self._window.extend((bool(imagined), bool(real)) for imagined, real in state)

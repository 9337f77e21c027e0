"""The learning signals of a run's report: what to look for in each, and what is wrong for sure."""

import dataclasses
import itertools
from collections.abc import Iterable

from evac_jax.config.presets import differences
from evac_jax.telemetry.pages.record import Record


@dataclasses.dataclass(frozen=True)
class Signal:
    """A metric to watch; docs/metrics.md has the same sentences.

    Attributes:
        metric: its name.
        title: of its chart.
        look: what to look for.
        from_zero: the axis begins at 0.
    """

    metric: str
    title: str
    look: str
    from_zero: bool = True


SIGNALS = (
    Signal(
        "actor/entropy",
        "Entropy of a token, nats",
        "Falls slowly while the policy learns. A quick fall towards 0 means that it no longer "
        "explores: lower optim.lr or set algo.entropy_bonus.",
        from_zero=False,
    ),
    Signal(
        "actor/approx_kl",
        "KL of an update",
        "How far an iteration moves the policy; small and even is right. A jump, or a rise from "
        "iteration to iteration, means steps that are too large: lower optim.lr.",
    ),
    Signal(
        "actor/clip_fraction",
        "Clipped share",
        "Share of decisions that clipping holds back. A few per cent are usual; much more means "
        "steps that are too large: lower optim.lr or algo.update_epochs.",
    ),
    Signal(
        "rollout/group_std_zero_fraction",
        "Groups without spread",
        "Share of groups whose episodes all succeed or all fail; GRPO learns nothing from them. "
        "Near 1 it stands still: take other starts, larger groups or rollout.refill.",
    ),
    Signal(
        "actor/ratio_abs_first",
        "First ratio",
        "Mean of |r - 1| before the first step. It must stay at rounding noise, about 1e-6 in "
        "float32; above it, sampler and learner disagree, and the policy learns the wrong thing.",
    ),
    Signal(
        "actor/grad_norm",
        "Gradient norm before clipping",
        "Even is right. Single peaks are cut by optim.clip_grad; a steady rise comes before a "
        "divergence: lower optim.lr.",
    ),
    Signal(
        "critic/explained_variance",
        "Explained variance of the value head",
        "Rises towards 1 as the value head learns (PPO). At 0 or below it is worth nothing as a "
        "baseline: train it longer or raise optim.value_lr.",
        from_zero=False,
    ),
)


def ranges(iterations: Iterable[int]) -> str:
    """Return "1 to 3, 7" of 1, 2, 3, 7."""
    parts: list[list[int]] = []
    for iteration in sorted(iterations):
        if parts and iteration == parts[-1][1] + 1:
            parts[-1][1] = iteration
        else:
            parts.append([iteration, iteration])
    return ", ".join(f"{a}" if a == b else f"{a} to {b}" for a, b in parts)


def alarms(record: Record) -> list[str]:
    """Return what a run's metrics and its launches show to be wrong, one sentence each."""

    def where(metric: str, least: float) -> str:
        values = record.series(metric).items()
        return ranges(i for i, value in values if value is not None and value >= least)

    found = {
        "the twin's alarm: imagination shows more success than there is (docs/reward_hacking.md)":
        where("eval/twin_alarm", 1.0),
        "updates were skipped, because their loss or gradient was not finite":
        where("actor/skipped_updates", 1.0),
        "updates were left out, because no entry was valid": where("actor/empty_updates", 1.0),
        "no group had a spread, so its rewards taught nothing":
        where("rollout/group_std_zero_fraction", 1.0),
        "figures were not finite": where("log/non_finite", 1.0),
    }  # fmt: skip
    told = [f"Iteration {place}: {what}." for what, place in found.items() if place]
    return told + _judged_otherwise(record)


def _judged_otherwise(record: Record) -> list[str]:
    """Return a sentence for each launch whose evaluations cannot be compared with those before."""
    launches = [
        launch
        for index, launch in enumerate(record.launches)
        # What followed a launch that was gone back behind is no part of the run any more.
        if all(launch["iteration"] < later["iteration"] for later in record.launches[index + 1 :])
    ]
    found = []
    for before, now in itertools.pairwise(launch for launch in launches if "judged_by" in launch):
        known = {k: v for k, v in now["judged_by"].items() if k in before["judged_by"]}
        changed = differences({k: before["judged_by"][k] for k in known}, known)
        if changed:
            told = "; ".join(f"config.{k} was {a!r}, now {b!r}" for k, (a, b) in changed.items())
            found.append(
                f"From iteration {now['iteration']} on evaluations go by other settings, so their "
                f"success may not compare with that before: {told}."
            )
    return found

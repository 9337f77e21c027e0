"""Models the cost of one iteration of the full-size system on many chips; it measures nothing.

    python -m benchmarks.cost_model [--chips h100 v5p v6e] [--counts 1 8 64 256 512] [--lora]
    python -m benchmarks.cost_model --counts 8 --steps 10 --micro_batch 16 --rounds 1 --envs 32

Operations are counted exactly (`benchmarks.flops`). Bytes follow from how XLA distributes the
update, which `benchmarks.compiled` checks. Rates of chips and links are those of data sheets
(evac_jax/tools/memory/chips); the shares of them that the software reaches are arguments. None of
these was measured here. Every chip gets the same work, whatever their number; by default that of
the published run on 8 GPUs. docs/scaling.md has the formulae.

The world model is PyTorch on NVIDIA GPUs. Where the chips are TPUs, the seconds of imagination are
those of as many H100s.
"""

import argparse
import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from benchmarks import flops
from evac_jax.evac.config import EvacConfig
from evac_jax.tools.command_line import KINDS
from evac_jax.tools.memory.topology import Topology
from policies.openvla_oft.config import OpenVLAOFTConfig

RANK = 32  # of the adapters of the presets `lora`
SIMULATES = "h100"
# Share of an update's traffic that arrives while products are computed, by `benchmarks.compiled`
# (docs/full_size.md), rows spatial8, spatial8_v5p and spatial8_v6e.
HIDDEN = {"h100": 0.78, "v5p": 0.83, "v6e": 0.79}


@dataclass(frozen=True)
class Hardware:
    """Chips and links.

    Attributes:
        operations: dense bfloat16 rate of a chip, 1/s.
        imagines: the same of a chip that imagines.
        link: rate at which a chip receives from chips that are linked with it, bytes/s.
        linked: number of these chips: a host of GPUs, a pod of TPUs.
        outside: rate at which they receive from others, together, bytes/s.
        imagine_share, decide_share, update_share: share of the rate that each kind of work reaches;
            what the backward pass computes a second time counts as work.
        link_share: share of the links' rates that collectives reach.
        hidden: share of the update's traffic that waits for nobody.
    """

    operations: float
    imagines: float
    link: float
    linked: int
    outside: float
    imagine_share: float = 0.45
    decide_share: float = 0.40
    update_share: float = 0.50
    link_share: float = 0.7
    hidden: float = 0.0

    @classmethod
    def of(cls, chip: str, **shares: float) -> "Hardware":
        """Return a chip with the rates of its data sheet."""
        rates = Topology(chip, chip, ()).rates
        simulates = rates if _is_gpu(chip) else Topology(SIMULATES, SIMULATES, ()).rates
        return cls(imagines=simulates["operations"], **rates, **shares)


@dataclass(frozen=True)
class Work:
    """The work of each chip in an iteration; default: configs/grpo.py:libero_spatial on 8 GPUs.

    Attributes:
        envs: environments that are played at the same time.
        rounds: rollout epochs.
        chunks: decisions of an episode.
        steps: denoising steps.
        decoded: frames of a chunk that are decoded and judged; 0 = all.
        micro_batch: samples of one forward pass of the update.
        optimizer_batch: samples of one optimiser step.
        update_epochs: passes over the samples.
        fsdp: largest number of chips over which a copy of the parameters is cut; 0 = all.
        weight_bytes: bytes of a parameter when it is gathered for its layer (2 in bfloat16).
        gradient_bytes: bytes of a gradient when it is summed over the chips of a copy.
        stored_bytes: bytes of a stored parameter that trains.
        separate: whether separate chips decide, which get the parameters after every update.
    """

    envs: int = 2
    rounds: int = 16
    chunks: int = 32
    steps: int = 50
    decoded: int = 0
    micro_batch: int = 4
    optimizer_batch: int = 32
    update_epochs: int = 1
    fsdp: int = 8
    weight_bytes: int = 2
    gradient_bytes: int = 2
    stored_bytes: int = 4
    separate: bool = False

    @property
    def samples(self) -> int:
        """Decisions per chip and iteration."""
        return self.envs * self.rounds * self.chunks

    @property
    def micro_batches(self) -> int:
        """Forward and backward passes per iteration."""
        return self.update_epochs * self.samples // self.micro_batch

    @property
    def optimizer_steps(self) -> int:
        """Optimiser steps per iteration."""
        return self.update_epochs * self.samples // self.optimizer_batch


@dataclass(frozen=True)
class Policy:
    """The policy's sizes.

    Attributes:
        sizes: of its layers.
        trained, frozen: numbers of parameters.
    """

    sizes: OpenVLAOFTConfig
    trained: float
    frozen: float = 0.0

    @classmethod
    def of(cls, sizes: OpenVLAOFTConfig) -> "Policy":
        """Return a policy with its parameters counted in the shapes of the real module."""
        from evac_jax.memory.trainer import count

        return cls(sizes, *count(sizes))

    @property
    def update(self) -> float:
        """Operations of one sample's forward and backward pass, which recomputes the layers.

        A frozen weight needs no gradient of its own, so one of the four passes falls away.
        """
        share = self.frozen / (self.trained + self.frozen)
        return (4 - share) * flops.forward(self.sizes)


@dataclass(frozen=True)
class Cost:
    """One iteration; seconds, and bytes received.

    Attributes:
        imagine_s, decide_s, update_s: arithmetic.
        chip_bytes: of a chip by purpose, over its links.
        outside_bytes: of linked chips together, from others, by purpose.
        link_s: all transfers, one after another.
        hidden: share of them that waits for nobody.
    """

    imagine_s: float
    decide_s: float
    update_s: float
    chip_bytes: dict[str, float]
    outside_bytes: dict[str, float]
    link_s: float
    hidden: float

    @property
    def compute_s(self) -> float:
        """Arithmetic alone: the time of an iteration in which all transfers are hidden."""
        return self.imagine_s + self.decide_s + self.update_s

    @property
    def expected_s(self) -> float:
        """The time of an iteration in which transfers hide as in the compiled programs."""
        return self.compute_s + self.link_s * (1 - self.hidden)

    @property
    def total_s(self) -> float:
        """The time of an iteration in which no transfer is hidden."""
        return self.compute_s + self.link_s

    @property
    def simulators(self) -> float:
        """Chips that imagine for each chip that decides and learns, if both take as long."""
        return self.imagine_s / (self.expected_s - self.imagine_s)


def update_bytes(policy: Policy, work: Work, fsdp: int, data: int) -> dict[str, float]:
    """Return what a chip receives in one update by purpose, without frames.

    Weights that are cut are gathered for the forward pass and again for the backward pass, which
    recomputes the layers. In every micro-batch, gradients are summed over the chips that share the
    weights. Once per optimiser step, their shards are summed over the copies in float32.
    """
    cut, copies = (fsdp - 1) / fsdp, (data - 1) / data
    gathered = 2 * (policy.trained + policy.frozen) * work.weight_bytes * cut
    scattered = policy.trained * work.gradient_bytes * cut
    reduced = 2 * policy.trained / fsdp * 4 * copies
    return {
        "weights": work.micro_batches * gathered,
        "gradients": work.micro_batches * scattered,
        "sums": work.optimizer_steps * reduced,
    }


def iteration(
    chips: int, hardware: Hardware, work: Work, model: EvacConfig, policy: Policy
) -> Cost:
    """Return what an iteration costs.

    Raises:
        ValueError: the number of chips does not fill linked groups or copies of the policy.
    """
    local = min(chips, hardware.linked)
    fsdp = min(work.fsdp or chips, chips)
    if chips % local or chips % fsdp or max(fsdp, local) % min(fsdp, local):
        raise ValueError(
            f"expected a number of chips that is a multiple of {local} per host and of fsdp "
            f"{fsdp}, which divide one another; got {chips}"
        )
    groups, data, span = chips // local, chips // fsdp, max(fsdp // local, 1)
    forward = flops.forward(policy.sizes)
    frame = policy.sizes.num_images * 3 * model.image_size[0] * model.image_size[1]
    calls = work.rounds * work.chunks
    joined = work.micro_batches * 2 * work.micro_batch * chips * frame
    whole = (policy.trained + policy.frozen) * work.weight_bytes
    copied = policy.trained * work.stored_bytes * work.separate

    def others(count: int) -> float:
        return (count - 1) / count

    chip = update_bytes(policy, work, fsdp, data) | {
        "deciding": calls * whole * others(fsdp),
        "new weights": copied / fsdp,
        "frames": joined * others(chips),
    }
    # A ring over several groups enters each of them once.
    once = update_bytes(policy, work, span, groups // span)
    outside = once | {
        "sums": once["sums"] * span * min(fsdp, local) / fsdp,
        "deciding": calls * whole * others(span),
        "new weights": copied / span * (groups > 1),
        "frames": joined * others(groups),
    }
    # Within a group the same bytes use the chip's link, at most at the rate of the group's link.
    seconds = {
        name: max(chip[name] / hardware.link, outside[name] / hardware.outside) for name in chip
    }
    rate, samples = hardware.operations, work.samples
    chunk = flops.chunk(model, work.steps, decoded=work.decoded)
    return Cost(
        imagine_s=samples * chunk / (hardware.imagines * hardware.imagine_share),
        decide_s=samples * forward / (rate * hardware.decide_share),
        update_s=work.update_epochs * samples * policy.update / (rate * hardware.update_share),
        chip_bytes=chip,
        outside_bytes=outside,
        link_s=sum(seconds.values()) / hardware.link_share,
        hidden=hardware.hidden,
    )


def _is_gpu(chip: str) -> bool:
    return Topology(chip, chip, ()).platform == "cuda"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--chips", nargs="+", choices=HIDDEN, default=list(HIDDEN))
    parser.add_argument("--counts", type=KINDS["count"], nargs="+", default=[1, 8, 64, 256, 512])
    parser.add_argument("--lora", action="store_true", help="adapters over a base that is whole")
    parser.add_argument("--iterations", type=KINDS["count"], default=1000, help="of a training")
    parser.add_argument("--out", type=Path, help="also write the numbers to this file")
    for group, kind in (("shares of the rates", Hardware), ("work of one chip", Work)):
        section = parser.add_argument_group(group)
        for field in dataclasses.fields(kind):
            if field.default is dataclasses.MISSING or field.name == "hidden":
                continue
            if isinstance(field.default, bool):
                section.add_argument(f"--{field.name}", action="store_true")
            else:
                kind = "count" if isinstance(field.default, int) else "positive"
                kind = "share_above_0" if field.name.endswith("_share") else kind
                section.add_argument(f"--{field.name}", type=KINDS[kind], default=field.default)
    return parser.parse_args()


def _taken(args: argparse.Namespace, kind: type) -> dict[str, float]:
    names = {field.name for field in dataclasses.fields(kind)}
    return {name: value for name, value in vars(args).items() if name in names}


HEADS = (
    *("chip", "chips", "episodes", "imagine s", "decide s", "update s", "links s", "hidden s"),
    *("expected s", "none s", "GB/chip", "GB outside", "simulators", "days"),
)


def main() -> None:
    """Print one row per chip and count."""
    args = _options()
    work, model = Work(**_taken(args, Work)), EvacConfig()
    sizes = OpenVLAOFTConfig()
    if args.lora:
        sizes = dataclasses.replace(sizes, lora_rank=RANK, param_dtype="bfloat16")
        work = dataclasses.replace(work, fsdp=1)
    policy = Policy.of(sizes)
    print("A model. Nothing in this table was measured.")
    print(
        f"one chip: {work.samples} chunks, each {flops.chunk(model, work.steps) / 1e12:.0f} TFLOP "
        f"imagined, {flops.forward(sizes) / 1e12:.1f} decided and {policy.update / 1e12:.1f} "
        f"learned from; {work.micro_batches} micro-batches of {work.micro_batch}, "
        f"{work.optimizer_steps} optimiser steps; {policy.trained / 1e9:.2f} B parameters train, "
        f"{policy.frozen / 1e9:.2f} B do not"
    )
    print("".join(f"{head:>11}" for head in HEADS))
    rows = []
    for chip in args.chips:
        hardware = Hardware.of(chip, hidden=HIDDEN[chip], **_taken(args, Hardware))
        for count in args.counts:
            try:
                cost = iteration(count, hardware, work, model, policy)
            except ValueError as error:
                raise SystemExit(f"{chip}, --counts {count}: {error}") from None
            episodes = count * work.envs * work.rounds
            row = (chip, count, episodes, cost.imagine_s, cost.decide_s, cost.update_s)
            row += (cost.link_s, cost.compute_s, cost.expected_s, cost.total_s)
            row += (sum(cost.chip_bytes.values()) / 1e9, sum(cost.outside_bytes.values()) / 1e9)
            row += (cost.simulators, cost.expected_s * args.iterations / 86400)
            print("".join(_cell(value) for value in row))
            rows.append({"chip": chip, "chips": count} | dataclasses.asdict(cost))
    print(
        "hidden, none: seconds of an iteration if all transfers hide behind arithmetic, or none; "
        "expected: as many as in the compiled programs. simulators: chips that imagine for each "
        f"chip that decides and learns. days: of {args.iterations} iterations"
    )
    if args.out:
        args.out.write_text(json.dumps({"work": dataclasses.asdict(work), "rows": rows}) + "\n")


def _cell(value: float | str) -> str:
    return f"{value:>11.1f}" if isinstance(value, float) else f"{value:>11}"


if __name__ == "__main__":
    main()

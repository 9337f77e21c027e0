"""Models the cost of one iteration of the full-size system on many GPUs; it measures nothing.

    python -m benchmarks.cost_model [--gpus 1 8 64 512] [--fsdp 8] [--micro_batch 4] [--out FILE]

Operations are counted exactly (`benchmarks.flops`). Bytes follow from how XLA shards the update,
which `benchmarks.partition` checks. Rates of GPUs and links, and the shares of them that the
software reaches, are arguments. Their defaults are data-sheet figures of an H100 and the goals of
this project; none of them is measured here. Every GPU gets the same work, whatever their number; by
default that of the published run on 8 GPUs. docs/scaling.md has the formulae.
"""

import argparse
import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from benchmarks import flops
from evac_jax.evac.config import EvacConfig
from policies.openvla_oft.config import OpenVLAOFTConfig


@dataclass(frozen=True)
class Hardware:
    """GPUs and links. The defaults: H100 SXM, NVLink 4, one 400 Gb/s adapter per GPU.

    Attributes:
        tflops: dense bfloat16 rate of a GPU, 1e12 operations/s.
        gpu_link: rate at which a GPU receives from others of its host, 1e9 bytes/s.
        host_link: rate at which a host receives from other hosts, 1e9 bytes/s.
        gpus_per_host: GPUs that share a host.
        imagine_mfu, decide_mfu, update_mfu: share of the GPU's rate that each kind of work reaches;
            what the backward pass computes a second time does not count as work.
        link_share: share of the links' rates that collectives reach.
    """

    tflops: float = 989.0
    gpu_link: float = 450.0
    host_link: float = 400.0
    gpus_per_host: int = 8
    imagine_mfu: float = 0.45
    decide_mfu: float = 0.40
    update_mfu: float = 0.40
    link_share: float = 0.7


@dataclass(frozen=True)
class Work:
    """The work of each GPU in an iteration; default: configs/grpo.py:libero_spatial on 8 GPUs.

    Attributes:
        envs: environments that are played at the same time.
        rounds: rollout epochs.
        chunks: decisions of an episode.
        steps: denoising steps.
        decoded: frames of a chunk that are decoded and judged; 0 = all.
        micro_batch: samples of one forward pass of the update.
        update_epochs: passes over the samples.
        fsdp: largest number of GPUs over which parameters are sharded; 0 = all.
        weight_bytes: bytes of a parameter when it is gathered for its layer (2 in bfloat16).
        gradient_bytes: bytes of a gradient when it is summed over GPUs.
        stored_bytes: bytes of a stored parameter.
        separate: whether separate GPUs decide, which get the parameters after every update.
    """

    envs: int = 2
    rounds: int = 16
    chunks: int = 32
    steps: int = 50
    decoded: int = 0
    micro_batch: int = 4
    update_epochs: int = 1
    fsdp: int = 8
    weight_bytes: int = 2
    gradient_bytes: int = 2
    stored_bytes: int = 4
    separate: bool = False

    @property
    def samples(self) -> int:
        """Decisions per GPU and iteration."""
        return self.envs * self.rounds * self.chunks

    @property
    def micro_batches(self) -> int:
        """Forward and backward passes per iteration."""
        return self.update_epochs * self.samples // self.micro_batch


@dataclass(frozen=True)
class Cost:
    """One iteration; seconds, and bytes that one GPU or one host receives.

    Attributes:
        imagine_s, decide_s, update_s: arithmetic.
        gpu_bytes: by purpose, over the links within a host.
        host_bytes: by purpose, over the links between hosts.
        link_s: all transfers, one after another.
    """

    imagine_s: float
    decide_s: float
    update_s: float
    gpu_bytes: dict[str, float]
    host_bytes: dict[str, float]
    link_s: float

    @property
    def compute_s(self) -> float:
        """Arithmetic alone: the time of an iteration in which all transfers are hidden."""
        return self.imagine_s + self.decide_s + self.update_s

    @property
    def total_s(self) -> float:
        """The time of an iteration in which no transfer is hidden."""
        return self.compute_s + self.link_s


def fsdp_bytes(parameters: float, work: Work, fsdp: int, data: int) -> dict[str, float]:
    """Return the sizes of the results of one micro-batch's collectives (whole arrays).

    Sharded weights are gathered for the forward pass and again for the backward pass, which
    recomputes the layers. In every micro-batch, gradients are summed over the GPUs that share the
    weights, and then their shards over the copies.
    """
    cut, copies = fsdp > 1, data > 1
    return {
        "gather": 2 * parameters * work.weight_bytes * cut,
        "scatter": parameters * work.gradient_bytes * cut,
        "reduce": parameters / fsdp * work.gradient_bytes * copies,
    }


def iteration(
    gpus: int,
    hardware: Hardware,
    work: Work,
    model: EvacConfig,
    policy: OpenVLAOFTConfig,
    parameters: float,
) -> Cost:
    """Return what an iteration costs.

    Args:
        parameters: of the policy, all trained.

    Raises:
        ValueError: the number of GPUs is no multiple of a host or of a copy of the policy.
    """
    local = min(gpus, hardware.gpus_per_host)
    fsdp = min(work.fsdp or gpus, gpus)
    if gpus % local or gpus % fsdp or max(fsdp, local) % min(fsdp, local):
        raise ValueError(
            f"expected a number of GPUs that is a multiple of {local} per host and of fsdp "
            f"{fsdp}, which divide one another; got {gpus}"
        )
    hosts, data, span = gpus // local, gpus // fsdp, max(fsdp // local, 1)
    rate = hardware.tflops * 1e12
    forward = flops.forward(policy)
    frame = policy.num_images * 3 * model.image_size[0] * model.image_size[1]
    per_micro = fsdp_bytes(parameters, work, fsdp, data)
    calls, micro = work.rounds * work.chunks, work.micro_batches
    joined = work.micro_batch * gpus * frame  # every GPU's frames of a micro-batch, added up
    gathered = parameters * work.weight_bytes * (fsdp > 1)
    copied = parameters * work.stored_bytes * work.separate

    def others(count: int) -> float:
        return (count - 1) / count

    gpu = {
        "weights": micro * per_micro["gather"] * others(fsdp),
        "gradients": micro
        * (per_micro["scatter"] * others(fsdp) + 2 * per_micro["reduce"] * others(data)),
        "deciding": calls * gathered * others(fsdp),
        "new weights": copied / fsdp,
        "frames": micro * 2 * joined * others(gpus),
    }
    # A ring over several hosts enters each host once.
    host = {
        "weights": micro * per_micro["gather"] * others(span),
        "gradients": micro
        * (
            per_micro["scatter"] * others(span)
            + 2 * min(fsdp, local) * per_micro["reduce"] * others(hosts // span)
        ),
        "deciding": calls * gathered * others(span),
        "new weights": copied / span * (hosts > 1),
        "frames": micro * 2 * joined * others(hosts),
    }
    slow = hardware.link_share * 1e9
    # Within a host the same bytes use the GPU's link, at most at the rate of the host's link.
    seconds = {
        name: max(gpu[name] / hardware.gpu_link, host[name] / hardware.host_link) / slow
        for name in gpu
    }
    return Cost(
        imagine_s=work.samples
        * flops.chunk(model, work.steps, decoded=work.decoded)
        / (rate * hardware.imagine_mfu),
        decide_s=work.samples * forward / (rate * hardware.decide_mfu),
        update_s=work.update_epochs * work.samples * (3 * forward) / (rate * hardware.update_mfu),
        gpu_bytes=gpu,
        host_bytes=host,
        link_s=sum(seconds.values()),
    )


def count_parameters(policy: OpenVLAOFTConfig) -> int:
    """Return the policy's trained parameters, from the shapes of the real module."""
    from evac_jax.tools.memory.trainer import count

    return count(policy)[0]


def _add_arguments(parser: argparse.ArgumentParser, group: str, kind: type) -> None:
    section = parser.add_argument_group(group)
    for field in dataclasses.fields(kind):
        if isinstance(field.default, bool):
            section.add_argument(f"--{field.name}", action="store_true")
        else:
            section.add_argument(f"--{field.name}", type=type(field.default), default=field.default)


def _taken(args: argparse.Namespace, kind: type):
    return kind(**{field.name: getattr(args, field.name) for field in dataclasses.fields(kind)})


def main() -> None:
    """Print one row per number of GPUs."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 8, 64, 512])
    parser.add_argument("--out", type=Path, help="also write the numbers to this file")
    _add_arguments(parser, "hardware (docs/scaling.md)", Hardware)
    _add_arguments(parser, "work of one GPU", Work)
    args = parser.parse_args()
    hardware, work = _taken(args, Hardware), _taken(args, Work)
    model, policy = EvacConfig(), OpenVLAOFTConfig()
    parameters = count_parameters(policy)
    print("A model. Nothing in this table was measured.")
    print(
        f"one GPU: {work.samples} chunks, each {flops.chunk(model, work.steps) / 1e12:.0f} TFLOP "
        f"imagined and {flops.forward(policy) / 1e12:.1f} decided; {work.micro_batches} "
        f"micro-batches of {work.micro_batch}; policy {parameters / 1e9:.2f} B parameters"
    )
    heads = ("GPUs", "episodes", "imagine s", "decide s", "update s", "links s", "hidden s")
    heads += ("none s", "GB/GPU", "GB/host", "GPU-s/episode")
    print("".join(f"{head:>{width}}" for head, width in zip(heads, _WIDTHS, strict=True)))
    rows = []
    for gpus in args.gpus:
        try:
            cost = iteration(gpus, hardware, work, model, policy, parameters)
        except ValueError as error:
            raise SystemExit(f"--gpus {gpus}: {error}") from None
        episodes = gpus * work.envs * work.rounds
        row = (gpus, episodes, cost.imagine_s, cost.decide_s, cost.update_s, cost.link_s)
        row += (cost.compute_s, cost.total_s, sum(cost.gpu_bytes.values()) / 1e9)
        row += (sum(cost.host_bytes.values()) / 1e9, cost.total_s * gpus / episodes)
        print("".join(_cell(x, width) for x, width in zip(row, _WIDTHS, strict=True)))
        rows.append({"gpus": gpus, "episodes": episodes} | dataclasses.asdict(cost))
    print("hidden, none: seconds of an iteration if all transfers hide behind arithmetic, or none")
    if args.out:
        told = {"hardware": dataclasses.asdict(hardware), "work": dataclasses.asdict(work)}
        args.out.write_text(json.dumps(told | {"rows": rows}, indent=2) + "\n")


_WIDTHS = (6, 10, 11, 10, 10, 9, 10, 9, 10, 10, 15)


def _cell(value: float, width: int) -> str:
    return f"{value:>{width}}" if isinstance(value, int) else f"{value:>{width}.1f}"


if __name__ == "__main__":
    main()

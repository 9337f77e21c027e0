"""Success classifier: one frame in, the probability that the task is done in it out."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evac_jax.errors import ConfigError
from evac_jax.evac.config import JsonConfig
from evac_jax.evac.model_folders import load_model


@dataclass(frozen=True)
class RewardConfig(JsonConfig):
    """Sizes of the classifier.

    Attributes:
        width: channels of the first stage; the public reward models use 64.
        num_instructions: 0 for one task; otherwise the number of instructions, of which the
            classifier gets the one to judge.
    """

    width: int = 64
    num_instructions: int = 0


class ResidualUnit(nn.Module):
    """Two 3x3 convolutions with batch norm around a shortcut; the first may halve the size."""

    def __init__(self, channels: int, out_channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out_channels, 3, stride, 1)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1)
        self.conv3 = nn.Conv2d(channels, out_channels, 1, stride) if stride > 1 else None
        self.bn1, self.bn2 = nn.BatchNorm2d(out_channels), nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] to [N, C', H / stride, W / stride]."""
        h = F.relu(self.bn1(self.conv1(x)))
        h = self.bn2(self.conv2(h))
        return F.relu(h + (x if self.conv3 is None else self.conv3(x)))


class RewardNet(nn.Module):
    """A ResNet-18 with one output.

    Differs from the reference: (1) values outside [-1, 1] are clamped, where it asserts [-1.5, 1.5]
    and so kills a worker whose decoder overshoots; (2) the threshold is an argument; (3) with
    `num_instructions` the instruction scales and shifts the features behind every stage.

    Source: RLinf/RLinf at c9f1d8471, the reward model of its EVAC environment.
    """

    def __init__(self, config: RewardConfig):
        super().__init__()
        self.config = config
        width = config.width
        stages = [(width, width, 1), (width, 2 * width, 2)]
        stages += [(2 * width, 4 * width, 2), (4 * width, 8 * width, 2)]
        self.net = nn.Sequential(
            nn.Sequential(
                nn.Conv2d(3, width, 7, 2, 3),
                nn.BatchNorm2d(width),
                nn.ReLU(),
                nn.MaxPool2d(3, 2, 1),
            ),
            *(
                nn.Sequential(ResidualUnit(c, out, stride), ResidualUnit(out, out, 1))
                for c, out, stride in stages
            ),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8 * width, 1),
        )
        self.instruction = nn.ModuleList()
        if config.num_instructions:
            self.instruction.extend(
                nn.Embedding(config.num_instructions, 2 * out) for _, out, _ in stages
            )
            for table in self.instruction:
                nn.init.zeros_(table.weight)

    def forward(self, frames: Tensor, instruction: Tensor | None = None) -> Tensor:
        """Logits [N] of frames [N, 3, H, W] in [-1, 1].

        Args:
            instruction: [N] int64 in [0, num_instructions); None if there are no instructions.
        """
        if (instruction is None) == (self.config.num_instructions > 0):
            raise ValueError(
                f"instruction: this classifier knows {self.config.num_instructions} instructions, "
                f"got {'none' if instruction is None else 'some'}"
            )
        x = self.net[0](frames.clamp(-1.0, 1.0))
        for i, stage in enumerate(self.net[1:5]):
            x = stage(x)
            if instruction is not None:
                scale, shift = self.instruction[i](instruction)[:, :, None, None].chunk(2, dim=1)
                x = x * (1 + scale) + shift
        return self.net[5:](x).squeeze(1)

    def probability(self, frames: Tensor, instruction: Tensor | None = None) -> Tensor:
        """Probability [N] of success."""
        return self(frames, instruction).sigmoid()

    def predict(
        self, frames: Tensor, instruction: Tensor | None = None, *, threshold: float = 0.5
    ) -> Tensor:
        """Rewards [N] float, 1 where the probability lies above the threshold, else 0."""
        return (self.probability(frames, instruction) > threshold).float()


class RewardEnsemble(nn.Module):
    """Several classifiers that judge together: the mean probability, and a veto.

    A policy that learns to exploit one classifier's errors rarely fools another one as well, so a
    frame on which they disagree is not a success.

    Args:
        members: classifiers that know the same number of instructions.
        veto: a frame whose members' probabilities lie further apart than this counts as certain
            failure, (0, 1]; 0 = never.

    Raises:
        ConfigError: the members do not fit together, or a veto with a single classifier.

    Source: after Coste et al. 2023, "Reward model ensembles help mitigate overoptimization"
    (arXiv:2310.02743); their penalty by variance is a veto here, because rewards are 0 or 1.
    """

    def __init__(self, members: Sequence[RewardNet], veto: float = 0.0):
        super().__init__()
        known = {member.config.num_instructions for member in members}
        if len(known) != 1:
            raise ConfigError(
                f"reward: all classifiers must know the same instructions, got {sorted(known)} "
                "of them; train them on the same recordings"
            )
        if veto and len(members) < 2:
            raise ConfigError(
                f"reward.veto={veto} needs two classifiers at least, got {len(members)}; join "
                "their folders by commas in reward.checkpoint, or set reward.veto=0"
            )
        self.members, self.veto = nn.ModuleList(members), veto
        self.config = members[0].config

    @classmethod
    def load(cls, folders: str, veto: float = 0.0, device: str = "cpu") -> "RewardEnsemble":
        """Load the classifiers of `folders`, one or several joined by commas.

        Raises:
            CheckpointError: weights are missing or do not fit.
            ConfigError: see the class; or their data cards list other instructions, or the same
                ones in another order, so that one index would mean two tasks.
        """
        names = folders.split(",")
        lists = {name: known for name in names if (known := _instructions(Path(name)))}
        if len(set(lists.values())) > 1:
            told = "\n".join(f"  {name}: {list(known)}" for name, known in lists.items())
            raise ConfigError(
                "reward.checkpoint: all classifiers must list the same instructions in the same "
                f"order, their cards say\n{told}\ntrain them on the same recordings"
            )
        return cls([load_model(name, kind="RewardNet", device=device) for name in names], veto)

    def probability(self, frames: Tensor, instruction: Tensor | None = None) -> Tensor:
        """Probability [N] of success of frames [N, 3, H, W], see `RewardNet`."""
        each = torch.stack([member.probability(frames, instruction) for member in self.members])
        mean = each.mean(0)
        if not self.veto:
            return mean
        return mean.masked_fill(each.amax(0) - each.amin(0) > self.veto, 0.0)


def _instructions(folder: Path) -> tuple[str, ...]:
    """Instructions in a classifier's order; () if it takes none, or has no card."""
    path = folder / "card.json"
    return tuple(json.loads(path.read_text()).get("instructions", ())) if path.is_file() else ()

"""Judges of success: the classifier of single frames, and what the environment asks of any."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evac_jax.config import import_string
from evac_jax.errors import CheckpointError, ConfigError
from evac_jax.evac.config import JsonConfig
from evac_jax.evac.model_folders import load_model
from evac_jax.files import cards
from evac_jax.files.instructions import numbers_in
from evac_jax.sim.env_config import WorldModelEnvConfig
from evac_jax.sim.vlm import VlmJudge

CLASSIFIER_BATCH = 256  # frames per call; bounds its activations to about 1.5 GB at 256 pixels


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
    and so kills a worker whose decoder overshoots; (2) it gives probabilities, and `sim.episodes`
    says what is a success; (3) with `num_instructions` the instruction scales and shifts the
    features behind every stage.

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


class RewardEnsemble(nn.Module):
    """Several classifiers that judge together: the mean probability, and a veto.

    A policy that learns to exploit one classifier's errors rarely fools another one as well, so a
    frame on which they disagree is not a success.

    Args:
        members: classifiers; each may be told the instruction or not.
        veto: a frame whose members' probabilities lie further apart than this counts as certain
            failure, (0, 1]; 0 = never.
        numbers: the number under which each member knows each task of the world that is judged,
            [members, tasks]; None: the world's own numbers.
        notes: what a user should know about them.

    Raises:
        ConfigError: a veto with a single classifier.

    Source: after Coste et al. 2023, "Reward model ensembles help mitigate overoptimization"
    (arXiv:2310.02743); their penalty by variance is a veto here, because rewards are 0 or 1.
    """

    numbers: Tensor | None

    def __init__(
        self,
        members: Sequence[RewardNet],
        veto: float = 0.0,
        numbers: np.ndarray | None = None,
        notes: Sequence[str] = (),
    ):
        super().__init__()
        if veto and len(members) < 2:
            raise ConfigError(
                f"reward.veto={veto} needs two classifiers at least, got {len(members)}; join "
                "their folders by commas in reward.checkpoint, or set reward.veto=0"
            )
        self.members, self.veto, self.notes = nn.ModuleList(members), veto, tuple(notes)
        table = None if numbers is None else torch.from_numpy(numbers.astype(np.int64))
        self.register_buffer("numbers", table, persistent=False)

    @classmethod
    def load(
        cls, folders: str, instructions: Sequence[str], veto: float = 0.0, device: str = "cpu"
    ) -> "RewardEnsemble":
        """Load the classifiers of `folders`, one or several joined by commas, to judge a world.

        Args:
            instructions: what the world's task numbers mean. Each classifier's card says under
                which number it knows each of these texts; it may know more of them, in any order.
            veto: see the class.
            device: torch device.

        Raises:
            CheckpointError: weights are missing or do not fit, or a card is not theirs.
            ConfigError: see the class; or a classifier does not know an instruction.
        """
        members, numbers, notes = [], [], []
        for folder in folders.split(","):
            member = load_model(folder, kind="RewardNet", device=device)
            own, note = _own_numbers(folder, member.config.num_instructions, instructions)
            members.append(member)
            numbers.append(own)
            notes += [note] if note else []
        return cls(members, veto, np.stack(numbers), notes).to(device)

    def probability(self, frames: Tensor, task: Tensor | None = None) -> Tensor:
        """Probability [N] of success of frames [N, 3, H, W], see `RewardNet`.

        Args:
            task: the world's task numbers, int64 [N]; not needed if no member is told them.
        """
        each = torch.stack(
            [
                member.probability(frames, self._asked(number, task))
                for number, member in enumerate(self.members)
            ]
        )
        mean = each.mean(0)
        if not self.veto:
            return mean
        return mean.masked_fill(each.amax(0) - each.amin(0) > self.veto, 0.0)

    def _asked(self, member: int, task: Tensor | None) -> Tensor | None:
        """Return the tasks in a member's own numbers."""
        if task is None or not self.members[member].config.num_instructions:
            return None
        return task if self.numbers is None else self.numbers[member, task]


class Judge(Protocol):
    """What judges imagined frames; it may have `notes`, texts that a user should know."""

    def probability(self, frames: Tensor, task: Tensor | None = None) -> Tensor:
        """Probability of success in [0, 1], [N].

        Args:
            frames: [N 3 H W] in [-1, 1].
            task: numbers of the instructions, int64 [N].
        """
        ...

    def to(self, device: str) -> object:
        """Move what it holds to a torch device."""
        ...


class Watch(Protocol):
    """Judges the episodes of a batch of environments while they are imagined."""

    def begin(self, rows: np.ndarray, frames: Tensor) -> None:
        """Environments `rows` [b] begin an episode with frames [b 3 H W] in [-1, 1]."""
        ...

    def judge(self, rows: np.ndarray, frames: Tensor, task: np.ndarray) -> Tensor:
        """Probability of success [b k] of the last k frames of a chunk.

        Args:
            rows: environments that were imagined, ascending [b].
            frames: float32 [b k 3 H W] in [-1, 1].
            task: numbers of the instructions, int [b].
        """
        ...


class FrameByFrame:
    """Watches with a judge that needs nothing but the frame that it judges."""

    def __init__(self, judge: Judge):
        self._judge = judge

    def begin(self, rows: np.ndarray, frames: Tensor) -> None:
        """Remember nothing."""

    def judge(self, rows: np.ndarray, frames: Tensor, task: np.ndarray) -> Tensor:
        """See `Watch`."""
        flat = frames.flatten(0, 1)
        asked = torch.from_numpy(task.astype(np.int64)).to(frames.device)
        asked = asked.repeat_interleave(frames.shape[1])
        parts = [
            self._judge.probability(flat[i : i + CLASSIFIER_BATCH], asked[i : i + CLASSIFIER_BATCH])
            for i in range(0, len(flat), CLASSIFIER_BATCH)
        ]
        return torch.cat(parts).unflatten(0, frames.shape[:2])


def watch(judge: Judge | VlmJudge, num_envs: int, chunks: int) -> Watch:
    """Return what judges a batch of episodes.

    Args:
        judge: of single frames, or one that has a `watch` of its own.
        num_envs: environments of the batch.
        chunks: of an episode.

    Raises:
        ConfigError: the judge can find no success in so few chunks.
    """
    if isinstance(judge, VlmJudge):
        return judge.watch(num_envs, chunks)
    return FrameByFrame(judge)


def make_judge(settings: WorldModelEnvConfig, instructions: Sequence[str]) -> Judge | VlmJudge:
    """Load what judges, or make a judge of the user's own.

    Args:
        settings: of the environment. What an import string in `judge` names is called with
            `reward`, instructions and device.
        instructions: what the task numbers mean.

    Raises:
        ConfigError: the user's own cannot be imported or lacks something; or see
            `RewardEnsemble.load` and `VlmJudge.load`.
        CheckpointError: see there.
    """
    name, folders, device = settings.judge, settings.reward, settings.device
    if name == "vlm":
        return VlmJudge.load(folders, instructions, settings.vlm, device)
    if not import_string.is_one(name):
        return RewardEnsemble.load(folders, instructions, settings.veto, device)
    judge = import_string.load(name, makes=import_string.JUDGE)(
        folders, tuple(instructions), device
    )
    import_string.require(judge, import_string.JUDGE, name)
    return judge


def _own_numbers(folder: str, known: int, instructions: Sequence[str]) -> tuple[np.ndarray, str]:
    """Return under which numbers a classifier of `known` instructions has a world's; and a note.

    One that is told no instruction (0 known) has one number for all that it was trained on.
    """
    texts = cards.read(Path(folder)).get("instructions", ())
    if known and texts and len(texts) != known:
        raise CheckpointError(
            f"{folder}: card.json lists {len(texts)} instructions, config.json says that the "
            f"classifier knows {known}; they belong to different trainings"
        )
    if texts:
        what = f"reward.checkpoint: the classifier {folder} (its card.json)"
        return numbers_in(texts, instructions, what) * bool(known), ""
    if not known:
        return np.zeros(len(instructions), np.int32), (
            f"{folder} has no card.json that lists its instructions: its verdict is taken to count "
            f"for {list(instructions)}; write those that it was trained on into a card.json, as "
            '"instructions"'
        )
    if len(instructions) != known:
        raise ConfigError(
            f"reward.checkpoint: {folder} knows {known} instructions and has no card.json that "
            f"lists them; the initial states have {len(instructions)}, {list(instructions)}. "
            'Write a card.json with "instructions", in the order of the training, into the folder'
        )
    return np.arange(known, dtype=np.int32), (
        f"{folder} has no card.json that lists its instructions: they are taken to be those of the "
        f"initial states, in this order: {list(instructions)}. If it was trained on another order, "
        'it judges the wrong tasks; write a card.json with "instructions" into the folder'
    )

"""The folder that `tools.reward.vlm_threshold` writes: a VLM, and the threshold found for it.

A run names it by `reward.checkpoint`. The threshold is right only for what it was measured with, so
a run with other values is refused.
"""

import dataclasses
import json
import shlex
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

from evac_jax.config import hub
from evac_jax.config.fields import Kind, hints
from evac_jax.config.schema import RewardConfig
from evac_jax.config.vlm import VlmConfig
from evac_jax.errors import CheckpointError, DataError

CARD_FILE = "vlm.json"
# What a threshold depends on; `VlmConfig.batch` changes rounding only.
MEASURED_WITH = ("prompt", "frames", "every", "average", "dtype")


@dataclass(frozen=True)
class VlmCard:
    """What vlm.json says.

    Attributes:
        model: absolute path of the model's folder, or its address on the Hugging Face Hub.
        sizes: bytes of the files in it, by name; tells another model under the same path.
        threshold: of the mean log-probability, at most 0.
        chunk: frames that are imagined together, after which an episode is judged.
        prompt, frames, every, average, dtype: as of `VlmConfig`.
    """

    model: str
    sizes: dict[str, int]
    threshold: float
    chunk: int
    prompt: str
    frames: int
    every: int
    average: int
    dtype: str

    @classmethod
    def make(cls, model: str, threshold: float, chunk: int, vlm: VlmConfig) -> "VlmCard":
        """Return the card of a model, a folder that is here."""
        told = {name: getattr(vlm, name) for name in MEASURED_WITH}
        return cls(hub.address_of(hub.absolute(model)), _sizes(model), threshold, chunk, **told)

    def write(self, folder: str | Path) -> None:
        """Write the card into a folder that is there."""
        text = json.dumps(dataclasses.asdict(self), indent=2) + "\n"
        (Path(folder) / CARD_FILE).write_text(text)

    def settings(self) -> dict[str, Any]:
        """Return what the threshold asks of a run; fields of `reward`, those of `vlm` nested."""
        return {
            "judge": "vlm",
            "threshold": self.threshold,
            "success_frames": 1,
            "judged_frames": 1,
            "vlm": {name: getattr(self, name) for name in MEASURED_WITH},
        }

    def flags(self, reward: RewardConfig) -> list[str]:
        """Return the flags of a run that give `reward` the values of the card."""
        wanted = self.settings()
        wanted |= {f"vlm.{name}": value for name, value in wanted.pop("vlm").items()}
        return [
            shlex.quote(f"--config.reward.{name}={value}")
            for name, value in wanted.items()
            if attrgetter(name)(reward) != value
        ]


def read(folder: str) -> VlmCard | None:
    """Return the card of a folder, None where there is none: then it is the model's own.

    Raises:
        DataError: the card is damaged.
    """
    path = Path(folder) / CARD_FILE
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text())
        declared = hints(VlmCard)
        if not isinstance(values, dict) or values.keys() != declared.keys():
            raise ValueError(f"expected an object with {', '.join(declared)}")
        problems: list[str] = []
        for name, hint in declared.items():
            if name != "sizes":
                values[name] = Kind.of(hint).convert(values[name], name, problems)
        if problems:
            raise ValueError("; ".join(problems).replace("config.", ""))
    except ValueError as error:
        raise DataError(
            f"{path}: {error}; write it anew with evac_jax.tools.reward.vlm_threshold"
        ) from error
    return VlmCard(**values)


def check_is_model(folder: str) -> None:
    """Refuse a folder that is no model of transformers; an address is not looked at.

    Raises:
        DataError: it has no config.json, or not that of a model of transformers.
    """
    path = Path(folder) / "config.json"
    if hub.is_address(folder) or not Path(folder).is_dir():  # a missing folder is told elsewhere
        return
    try:
        told = json.loads(path.read_text())
    except (OSError, ValueError):
        told = None
    if not isinstance(told, dict) or "model_type" not in told:
        raise DataError(
            'with reward.judge = "vlm" expected the folder of an image-text-to-text model of '
            f"transformers, or one of tools.reward.vlm_threshold; {path} is no such model's"
        )


def simulated(folder: str) -> dict[str, Any]:
    """Return what simulators need of `reward.checkpoint`; a model's address is downloaded.

    Returns:
        "reward", the folder of the model; where there is a card also "vlm_chunk".

    Raises:
        CheckpointError: the card's model is gone, or is another one by now.
        DataError: the card is damaged, or its address cannot be had.
    """
    card = read(folder)
    if card is None:
        return {"reward": folder}
    model = hub.local(card.model)
    if not Path(model).is_dir():
        raise CheckpointError(
            f"{folder}: its {CARD_FILE} names the model {card.model!r}, which does not exist; put "
            "it there, or choose the threshold anew with evac_jax.tools.reward.vlm_threshold"
        )
    if (found := _sizes(model)) != card.sizes:
        differing = sorted(
            name for name in found.keys() | card.sizes if found.get(name) != card.sizes.get(name)
        )
        raise CheckpointError(
            f"{folder}: the threshold was found for other files in {model} than are there now "
            f"({', '.join(differing)}); choose it anew with evac_jax.tools.reward.vlm_threshold"
        )
    return {"reward": model, "vlm_chunk": card.chunk}


def _sizes(folder: str) -> dict[str, int]:
    files = sorted(path for path in Path(folder).iterdir() if path.is_file())
    return {path.name: path.stat().st_size for path in files}

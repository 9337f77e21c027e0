"""Success by a frozen vision-language model (VLM), without training a classifier.

The model gets frames of an episode and a text that ends "... Decide whether the above statement is
True or not. The answer is:". The log-probability that " True" comes next is a *judgement*.

What is averaged: an episode is judged after every `every`-th chunk. A verdict is the arithmetic
mean of the log-probabilities of its latest `average` judgements, so the logarithm of the geometric
mean of their probabilities. Judgements of one episode only; before there are `average` of them
there is no success. The verdict belongs to the last frame of the chunk; all other frames count as
failures. Success is a mean of at least the threshold.

Source: Chen et al. 2026, "TOPReward: Token Probabilities as Hidden Zero-Shot Rewards for Robotics"
(arXiv:2602.19313), whose success detection averages the last three values too. Differences: frames
are given as images in one prompt, as every image-text-to-text model takes them, not as a video; the
text says "images"; values are not normalised over an episode, because that needs its end.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evac_jax.config.vlm import BLANK, VlmConfig
from evac_jax.errors import CheckpointError, ConfigError, SimulatorError
from evac_jax.evac.lean_imports import ensure_torchvision
from evac_jax.sim.pixels import to_uint8

ASKED_FOR = "expected the folder of an image-text-to-text model of transformers"


class VlmJudge:
    """A VLM that is asked whether episodes show their tasks done.

    Args:
        model: an image-text-to-text model of transformers, in eval mode.
        processor: its processor, with tokenizer, image processor and chat template.
        instructions: what task numbers mean.
        config: how it is asked.

    Raises:
        ConfigError: the answer is not one token, or the chat template has no place for the text.
    """

    notes = ()

    def __init__(self, model: Any, processor: Any, instructions: Sequence[str], config: VlmConfig):
        self.config, self.instructions = config, tuple(instructions)
        self.model, self.processor = model, processor
        self._question, answer = config.question_and_answer
        self._answer = _token_of(processor.tokenizer, self._question, answer)
        self.prompt_of(1, "test")

    @classmethod
    def load(
        cls, folder: str, instructions: Sequence[str], config: VlmConfig, device: str = "cpu"
    ) -> "VlmJudge":
        """Load a model of transformers; nothing is downloaded and no code of the folder runs.

        Args:
            folder: as `save_pretrained` of model and processor writes it; weights as safetensors.
            instructions, config: see the class.
            device: torch device.

        Raises:
            CheckpointError: it is no such folder, or weights are missing.
            ConfigError: see the class.
        """
        # Beside a CPU torch transformers' processors cannot be imported without this.
        ensure_torchvision()
        import transformers  # takes seconds, and most runs need none

        transformers.utils.logging.disable_progress_bar()
        local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        if not (Path(folder) / "config.json").is_file():
            raise CheckpointError(f"{folder}: {ASKED_FOR}; it has no config.json")
        try:
            processor = transformers.AutoProcessor.from_pretrained(folder, **local)
        except Exception as error:  # a folder of others may break in any place of the library
            raise CheckpointError(
                f"{folder}: cannot load its processor, which prepares images and text "
                f"({_in_one_line(error)}); copy preprocessor_config.json, tokenizer.json and the "
                "chat template beside the weights"
            ) from error
        if not all(hasattr(processor, part) for part in ("image_processor", "tokenizer")):
            raise CheckpointError(
                f"{folder}: {ASKED_FOR}; its processor, a {type(processor).__name__}, takes no "
                "images"
            )
        kind: Any = transformers.AutoModelForImageTextToText
        try:
            model, told = kind.from_pretrained(
                folder,
                dtype=getattr(torch, config.dtype),
                use_safetensors=True,
                output_loading_info=True,
                **local,
            )
        except Exception as error:
            raise CheckpointError(f"{folder}: {ASKED_FOR}; {_in_one_line(error)}") from error
        if missing := sorted(told["missing_keys"]):
            raise CheckpointError(
                f"{folder}: {len(missing)} weights of {type(model).__name__} are missing, such as "
                f"{missing[0]}; copy all safetensors files"
            )
        return cls(model.to(device).eval(), processor, instructions, config)

    def to(self, device: str) -> "VlmJudge":
        """Move the model to a torch device."""
        self.model.to(device)
        return self

    def watch(self, num_envs: int, chunks: int) -> "VlmWatch":
        """Return what judges a batch of episodes of so many chunks, see `reward.Watch`.

        Raises:
            ConfigError: an episode ends before a verdict is possible.
        """
        if problems := self.config.too_long_for(chunks):
            raise ConfigError(*problems)
        return VlmWatch(self, num_envs)

    @torch.inference_mode()
    def log_probability(
        self, episodes: Sequence[Sequence[np.ndarray]], instructions: Sequence[str]
    ) -> Tensor:
        """Return the log-probability of the answer, float32 [N] on the host, at most 0.

        Args:
            episodes: the frames to show of each of N episodes, oldest first; uint8 [H W 3].
            instructions: what each was to do, N texts.

        Raises:
            SimulatorError: a number that is not finite.
        """
        size = self.config.batch
        parts = [
            self._ask(episodes[i : i + size], instructions[i : i + size])
            for i in range(0, len(episodes), size)
        ]
        found = torch.cat(parts) if parts else torch.zeros(0)
        if not bool(torch.isfinite(found).all()):
            raise SimulatorError(
                "the vision-language model gave log-probabilities that are not finite; try "
                f"reward.vlm.dtype=float32 (it is {self.config.dtype})"
            )
        return found

    def prompt_of(self, frames: int, instruction: str) -> str:
        """Return the text up to the answer, with the model's own marks for so many images.

        It is the beginning of a user's turn, which is not closed: the answer comes next.

        Raises:
            ConfigError: the model's chat template does not have the text.
        """
        text = self._question.replace(BLANK, instruction)
        content = [{"type": "image"}] * frames + [{"type": "text", "text": text}]
        try:
            turn = self.processor.apply_chat_template(
                [{"role": "user", "content": content}], tokenize=False
            )
        except Exception as error:  # templates are programs of others
            raise ConfigError(
                "reward.vlm: the model's chat template cannot place images before a text "
                f"({_in_one_line(error)}); use a model that chats about images"
            ) from error
        before, found, _ = turn.rpartition(text)
        if not found:
            raise ConfigError(
                "reward.vlm.prompt: the model's chat template changes this text, so its end cannot "
                f"be found: {text!r}; leave out line breaks and spaces at the ends"
            )
        return before + found

    def _ask(self, episodes: Sequence[Sequence[np.ndarray]], instructions: Sequence[str]) -> Tensor:
        tokenizer = self.processor.tokenizer
        texts = [
            self.prompt_of(len(frames), instruction)
            for frames, instruction in zip(episodes, instructions, strict=True)
        ]
        # A template may write the token of the beginning already.
        begun = bool(tokenizer.bos_token) and texts[0].startswith(tokenizer.bos_token)
        inputs = self.processor(
            text=texts,
            images=[list(frames) for frames in episodes],
            padding=True,
            padding_side="left",  # so that the answer follows the last place of every row
            add_special_tokens=not begun,
            return_tensors="pt",
        ).to(self.model.device, self.model.dtype)
        logits = self.model(**inputs, use_cache=False, logits_to_keep=1).logits[:, -1]
        return logits.float().log_softmax(-1)[:, self._answer].cpu()


class VlmWatch:
    """Remembers what the environments of a batch have shown, and has it judged; see the module.

    Args:
        judge: the model.
        num_envs: environments of the batch.
    """

    def __init__(self, judge: VlmJudge, num_envs: int):
        self._judge, self._config = judge, judge.config
        self._seen: list[list[np.ndarray]] = [[] for _ in range(num_envs)]
        self._said: list[list[float]] = [[] for _ in range(num_envs)]

    def begin(self, rows: np.ndarray, frames: Tensor) -> None:
        """Begin episodes of environments `rows` [b] at frames [b 3 H W] in [-1, 1]."""
        self.start(rows, to_uint8(frames).cpu().numpy())

    def start(self, rows: np.ndarray, frames: np.ndarray) -> None:
        """Begin episodes of environments `rows` [b] at frames uint8 [b H W 3]."""
        for row, frame in zip(rows, frames, strict=True):
            self._seen[row], self._said[row] = [frame], []

    def judge(self, rows: np.ndarray, frames: Tensor, task: np.ndarray) -> Tensor:
        """Return geometric mean probabilities [b k], see `reward.Watch`; 0 without a verdict."""
        texts = [self._judge.instructions[number] for number in task]
        means = self.means(rows, to_uint8(frames[:, -1]).cpu().numpy(), texts)
        chances = torch.zeros(frames.shape[:2], device=frames.device)
        chances[:, -1] = torch.from_numpy(means).exp()
        return chances

    def means(
        self, rows: np.ndarray, frames: np.ndarray, instructions: Sequence[str]
    ) -> np.ndarray:
        """Return the verdicts after a chunk, mean log-probabilities float32 [b]; -inf = none.

        Args:
            rows: environments [b].
            frames: the last ones of the chunk, uint8 [b H W 3].
            instructions: what each is to do, b texts.
        """
        for row, frame in zip(rows, frames, strict=True):
            self._seen[row].append(frame)
        every = self._config.every
        due = [i for i, row in enumerate(rows) if (len(self._seen[row]) - 1) % every == 0]
        judgements = self._judge.log_probability(
            [self._shown(rows[i]) for i in due], [instructions[i] for i in due]
        )
        means, count = np.full(len(rows), -math.inf, np.float32), self._config.average
        for i, judgement in zip(due, judgements.tolist(), strict=True):
            said = self._said[rows[i]]
            said.append(judgement)
            if len(said) >= count:
                means[i] = sum(said[-count:]) / count
        return means

    def _shown(self, row: int) -> list[np.ndarray]:
        """The first frame, the last one, and others at equal distances between them."""
        seen = self._seen[row]
        places = np.linspace(0, len(seen) - 1, min(self._config.frames, len(seen)))
        # The latest frame counts most, so it is the one that is shown if only one is.
        return [seen[len(seen) - 1 - place] for place in np.rint(places).astype(int)[::-1]]


def _token_of(tokenizer: Any, question: str, answer: str) -> int:
    """Return the number of the token that stands for the answer behind the question.

    Raises:
        ConfigError: there is no such token.
    """
    before = tokenizer(question, add_special_tokens=False)["input_ids"]
    whole = tokenizer(f"{question} {answer}", add_special_tokens=False)["input_ids"]
    tail = whole[len(before) :]
    if whole[:-1] != before or tail[0] == tokenizer.unk_token_id:
        raise ConfigError(
            f"reward.vlm.prompt: its last word must be one token of the model, but {answer!r} is "
            f"{tokenizer.convert_ids_to_tokens(tail)}; end the prompt with another answer"
        )
    return tail[0]


def _in_one_line(error: Exception) -> str:
    return f"{type(error).__name__}: " + " ".join(str(error).split())[:300]

"""Converts task descriptions to padded prompt tokens with the checkpoint's own tokenizer."""

from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int32
from tokenizers import Tokenizer

from policies.openvla_oft.checkpoint_files import read_json, refuse_pointer

PROMPT = "In: What action should the robot take to {task}?\nOut: "
SPACE = "▁"  # the piece that the prompt's trailing space becomes


class PromptTokenizer:
    """Prompts of a policy folder: `[BOS, PAD * k, words .., ':', space]`.

    The padding is between BOS and the words because image patches are inserted after column 0.

    Args:
        folder: Hugging Face folder with tokenizer.json (and config.json for the pad id).
        max_length: columns of every prompt, L.

    Raises:
        FileNotFoundError: no tokenizer.json.
        ValueError: the tokenizer lacks a special token that prompts need, or its file is damaged.

    Source: RLinf openvla_oft `rlinf` version (prompt wording, BOS move).
    """

    def __init__(self, folder: str | Path, max_length: int):
        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            raise FileNotFoundError(
                f"{path}: the policy folder has no tokenizer.json; convert the checkpoint's "
                f"tokenizer.model with the transformers library first"
            )
        self.max_length = max_length
        refuse_pointer(path)
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        # The library raises plain exceptions, with the reason as text.
        except Exception as error:
            raise ValueError(f"{path}: not a whole tokenizer ({error}); copy it again") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.bos_id = self._id("<s>")
        self.space_id = self._id(SPACE)
        self.pad_id = self._pad_id(Path(folder))

    def _id(self, token: str) -> int:
        index = self._tokenizer.token_to_id(token)
        if index is None:
            raise ValueError(f"tokenizer.json has no token {token!r}, which every prompt contains")
        return index

    def _pad_id(self, folder: Path) -> int:
        pad_id = (read_json(folder / "config.json") or {}).get("pad_token_id")
        return self._id("<PAD>") if pad_id is None else pad_id

    def check_vocabulary(self, words: int, rows: int) -> None:
        """Refuse a tokenizer of another model, whose ids would mean other words or none.

        Args:
            words: tokens without added ones; the last of them stand for actions.
            rows: of the embedding.

        Raises:
            ValueError: the sizes differ.
        """
        own = self._tokenizer.get_vocab_size(with_added_tokens=False)
        every = self._tokenizer.get_vocab_size(with_added_tokens=True)
        if own != words or every > rows or not 0 <= self.pad_id < rows:
            raise ValueError(
                f"tokenizer.json: expected {words} tokens (text_config.vocab_size less "
                f"pad_to_multiple_of) and ids below {rows}, got {own}, with added ones {every}, "
                f"padding {self.pad_id}; take the checkpoint's own tokenizer"
            )

    @staticmethod
    def text(task: str) -> str:
        """Return the prompt of a task description, lower-cased."""
        return PROMPT.format(task=task.lower())

    def prompt_ids(self, task: str) -> list[int]:
        """Return the unpadded prompt, BOS first, the trailing space last.

        Raises:
            ValueError: the prompt is longer than `max_length`.
        """
        ids = self._tokenizer.encode(self.text(task), add_special_tokens=False).ids
        ids = [self.bos_id, *ids]
        if ids[-1] != self.space_id:
            raise ValueError(
                f"prompt of task {task!r} must end in token {self.space_id} ({SPACE!r}), got "
                f"{ids[-1]}: tokenizer.json is not the Llama-2 kind that OpenVLA-OFT uses"
            )
        if len(ids) > self.max_length:
            raise ValueError(
                f"task {task!r}: its prompt has {len(ids)} tokens, max_prompt_length is "
                f"{self.max_length}; raise policy.max_prompt_length"
            )
        return ids

    def encode(self, tasks: list[str]) -> tuple[Int32[np.ndarray, "n L"], Bool[np.ndarray, "n L"]]:
        """Return (prompt tokens, prompt mask) of task descriptions, padded to `max_length`."""
        tokens = np.full((len(tasks), self.max_length), self.pad_id, np.int32)
        mask = np.zeros(tokens.shape, bool)
        for row, task in enumerate(tasks):
            ids = self.prompt_ids(task)
            words = self.max_length - (len(ids) - 1)
            tokens[row, 0], tokens[row, words:] = ids[0], ids[1:]
            mask[row, 0], mask[row, words:] = True, True
        return tokens, mask

"""Policy -> Hugging Face folder, the inverse of `import_hf`; fresh folders for small policies."""

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE

from policies.openvla_oft import hf_keys, lora
from policies.openvla_oft.checkpoint_files import (
    FLOATS,
    INDEX,
    SINGLE,
    VALUE_HEAD,
    VALUE_HEAD_FILE,
    CheckpointFiles,
    Entry,
    read_json,
    write_tensors,
)
from policies.openvla_oft.config import OpenVLAOFTConfig
from policies.openvla_oft.model import OpenVLAOFT
from policies.openvla_oft.prompt import PROMPT, SPACE

# Copied from the source folder: tokenizer, processor, statistics, remote code (never run here).
COPIED = ("*.json", "*.model", "*.py", "*.jinja", "*.txt")
NOT_COPIED = ("card.json", "adapter_config.json", "*.index.json")
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>")
SHARD_BYTES = 5 * 10**9
DTYPES = {"float32": "F32", "bfloat16": "BF16"}


def export_policy(
    model: OpenVLAOFT,
    folder: str | Path,
    *,
    source: str | Path,
    like_source: bool = False,
    dtype: str | None = None,
    norm_stats: dict[str, Any] | None = None,
    extra: dict[str, bytes] | None = None,
    max_shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write a policy as the folder that it could have been imported from; return the folder.

    The folder appears complete or not at all. `import(export(x))` has the same bits when the dtype
    on disk is the parameters' own. LoRA adapters are merged. The host holds one tensor at a time.

    Args:
        model: parameters fully addressable from this process.
        source: folder from which config.json, tokenizer, statistics and Python files are copied.
        like_source: arrange tensors as in `source`: the same keys in the same files with the same
            dtypes. Tensors that the policy did not import (an unused value head) are copied. A
            value head that the source lacks is written to a separate file, which no index names.
        dtype: "float32" or "bfloat16" on disk; None = as the parameters are, or as `source` has
            them with `like_source`.
        norm_stats: statistics of further datasets, which the policy was trained with; they are
            added to those of the source and replace those of the same name.
        extra: further files, name -> content.
        max_shard_bytes: size from which a new safetensors file starts; not with `like_source`.

    Raises:
        FileExistsError: `folder` exists already.
        FileNotFoundError: `source` has no config.json, or no weights with `like_source`.
    """
    source = Path(source)
    config = read_json(source / "config.json")
    if config is None:
        raise FileNotFoundError(f"{source / 'config.json'}: the export takes its facts from there")
    files = _copied(source)
    if dtype or not like_source:
        own = dtype or model.config.param_dtype
        config["torch_dtype"] = own
        config.setdefault("text_config", {})["torch_dtype"] = own
        files["config.json"] = _json_bytes(config)
    if norm_stats:
        if config.pop("unnorm_key", None):  # it names the statistics of the source's training
            files["config.json"] = _json_bytes(config)
        statistics = read_json(source / "dataset_statistics.json") or {}
        files["dataset_statistics.json"] = _json_bytes(statistics | norm_stats)
    tensors = _Tensors(model, dtype or model.config.param_dtype)
    if like_source:
        layout = tensors.laid_out_like(CheckpointFiles(source), keep_dtypes=dtype is None)
    else:
        layout = tensors.in_shards(max_shard_bytes)
    return _write_folder(Path(folder), files | (extra or {}), layout, tensors.read)


def _copied(source: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes()
        for pattern in COPIED
        for path in sorted(source.glob(pattern))
        if path.is_file() and not any(path.match(other) for other in NOT_COPIED)
    }


def create_policy_folder(
    model: OpenVLAOFT,
    folder: str | Path,
    *,
    tasks: Sequence[str] = (),
    tokenizer: str | Path | None = None,
    norm_stats: dict[str, Any],
    dtype: str | None = None,
    max_shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write a policy that was not made from a checkpoint as a Hugging Face folder; return it.

    Args:
        model: the policy; its config's `to_hf` becomes config.json.
        tasks: task descriptions that a fresh tokenizer is built for (see `make_tokenizer`); unused
            when `tokenizer` is given.
        tokenizer: an existing tokenizer.json.
        norm_stats: dataset name -> {"action": {"q01": [..], "q99": [..], "mask": [..]}}.
        dtype, max_shard_bytes: as in `export_policy`.

    Raises:
        FileExistsError: `folder` exists already.
    """
    config = model.config
    if tokenizer is None:
        text = make_tokenizer(tasks, config).to_str(pretty=True)
    else:
        text = Path(tokenizer).read_text()
    dtype = dtype or config.param_dtype
    facts = config.to_hf()
    facts["torch_dtype"] = facts["text_config"]["torch_dtype"] = dtype
    files = {
        "config.json": _json_bytes(facts),
        "dataset_statistics.json": _json_bytes(norm_stats),
        "preprocessor_config.json": _json_bytes(config.preprocessor_to_hf()),
        "tokenizer.json": text.encode(),
    }
    tensors = _Tensors(model, dtype)
    return _write_folder(Path(folder), files, tensors.in_shards(max_shard_bytes), tensors.read)


def make_tokenizer(tasks: Sequence[str], config: OpenVLAOFTConfig) -> Tokenizer:
    """Return a small tokenizer with Llama-2's behaviour: BPE, byte fallback, "▁" for spaces.

    Ids: 0 <unk>, 1 <s>, 2 </s>, 3..258 bytes, then single characters and merged pieces, frequent
    ones first; the last `num_bins` ids of the vocabulary stay free for action tokens, and the pad
    token is `config.pad_token_id`. Words of `tasks` become single pieces as far as there is room.

    Raises:
        ValueError: the vocabulary cannot hold bytes, characters and action tokens.
    """
    room = config.first_action_token
    texts = [PROMPT.format(task=task.lower()) for task in tasks] or [PROMPT.format(task="")]
    normalized = [SPACE + text.replace(" ", SPACE) for text in texts]
    vocab = {token: i for i, token in enumerate(SPECIAL_TOKENS)}
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    # Characters outside a prompt's own fall back to bytes.
    for character in sorted(set("".join(normalized)) - {"\n"}):
        vocab[character] = len(vocab)
    if len(vocab) > room:
        raise ValueError(
            f"vocab_size: {config.tokenizer_vocab} tokens cannot hold {len(vocab)} bytes and "
            f"characters beside {config.num_bins} action tokens"
        )
    merges = _learn_merges(normalized, vocab, room)
    for unused in range(len(vocab), config.tokenizer_vocab):
        vocab[f"<unused_{unused}>"] = unused
    tokenizer = Tokenizer(
        BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", vocab["<s>"])]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    special = [AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS]
    tokenizer.add_special_tokens(special)
    if config.pad_token_id == config.tokenizer_vocab:
        tokenizer.add_special_tokens([AddedToken("<PAD>", normalized=False, special=True)])
    return tokenizer


def _learn_merges(texts: list[str], vocab: dict[str, int], room: int) -> list[tuple[str, str]]:
    """Merge the most frequent neighbours within words until `room` is full; extends `vocab`."""
    words: dict[tuple[str, ...], int] = {}
    for text in texts:
        # A word ends before the next space mark or newline. So no piece spans two words, and the
        # trailing space remains a separate token.
        for word in text.replace(SPACE, f" {SPACE}").replace("\n", " ").split():
            words[tuple(word)] = words.get(tuple(word), 0) + 1
    merges = []
    while len(vocab) < room:
        pairs: dict[tuple[str, str], int] = {}
        for word, count in words.items():
            for pair in zip(word, word[1:], strict=False):
                pairs[pair] = pairs.get(pair, 0) + count
        if not pairs:
            break
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        vocab.setdefault("".join(best), len(vocab))
        words = {_merge(word, best): count for word, count in words.items()}
    return merges


def _merge(word: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    merged: list[str] = []
    for piece in word:
        if merged and (merged[-1], piece) == pair:
            merged[-1] += piece
        else:
            merged.append(piece)
    return tuple(merged)


def _json_bytes(content: dict[str, Any]) -> bytes:
    return json.dumps(content, indent=1).encode()


# File name -> key -> dtype and shape.
Layout = dict[str, dict[str, Entry]]


class _Tensors:
    """A policy's tensors by checkpoint key, and how they are divided into files.

    Args:
        dtype: on disk, unless a layout says otherwise.
    """

    def __init__(self, model: OpenVLAOFT, dtype: str):
        self._model, self._dtype = model, DTYPES[dtype]
        self._variables = dict(hf_keys.parameters(model))
        self._places: dict[str, tuple[str, int | None, hf_keys.Source]] = {}
        self._source: CheckpointFiles | None = None
        for path in self._variables:
            if not hf_keys.is_adapter(path):
                source = hf_keys.source_of(path, model.config)
                for index, key in enumerate(source.keys):
                    self._places[key] = path, index if source.stacked else None, source

    def read(self, key: str) -> np.ndarray:
        """Return a tensor in the checkpoint's layout, adapters merged."""
        if key not in self._places:
            assert self._source is not None, key
            return self._source.read(key)
        path, layer, source = self._places[key]
        return source.to_hf(lora.merged(self._model, self._variables, path, layer))

    def _entry(self, key: str, file: str) -> Entry:
        path, _, source = self._places[key]
        return Entry(file, self._dtype, source.hf_shape(self._variables[path].shape))

    def in_shards(self, max_bytes: int) -> Layout:
        """Fill one file after another; a single file gets the name that transformers expects."""
        shards: list[dict[str, Entry]] = [{}]
        size = 0
        for key in self._places:
            entry = self._entry(key, "")
            if shards[-1] and size + entry.nbytes > max_bytes:
                shards.append({})
                size = 0
            shards[-1][key] = entry
            size += entry.nbytes
        if len(shards) == 1:
            return {SINGLE: shards[0]}
        count = len(shards)
        names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        return dict(zip(names, shards, strict=True))

    def laid_out_like(self, source: CheckpointFiles, *, keep_dtypes: bool) -> Layout:
        """Put every tensor into the file that it has in `source`.

        Raises:
            ValueError: the policy holds tensors, other than a value head, that the source lacks.
        """
        self._source = source
        layout: Layout = {}
        for key, entry in source.entries.items():
            kept = keep_dtypes or entry.dtype not in FLOATS or key not in self._places
            own = entry if kept else dataclasses.replace(entry, dtype=self._dtype)
            layout.setdefault(entry.file, {})[key] = own
        new = [key for key in self._places if key not in source.entries]
        if foreign := [key for key in new if not key.startswith(VALUE_HEAD)]:
            raise ValueError(
                f"{source.folder} is not where this policy comes from: it lacks {foreign}"
            )
        for key in new:
            layout.setdefault(VALUE_HEAD_FILE, {})[key] = self._entry(key, VALUE_HEAD_FILE)
        return layout


def _write_folder(
    folder: Path, files: dict[str, bytes], layout: Layout, tensor: Callable[[str], np.ndarray]
) -> Path:
    if folder.exists():
        raise FileExistsError(f"{folder} exists already; remove it or choose another export folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        for name, content in files.items():
            (temporary / name).write_bytes(content)
        for name, wanted in layout.items():
            write_tensors(temporary / name, wanted, tensor)
        if index := _index({name: w for name, w in layout.items() if name != VALUE_HEAD_FILE}):
            (temporary / INDEX).write_bytes(_json_bytes(index))
        temporary.chmod(0o755)
        os.replace(temporary, folder)
    finally:
        if temporary.exists():
            shutil.rmtree(temporary)
    return folder


def _index(layout: Layout) -> dict[str, Any] | None:
    """Return which file holds which key; None if there is only one file, which needs no index."""
    if list(layout) == [SINGLE]:
        return None
    return {
        "metadata": {"total_size": sum(e.nbytes for w in layout.values() for e in w.values())},
        "weight_map": dict(sorted((key, name) for name, w in layout.items() for key in w)),
    }

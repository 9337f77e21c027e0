"""Policy -> Hugging Face folder, the inverse of `import_hf`; fresh folders for small policies."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE

from policies.openvla_oft import hf_keys, lora
from policies.openvla_oft.config import OpenVLAOFTConfig
from policies.openvla_oft.import_hf import INDEX, SINGLE, read_json
from policies.openvla_oft.model import OpenVLAOFT
from policies.openvla_oft.prompt import PROMPT, SPACE

COPIED = (
    "dataset_statistics.json",
    "preprocessor_config.json",
    "processor_config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>")


def export_policy(
    model: OpenVLAOFT,
    folder: str | Path,
    *,
    source: str | Path,
    dtype: str | None = None,
    norm_stats: dict[str, Any] | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> Path:
    """Write a policy as the folder that it could have been imported from; return the folder.

    The folder appears complete or not at all. `import(export(x))` has the same bits when `dtype`
    is the parameters' own. LoRA adapters are merged.

    Args:
        model: parameters fully addressable from this process.
        source: folder whose config.json, tokenizer and statistics go along.
        dtype: "float32" or "bfloat16" on disk; None = as the parameters are.
        norm_stats: statistics of further datasets, added to the source's or in their place.
        max_shard_bytes: size from which a new safetensors file starts.

    Raises:
        FileExistsError: `folder` exists already.
        FileNotFoundError: `source` has no config.json.
    """
    source = Path(source)
    config = read_json(source / "config.json")
    if config is None:
        raise FileNotFoundError(f"{source / 'config.json'}: the export takes its facts from there")
    dtype = dtype or model.config.param_dtype
    config["torch_dtype"] = dtype
    config.setdefault("text_config", {})["torch_dtype"] = dtype
    files = {name: (source / name).read_bytes() for name in COPIED if (source / name).is_file()}
    files["config.json"] = _json_bytes(config)
    if norm_stats:
        statistics = read_json(source / "dataset_statistics.json") or {}
        files["dataset_statistics.json"] = _json_bytes(statistics | norm_stats)
    return _write_folder(model, Path(folder), files, dtype, max_shard_bytes)


def create_policy_folder(
    model: OpenVLAOFT,
    folder: str | Path,
    *,
    tasks: Sequence[str] = (),
    tokenizer: str | Path | None = None,
    norm_stats: dict[str, Any],
    dtype: str | None = None,
) -> Path:
    """Write a policy that comes from no checkpoint as a Hugging Face folder; return the folder.

    Args:
        model: the policy; its config's `to_hf` becomes config.json.
        tasks: task descriptions that a fresh tokenizer is built for (see `make_tokenizer`); unused
            when `tokenizer` is given.
        tokenizer: an existing tokenizer.json.
        norm_stats: dataset name -> {"action": {"q01": [..], "q99": [..], "mask": [..]}}.
        dtype: as in `export_policy`.

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
    return _write_folder(model, Path(folder), files, dtype, 5 * 10**9)


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
        # A word ends before the next space mark or newline, so that no piece spans two words and
        # the trailing space stays a token of its own.
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


def _write_folder(
    model: OpenVLAOFT, folder: Path, files: dict[str, bytes], dtype: str, max_shard_bytes: int
) -> Path:
    if folder.exists():
        raise FileExistsError(f"{folder} exists already; remove it or choose another export folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        for name, content in files.items():
            (temporary / name).write_bytes(content)
        _write_shards(model, temporary, dtype, max_shard_bytes)
        temporary.chmod(0o755)
        os.replace(temporary, folder)
    finally:
        if temporary.exists():
            shutil.rmtree(temporary)
    return folder


def _tensors(model: OpenVLAOFT, dtype: str) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (checkpoint key, tensor), holding one stacked parameter on the host at a time."""
    for path, parameter in lora.merged_parameters(model):
        source = hf_keys.source_of(path, model.config)
        array = parameter.astype(jnp.dtype(dtype))
        for index, key in enumerate(source.keys):
            layer = array[index] if source.stacked else array
            yield key, np.ascontiguousarray(source.to_hf(layer))


def _write_shards(model: OpenVLAOFT, folder: Path, dtype: str, max_shard_bytes: int) -> None:
    names, weight_map, total = [], {}, 0
    shard: dict[str, np.ndarray] = {}

    def flush() -> None:
        name = f"part-{len(names)}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, len(names)))
        names.append(name)
        shard.clear()

    for key, tensor in _tensors(model, dtype):
        if shard and sum(t.nbytes for t in shard.values()) + tensor.nbytes > max_shard_bytes:
            flush()
        shard[key] = tensor
        total += tensor.nbytes
    flush()
    final = [f"model-{i + 1:05d}-of-{len(names):05d}.safetensors" for i in range(len(names))]
    if len(names) == 1:
        final = [SINGLE]
    for old, new in zip(names, final, strict=True):
        (folder / old).chmod(0o644)
        os.replace(folder / old, folder / new)
    if len(names) == 1:
        return
    index = {
        "metadata": {"total_size": total},
        "weight_map": {key: final[i] for key, i in sorted(weight_map.items())},
    }
    (folder / INDEX).write_bytes(_json_bytes(index))

"""Reads a policy from a Hugging Face folder; each tensor is read once and placed at once."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from policies.openvla_oft import hf_keys
from policies.openvla_oft.action_tokens import NORMALIZATIONS, ActionStatistics
from policies.openvla_oft.checkpoint_files import (
    FLOATS,
    VALUE_HEAD,
    CheckpointFiles,
    read_json,
)
from policies.openvla_oft.config import OpenVLAOFTConfig
from policies.openvla_oft.layers import Maker
from policies.openvla_oft.model import OpenVLAOFT, ValueHead
from policies.openvla_oft.peft import LoraAdapter, base_of, find_adapter
from policies.openvla_oft.prompt import PromptTokenizer
from policies.openvla_oft.tensors import Shardings, place

# Buffers in old exports; they are not used.
IGNORED_SUFFIXES = ("rotary_emb.inv_freq",)
NO_NOOPS = "_no_noops"
# (bytes read so far, bytes to read).
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class LoadedPolicy:
    """A policy that was read from a folder.

    Attributes:
        model: the policy, parameters placed by `shardings`.
        tokenizer: prompts in the layout that the model expects.
        notes: what the import did beyond reading (fresh value head, skipped tensors ..).
    """

    model: OpenVLAOFT
    tokenizer: PromptTokenizer
    notes: tuple[str, ...]


def read_norm_stats(folder: str | Path) -> dict[str, Any]:
    """Return the statistics in config.json, overridden by those in dataset_statistics.json."""
    folder = Path(folder)
    return _stats_in_config(folder) | (read_json(folder / "dataset_statistics.json") or {})


def _stats_in_config(folder: Path) -> dict[str, Any]:
    stats = (read_json(folder / "config.json") or {}).get("norm_stats") or {}
    if not isinstance(stats, dict):
        raise ValueError(f"{folder / 'config.json'}: norm_stats: expected an object, got {stats!r}")
    return stats


def read_statistics(
    folder: str | Path, unnorm_key: str, normalization: str = "quantiles"
) -> tuple[ActionStatistics, list[str]]:
    """Return a dataset's action statistics, and notes about them for the user.

    Args:
        unnorm_key: dataset. If only the name with or without "_no_noops" exists, it is used.

    Raises:
        KeyError: no such dataset.
        ValueError: its statistics are incomplete, or config.json names others.
    """
    folder, notes = Path(folder), []
    stats = read_norm_stats(folder)
    told = (read_json(folder / "config.json") or {}).get("unnorm_key")
    if told and told.removesuffix(NO_NOOPS) != unnorm_key.removesuffix(NO_NOOPS):
        raise ValueError(
            f"{folder}: config.json: unnorm_key = {told!r}: expected these statistics, got "
            f"{unnorm_key!r} by policy.unnorm_key; change that, or the field if it is wrong"
        )
    names = (unnorm_key, f"{unnorm_key}{NO_NOOPS}", unnorm_key.removesuffix(NO_NOOPS))
    key = next((name for name in names if name in stats), unnorm_key)
    if key != unnorm_key:
        notes.append(f"statistics {key!r} stand in for {unnorm_key!r}")
    in_config = _stats_in_config(folder)
    if key in in_config and in_config[key] != stats[key]:
        notes.append(f"statistics {key!r}: dataset_statistics.json differs from config.json, wins")
    if key in stats:
        _check_statistics(folder, key, stats[key], NORMALIZATIONS[normalization])
    return ActionStatistics.from_norm_stats(stats, key, normalization), notes


def _check_statistics(folder: Path, key: str, entry: Any, bounds: tuple[str, str]) -> None:
    where, (low_name, high_name) = f"{folder}: statistics {key!r}", bounds
    action = entry.get("action") if isinstance(entry, dict) else None
    if not isinstance(action, dict) or any(name not in action for name in bounds):
        raise ValueError(f"{where} lack action.{low_name} or action.{high_name}")
    try:
        low, high = (np.asarray(action[name], np.float64) for name in bounds)
    except (TypeError, ValueError):
        low = high = np.zeros(())
    if low.ndim != 1 or low.shape != high.shape or not np.isfinite([low, high]).all():
        raise ValueError(
            f"{where}: action.{low_name} and action.{high_name} must be two "
            f"lists of finite numbers, one per dimension of the action"
        )
    if len(swapped := np.flatnonzero(low > high)):
        raise ValueError(
            f"{where}: action.{low_name} lies above action.{high_name} in dimensions "
            f"{swapped.tolist()}, so these actions would be mirrored; are the two swapped?"
        )
    mask = action.get("mask", [])
    if "mask" in action and (
        not isinstance(mask, list)
        or len(mask) != len(low)
        or any(not isinstance(one, bool) and one not in (0, 1) for one in mask)
    ):
        raise ValueError(
            f"{where}: action.mask: expected {len(low)} times true or false, got {mask!r}; "
            "without the entry all dimensions are un-normalised"
        )


def load_config(folder: str | Path, **overrides) -> OpenVLAOFTConfig:
    """Return the configuration of a policy folder; `overrides` are `OpenVLAOFTConfig` fields.

    Raises:
        FileNotFoundError: no config.json.
    """
    folder = Path(folder)
    config = read_json(folder / "config.json")
    if config is None:
        raise FileNotFoundError(_no_policy(folder))
    try:
        return OpenVLAOFTConfig.from_hf(
            config, read_json(folder / "preprocessor_config.json"), **overrides
        )
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


def _no_policy(folder: Path) -> str:
    if adapter := find_adapter(folder):
        return (
            f"{adapter} is a LoRA adapter, no policy of its own; give its base as "
            f"checkpoint ({base_of(adapter)}) and {adapter} as lora_adapter"
        )
    return f"{folder / 'config.json'}: not a Hugging Face policy folder"


def load_policy(
    folder: str | Path,
    *,
    shardings: Shardings | None = None,
    progress: Progress | None = None,
    **options,
) -> LoadedPolicy:
    """Read a policy folder.

    Args:
        folder: config.json, safetensors (sharded or single), tokenizer.json, statistics.
        shardings: (path such as "llama/layers/q_proj/kernel", shape) -> where that parameter lies.
            The host holds one tensor and its cast at a time (`tensors.place`). Default: the
            default device.
        progress: called after every tensor.
        options: see `check_policy`.

    Raises:
        ValueError: a weight is not finite or its file is damaged.
        FileNotFoundError, KeyError, ValueError: as `check_policy`, before any weight is read.
    """
    reader, tokenizer, notes = _open(folder, **options)
    model = reader.read(shardings, progress)
    return LoadedPolicy(model, tokenizer, notes=(*notes, *reader.notes))


def check_policy(folder: str | Path, *, tasks: Sequence[str] = (), **options) -> None:
    """Raise what `load_policy` raises before it reads a weight.

    Call it before slow work, so that a wrong folder is reported at once.

    Args:
        folder: as of `load_policy`.
        tasks: instructions that will be asked for.
        options: those of `_open`, below.

    Raises:
        FileNotFoundError: a file is missing.
        KeyError: `unnorm_key` is not among the statistics.
        ValueError: tensors are missing, unexpected, not floats or of another shape, or the adapter
            does not fit; all are listed at once. Or a file is damaged, or the prompt of a task is
            longer than `max_prompt_length`.
    """
    _, tokenizer, _ = _open(folder, **options)
    tokenizer.encode(list(tasks))


def _open(
    folder: str | Path,
    *,
    unnorm_key: str,
    max_prompt_length: int = 128,
    lora_adapter: str | Path = "",
    normalization: str = "quantiles",
    seed: int = 0,
    **fields,
) -> tuple["_Reader", PromptTokenizer, list[str]]:
    """Return the reader of a folder's weights, its tokenizer, and notes for the user.

    Args:
        folder: see `load_policy`.
        unnorm_key: dataset whose statistics un-normalise actions; "" leaves them in -1..1.
        max_prompt_length: tokens that prompts are padded to.
        lora_adapter: PEFT folder, "" = none. Merged in float32 while reading; with `lora_rank` > 0
            its pairs become the policy's adapters instead, which train on.
        normalization: see `ActionStatistics.from_norm_stats`.
        seed: for parameters that the folder lacks: new adapters, and a value head if `value_type`
            asks for one. A value head that is not asked for is skipped. Both are noted.
        fields: of `OpenVLAOFTConfig` (value_type, param_dtype, remat, lora_rank ..).
    """
    folder, notes, statistics = Path(folder), [], None
    config = load_config(folder, max_prompt_length=max_prompt_length, **fields)
    if unnorm_key:
        statistics, notes = read_statistics(folder, unnorm_key, normalization)
        if "action_dim" not in fields:
            fields["action_dim"] = len(statistics.low)
            config = load_config(folder, max_prompt_length=max_prompt_length, **fields)
    tokenizer = PromptTokenizer(folder, max_prompt_length)
    tokenizer.check_vocabulary(config.tokenizer_vocab, config.vocab_size)
    adapter = LoraAdapter(lora_adapter) if lora_adapter else None
    return _Reader(CheckpointFiles(folder), config, statistics, adapter, seed), tokenizer, notes


def abstract_model(
    config: OpenVLAOFTConfig, statistics: ActionStatistics | None = None
) -> OpenVLAOFT:
    """Return a model of shapes only, without memory."""
    return nnx.eval_shape(lambda: OpenVLAOFT(config, statistics, rngs=None))


class _Reader:
    """Finds which tensors a model needs, and reads them.

    Raises:
        ValueError: folder, configuration and adapter do not fit together.
    """

    def __init__(self, files: CheckpointFiles, config, statistics, adapter, seed):
        self.files, self.config, self.adapter = files, config, adapter
        _check_layers(files, config)
        self._graphdef, self._state = nnx.split(abstract_model(config, statistics))
        self._variables = dict(hf_keys.parameters(self._state))
        self._sources = {path: hf_keys.source_of(path, config) for path in self._variables}
        self.notes = list(files.notes)
        self._fresh, skipped = self._fresh_and_skipped(seed)
        expected = {
            key: source.hf_shape(self._variables[path].shape)
            for path, source in self._sources.items()
            if path not in self._fresh
            for key in source.keys
        }
        # The pairs of an adapter that trains are read as they are; all others are merged.
        self._pairs = {k: s for k, s in expected.items() if k.startswith(hf_keys.PEFT_PREFIX)}
        weights = {key: shape for key, shape in expected.items() if key not in self._pairs}
        _report(files, weights, skipped, None if self._pairs else adapter)
        if adapter and self._pairs:
            adapter.check_continues(self._pairs, config)
        if adapter and (note := adapter.other_base(files.folder)):
            self.notes.append(note)
        self._total = sum(files.entries[key].nbytes for key in weights)

    def _fresh_and_skipped(self, seed) -> tuple[dict[str, nnx.Variable], set[str]]:
        """Return parameters that are in no file, and tensors that belong to no parameter."""
        config, keys = self.config, self.files.keys
        fresh: dict[str, nnx.Variable] = {}
        skipped = {key for key in keys if key.endswith(IGNORED_SUFFIXES)}
        heads = {key for key in keys if key.startswith(VALUE_HEAD)}
        if config.num_values and not heads:
            self.notes.append(
                f"the folder has no value head: a {config.value_type} one starts fresh"
            )
            fresh = _fresh_value_head(config, seed)
        if heads and not config.num_values:
            self.notes.append('the folder has a value head and value_type is "none": skipped')
            skipped |= heads
        adapters = {p: v for p, v in self._variables.items() if hf_keys.is_adapter(p)}
        if adapters and not self.adapter:
            count = len(adapters) // 2
            self.notes.append(f"{count} LoRA adapters of rank {config.lora_rank} start fresh")
            fresh |= _fresh_adapters(adapters, config, seed)
        return fresh, skipped

    def read(self, shardings: Shardings | None, progress: Progress | None) -> OpenVLAOFT:
        """Return the model, its parameters placed one after another."""
        done = 0

        def tensors(path: str) -> Iterator[np.ndarray]:
            nonlocal done
            if path in self._fresh:
                yield np.asarray(self._fresh[path][...])
                return
            for key in self._sources[path].keys:
                yield self._tensor(self._sources[path], key)
                if progress and key not in self._pairs:
                    done += self.files.entries[key].nbytes
                    progress(done, self._total)

        values = {
            path: place(
                tensors(path),
                variable.shape,
                variable.dtype,
                shardings(path, variable.shape) if shardings else None,
                stacked=self._sources[path].stacked and path not in self._fresh,
            )
            for path, variable in self._variables.items()
        }
        filled = nnx.from_flat_state(
            [
                (path, variable.replace(values[hf_keys.path_name(path)]))
                for path, variable in nnx.to_flat_state(self._state)
            ]
        )
        return nnx.merge(self._graphdef, filled)

    def _tensor(self, source: hf_keys.Source, key: str) -> np.ndarray:
        """Return a tensor in our layout, an adapter merged into it where there is one."""
        adapter = self.adapter
        if adapter and key in self._pairs:
            return source.from_hf(adapter.read(key))
        weight = self.files.read(key)
        return source.from_hf(adapter.merge(key, weight) if adapter and not self._pairs else weight)


def _check_layers(files: CheckpointFiles, config: OpenVLAOFTConfig) -> None:
    """Refuse more layers than there can be, before anything is made for each of them."""
    layers = {
        "text_config.num_hidden_layers": config.num_layers,
        "depth of the first tower": config.dinov2.depth,
        "depth of the second tower": config.siglip.depth,
    }
    for name, count in layers.items():
        if count > len(files.keys):
            raise ValueError(
                f"{files.folder}: config.json: {name} is {count}, and the folder holds "
                f"{len(files.keys)} tensors, fewer than one for each layer"
            )


def _fresh_value_head(config, seed) -> dict[str, nnx.Variable]:
    """Parameters of a freshly initialised value head; only the head is computed."""
    head = ValueHead(config, Maker.create(config, nnx.Rngs(seed)))
    return {f"value_head/{path}": variable for path, variable in hf_keys.parameters(head)}


def _fresh_adapters(variables, config, seed) -> dict[str, nnx.Variable]:
    """New adapters: A is drawn as in `lora.Adapter`, B is zero."""
    make = Maker(jnp.dtype("float32"), np.random.default_rng(seed))
    return {
        path: (
            make.normal(variable.shape, 1 / config.lora_rank)
            if path.endswith("/a")
            else make.constant(variable.shape, 0.0)
        )
        for path, variable in variables.items()
    }


def _report(files: CheckpointFiles, expected, skipped: set[str], adapter) -> None:
    """Raise one readable list of everything that does not fit."""
    held = files.entries
    here = sorted(set(expected) & files.keys)
    sections = {
        "missing tensors": sorted(set(expected) - files.keys - set(files.absent)),
        "unexpected tensors": sorted(files.keys - set(expected) - skipped),
        "tensors of another shape": [
            f"{key}: expected {expected[key]}, got {held[key].shape}"
            for key in here
            if held[key].shape != expected[key]
        ],
        f"tensors of another dtype than {', '.join(FLOATS)}": [
            f"{key}: {held[key].dtype}" for key in here if held[key].dtype not in FLOATS
        ],
        "tensors that the index names and no file holds": files.absent,
        "LoRA pairs that do not fit": adapter.misfits(expected) if adapter else [],
    }
    lines = [line for title, names in sections.items() for line in _section(title, names)]
    lines += _advice(sections["unexpected tensors"], set(sections["missing tensors"]))
    if lines:
        raise ValueError(
            f"{files.folder}: the weights do not fit config.json and what was asked for:\n"
            + "\n".join(lines)
        )


def _advice(unexpected: list[str], missing: set[str]) -> list[str]:
    """What names that nobody knows suggest."""
    lines = []
    if any(".lora_" in key for key in unexpected):
        lines.append(
            "  LoRA pairs lie among the weights: merge them where they were trained, with PEFT's "
            "merge_and_unload, and save again"
        )
    ends = [key.split(".") for key in unexpected]
    prefixes = {
        ".".join(parts[:n]) + "."
        for parts in ends
        for n in range(1, len(parts))
        if ".".join(parts[n:]) in missing
    }
    if prefixes:
        lines.append(
            f"  names begin with {sorted(prefixes)}, which is not known here: rename the tensors. "
            f"Left out are {[*hf_keys.PREFIXES, *hf_keys.INSERTED]}"
        )
    return lines


def _section(title: str, entries: list[str], limit: int = 12) -> list[str]:
    if not entries:
        return []
    more = [f"    .. and {len(entries) - limit} more"] if len(entries) > limit else []
    return [f"  {title} ({len(entries)}):", *(f"    {e}" for e in entries[:limit]), *more]

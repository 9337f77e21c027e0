"""Hugging Face folder -> policy. Each tensor is read once and handed on as it is read."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import safe_open

from policies.openvla_oft import hf_keys
from policies.openvla_oft.action_tokens import ActionStatistics
from policies.openvla_oft.config import OpenVLAOFTConfig
from policies.openvla_oft.layers import Maker
from policies.openvla_oft.model import OpenVLAOFT, ValueHead
from policies.openvla_oft.peft import LoraAdapter
from policies.openvla_oft.prompt import PromptTokenizer

# Buffers that old exports hold and nobody reads.
IGNORED_SUFFIXES = ("rotary_emb.inv_freq",)
VALUE_HEAD = "value_head."
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


@dataclass(frozen=True)
class LoadedPolicy:
    """What a policy folder gives.

    Attributes:
        model: the policy, parameters placed by `put`.
        tokenizer: prompts in the layout that the model expects.
        notes: what the import did beyond reading (fresh value head, skipped tensors ..).
    """

    model: OpenVLAOFT
    tokenizer: PromptTokenizer
    notes: tuple[str, ...]


class CheckpointFiles:
    """The safetensors of a folder, by key.

    Raises:
        FileNotFoundError: no weights, or a shard that the index names is missing.
    """

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        if (folder / INDEX).is_file():
            weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
        elif (folder / SINGLE).is_file():
            with safe_open(folder / SINGLE, "numpy") as file:
                weight_map = dict.fromkeys(file.keys(), SINGLE)
        else:
            raise FileNotFoundError(f"{folder}: neither {INDEX} nor {SINGLE} is there")
        missing = sorted({name for name in weight_map.values() if not (folder / name).is_file()})
        if missing:
            raise FileNotFoundError(f"{folder}: {INDEX} names files that are not there: {missing}")
        self._files = {name: safe_open(folder / name, "numpy") for name in weight_map.values()}
        self._shard = weight_map
        held = {key for name, file in self._files.items() for key in file.keys()}  # noqa: SIM118
        self.keys = set(weight_map) & held
        self.absent = sorted(set(weight_map) - held)

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        return tuple(self._files[self._shard[key]].get_slice(key).get_shape())

    def read(self, key: str) -> np.ndarray:
        """One tensor, in its own dtype."""
        return self._files[self._shard[key]].get_tensor(key)


def read_json(path: Path) -> dict[str, Any] | None:
    """Content of a JSON file, None if there is no such file."""
    return json.loads(path.read_text()) if path.is_file() else None


def read_norm_stats(folder: str | Path) -> dict[str, Any]:
    """Return the folder's statistics: config.json's, dataset_statistics.json's merged over."""
    folder = Path(folder)
    config = read_json(folder / "config.json") or {}
    return config.get("norm_stats", {}) | (read_json(folder / "dataset_statistics.json") or {})


def load_config(folder: str | Path, **overrides) -> OpenVLAOFTConfig:
    """Return the configuration of a policy folder; `overrides` are `OpenVLAOFTConfig` fields.

    Raises:
        FileNotFoundError: no config.json.
    """
    folder = Path(folder)
    config = read_json(folder / "config.json")
    if config is None:
        raise FileNotFoundError(f"{folder / 'config.json'}: not a Hugging Face policy folder")
    return OpenVLAOFTConfig.from_hf(
        config, read_json(folder / "preprocessor_config.json"), **overrides
    )


def load_policy(
    folder: str | Path,
    *,
    unnorm_key: str,
    value_type: str = "none",
    param_dtype: str = "float32",
    compute_dtype: str = "float32",
    max_prompt_length: int = 128,
    chunk: int = 8,
    num_images: int = 1,
    lora_adapter: str | Path = "",
    normalization: str = "quantiles",
    put: Callable[[str, np.ndarray], jax.Array] | None = None,
    seed: int = 0,
    **overrides,
) -> LoadedPolicy:
    """Read a policy folder.

    Args:
        folder: config.json, safetensors (sharded or single), tokenizer.json, statistics.
        unnorm_key: dataset whose statistics un-normalise actions; "" leaves them in -1..1.
        value_type: see `OpenVLAOFTConfig`. A value head that the folder lacks is initialised from
            `seed`; one that it has and nobody asked for is skipped. Both are noted.
        lora_adapter: PEFT folder, "" = none. Merged in float32 while reading; with `lora_rank` > 0
            (an override) its pairs become the policy's adapters instead, which train on.
        normalization: see `ActionStatistics.from_norm_stats`.
        put: (path such as "llama/layers/q_proj/kernel", host array in `param_dtype`) -> device
            array; the trainer places each parameter on its shards here. Host memory peaks at one
            stacked parameter (all layers of one weight). Default: the default device.
        overrides: further fields of `OpenVLAOFTConfig` (remat, scan_layers, lora_rank ..). New
            adapters start from `seed`.

    Raises:
        FileNotFoundError: a file is missing.
        KeyError: `unnorm_key` is not among the statistics.
        ValueError: tensors are missing, unexpected or of another shape; all are listed at once.
    """
    folder = Path(folder)
    statistics = None
    if unnorm_key:
        statistics = ActionStatistics.from_norm_stats(
            read_norm_stats(folder), unnorm_key, normalization
        )
        overrides = {"action_dim": len(statistics.low)} | overrides
    config = load_config(
        folder,
        value_type=value_type,
        param_dtype=param_dtype,
        compute_dtype=compute_dtype,
        max_prompt_length=max_prompt_length,
        chunk=chunk,
        num_images=num_images,
        **overrides,
    )
    tokenizer = PromptTokenizer(folder, max_prompt_length)
    adapter = LoraAdapter(lora_adapter) if lora_adapter else None
    model, notes = _read_model(
        CheckpointFiles(folder), folder, config, statistics, adapter, put, seed
    )
    return LoadedPolicy(model=model, tokenizer=tokenizer, notes=tuple(notes))


def abstract_model(
    config: OpenVLAOFTConfig, statistics: ActionStatistics | None = None
) -> OpenVLAOFT:
    """Return a model of shapes only, without memory."""
    return nnx.eval_shape(lambda: OpenVLAOFT(config, statistics, rngs=None))


def _read_model(files, folder, config, statistics, adapter, put, seed):
    graphdef, state = nnx.split(abstract_model(config, statistics))
    variables = dict(hf_keys.parameters(state))
    sources = {path: hf_keys.source_of(path, config) for path in variables}
    notes = []
    fresh: dict[str, nnx.Variable] = {}
    has_value_head = any(key.startswith(VALUE_HEAD) for key in files.keys)
    if config.num_values and not has_value_head:
        notes.append(f"the folder has no value head: a {config.value_type} one starts fresh")
        fresh = _fresh_value_head(config, seed)
    adapters = {path: source for path, source in sources.items() if hf_keys.is_adapter(path)}
    if adapters and not adapter:
        notes.append(f"{len(adapters) // 2} LoRA adapters of rank {config.lora_rank} start fresh")
        fresh |= _fresh_adapters({path: variables[path] for path in adapters}, config, seed)
    skipped = {key for key in files.keys if key.endswith(IGNORED_SUFFIXES)}
    if has_value_head and not config.num_values:
        notes.append('the folder has a value head and value_type is "none": skipped')
        skipped |= {key for key in files.keys if key.startswith(VALUE_HEAD)}
    expected = {
        key: source.hf_shape(variables[path].shape)
        for path, source in sources.items()
        if path not in fresh
        for key in source.keys
    }
    # Pairs of an adapter that goes on training are read as they are, all others are merged.
    pairs = {key: shape for key, shape in expected.items() if key.startswith(hf_keys.PEFT_PREFIX)}
    _report(files, folder, _without(expected, pairs), skipped, None if adapters else adapter)
    if pairs:
        adapter.check_continues(pairs, config)

    place = put or (lambda path, array: jnp.asarray(array))

    def tensor(source: hf_keys.Source, key: str) -> np.ndarray:
        if key in pairs:
            return source.from_hf(adapter.read(key))
        weight = files.read(key)
        return source.from_hf(adapter.merge(key, weight) if adapter and not pairs else weight)

    values = {}
    for path, variable in variables.items():
        source = sources[path]
        if path in fresh:
            array = np.asarray(fresh[path][...])
        else:
            array = np.empty(variable.shape, variable.dtype)
            for index, key in enumerate(source.keys):
                array[index if source.stacked else ...] = tensor(source, key)
        values[path] = place(path, array)
    filled = nnx.from_flat_state(
        [
            (path, variable.replace(values[hf_keys.path_name(path)]))
            for path, variable in nnx.to_flat_state(state)
        ]
    )
    return nnx.merge(graphdef, filled), notes


def _fresh_value_head(config, seed) -> dict[str, nnx.Variable]:
    """Parameters of a value head as a fresh model has them; only the head is computed."""
    head = ValueHead(config, Maker.create(config, nnx.Rngs(seed)))
    return {f"value_head/{path}": variable for path, variable in hf_keys.parameters(head)}


def _fresh_adapters(variables, config, seed) -> dict[str, nnx.Variable]:
    """New adapters: A as `lora.Adapter` draws it, B zero."""
    make = Maker(jnp.dtype("float32"), np.random.default_rng(seed))
    return {
        path: (
            make.normal(variable.shape, 1 / config.lora_rank)
            if path.endswith("/a")
            else make.constant(variable.shape, 0.0)
        )
        for path, variable in variables.items()
    }


def _without(entries: dict, others: dict) -> dict:
    return {key: value for key, value in entries.items() if key not in others}


def _report(files, folder, expected, skipped, adapter) -> None:
    """Raise one readable list of everything that does not fit."""
    lines = []
    missing = sorted(set(expected) - files.keys)
    unexpected = sorted(files.keys - set(expected) - skipped)
    wrong = [
        f"{key}: expected {shape}, got {files.shape(key)}"
        for key, shape in sorted(expected.items())
        if key in files.keys and files.shape(key) != shape
    ]
    if adapter:
        lines += _section(
            "LoRA modules that the policy does not have",
            sorted(m for m in adapter.modules if f"{m}.weight" not in expected),
        )
    lines += _section("missing tensors", missing)
    lines += _section("unexpected tensors", unexpected)
    lines += _section("tensors of another shape", wrong)
    lines += _section("tensors that the index names and no file holds", files.absent)
    if lines:
        raise ValueError(
            f"{folder}: the weights do not fit config.json and the requested value head:\n"
            + "\n".join(lines)
        )


def _section(title: str, entries: list[str], limit: int = 12) -> list[str]:
    if not entries:
        return []
    more = [f"    .. and {len(entries) - limit} more"] if len(entries) > limit else []
    return [f"  {title} ({len(entries)}):", *(f"    {e}" for e in entries[:limit]), *more]

"""The part of the OpenVLA-OFT golden vectors that needs no forward pass.

Prompts, image preprocessing, token tables, key lists of the real checkpoint, fresh value heads.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from flax import nnx
from safetensors.numpy import load_file

from policies.openvla_oft import action_tokens, hf_keys, preprocess
from policies.openvla_oft.config import OpenVLAOFTConfig
from policies.openvla_oft.import_hf import abstract_model, load_config, read_norm_stats
from policies.openvla_oft.layers import Maker
from policies.openvla_oft.model import ValueHead
from policies.openvla_oft.peft import LoraAdapter
from policies.openvla_oft.prompt import PromptTokenizer
from tests.parity import jpeg
from tests.parity.report import VectorResult, compare

PREPROCESS = re.compile(r"preprocess_\d+")  # one block per image size
VALUE_HEAD_INIT = "value_head_init_statistics_when_absent_from_checkpoint"
# The manifest allows a level at rounding ties, which are rare.
MAX_TIES_FRACTION = 0.01


def vectors(folder: Path, manifest: dict) -> set[str]:
    """Names of the golden outputs beside the manifest's tensors."""
    names = {"prompts", "prompt_token_counts_without_padding"} & set(manifest)
    for block in filter(PREPROCESS.fullmatch, manifest):
        names |= {f"{block}/{name}" for name in manifest[block] if name != "raw"}
    names |= {f"value_head_init/{name}" for name in manifest.get(VALUE_HEAD_INIT, {})}
    if (folder / "real_7b" / "keys.json").is_file():
        names |= {"real_7b/keys", "real_7b/total_parameters"}
        names |= set(_optional_value_heads(folder))
    if (folder / "lora_info.json").is_file():
        names.add("lora_info/trainable_parameter_names")
    return names


def check(folder: Path, manifest: dict) -> Iterator[VectorResult]:
    """Compare them, and the token tables among the manifest's tensors."""
    yield from _prompts(folder, manifest)
    yield from _tables(folder, manifest)
    for block in filter(PREPROCESS.fullmatch, manifest):
        yield from _preprocessing(folder, manifest, block)
    yield from _value_head_init(folder, manifest)
    if (folder / "real_7b" / "keys.json").is_file():
        yield from _real_keys(folder)
    if (folder / "lora_info.json").is_file():
        yield _lora_names(folder)


def _equal(name: str, ours, golden) -> VectorResult:
    """Compare things that are no arrays."""
    same = ours == golden
    return VectorResult(name, 0.0 if same else np.inf, 0.0, same, "" if same else str(ours)[:200])


def _prompts(folder: Path, manifest: dict) -> Iterator[VectorResult]:
    tasks = manifest["task_descriptions"]
    tokenizer = PromptTokenizer(folder / "checkpoint", manifest["settings"]["max_prompt_length"])
    if "prompts" in manifest:
        yield _equal("prompts", [tokenizer.text(task) for task in tasks], manifest["prompts"])
    counts = "prompt_token_counts_without_padding"
    if counts in manifest:
        yield _equal(counts, [len(tokenizer.prompt_ids(t)) for t in tasks], manifest[counts])
    tokens, mask = tokenizer.encode(tasks)
    for name, ours in (("inputs/input_ids", tokens), ("inputs/attention_mask", mask)):
        if name in manifest["tensors"]:
            golden = load_file(folder / manifest["tensors"][name]["file"])[name]
            yield compare(name, ours, golden, atol=0.0)


def _tables(folder: Path, manifest: dict) -> Iterator[VectorResult]:
    names = [name for name in manifest["tensors"] if name.startswith("tables/")]
    if not names:
        return
    statistics = action_tokens.ActionStatistics.from_norm_stats(
        read_norm_stats(folder / "checkpoint"), manifest["settings"]["unnorm_key"]
    )
    bins = load_config(folder / "checkpoint").num_bins
    ours = {
        "tables/token_to_bin_centre": action_tokens.bin_centres(bins),
        "tables/token_to_action": action_tokens.action_table(statistics, bins),
    }
    atol = manifest["tolerances"]["actions"]["atol"]
    for name in names:
        golden = load_file(folder / manifest["tensors"][name]["file"])[name]
        yield compare(name, ours[name], golden, atol=atol)


def _levels(name: str, ours, golden, atol: float = 1.0) -> VectorResult:
    return compare(name, np.asarray(ours).astype(int), golden.astype(int), atol=atol)


def compare_pixels(
    name: str, ours, golden, config: OpenVLAOFTConfig, *, atol: float
) -> VectorResult:
    """Compare normalised pixels [.. 6n H W]: one uint8 level apart at a few, equal elsewhere."""
    std = np.tile([*config.dinov2.std, *config.siglip.std], golden.shape[-3] // 6)
    level = 1 / 255 / std[:, None, None]
    error = np.abs(np.asarray(ours) - golden)
    ties = error > atol
    if ties.any() and ties.mean() <= MAX_TIES_FRACTION:
        ok = bool((error <= np.where(ties, level + atol, atol)).all())
        note = f"{ties.sum()} values at a rounding tie, one level apart"
        return VectorResult(name, float(error.max()), float(level.max() + atol), ok, note)
    return compare(name, ours, golden, atol=atol)


def _preprocessing(folder: Path, manifest: dict, block: str) -> Iterator[VectorResult]:
    """Each step from the golden result of the step before, so that errors do not add up."""
    entries, golden = manifest[block], {}
    for file in {entry["file"] for entry in entries.values()}:
        golden |= load_file(folder / file)
    raw = golden["raw"]
    base = load_config(folder / "checkpoint")

    def config_of(size: int, **changes) -> OpenVLAOFTConfig:
        # The patch size only has to divide the image; no patches are cut here.
        sizes = {"image_size": size, "patch_size": size}
        return OpenVLAOFTConfig(dinov2=base.dinov2, siglip=base.siglip, **sizes, **changes)

    def processed(image: np.ndarray, config: OpenVLAOFTConfig) -> np.ndarray:
        pixels = preprocess.pixel_values(image[None, None], config)
        return np.moveaxis(np.asarray(pixels[0, 0]), -1, 0)

    for name in entries:
        target, full = golden.get(name), f"{block}/{name}"
        if name == "rlinf/resized_uint8":
            yield _levels(full, preprocess.resize(raw, target.shape[0]), target)
        elif name == "pil/resized_uint8":
            yield _levels(full, preprocess.resize_fixed_point(raw, target.shape[0]), target)
        elif name.endswith("/pixel_values"):
            rule = "fixed_point" if name.startswith("pil/") else "float"
            config = config_of(target.shape[-1], resize_rule=rule)
            atol = manifest["tolerances"]["pixel_values"]["atol"]
            yield compare_pixels(full, processed(raw, config), target, config, atol=atol)
        elif name.startswith("tf/tf_center_crop_from_"):
            config = config_of(target.shape[0], center_crop=True)
            yield _levels(full, preprocess.center_crop(raw, config.image_size), target)
        elif name.startswith("tf/jpeg_roundtrip"):
            yield _levels(full, jpeg.round_trip(raw), target)
        elif name.startswith("tf/tf_lanczos3"):
            source = next(golden[key] for key in golden if key.startswith("tf/jpeg_roundtrip"))
            yield _levels(full, preprocess.resize(source, target.shape[0], "lanczos3"), target)
        elif name.startswith("tf/tf_center_crop_after_lanczos3"):
            source = next(golden[key] for key in golden if key.startswith("tf/tf_lanczos3"))
            yield _levels(full, preprocess.center_crop(source, target.shape[0]), target)
        elif name == "crop_then_processor/pixel_values_checksum":
            source = next(k for k in golden if k.startswith("tf/tf_center_crop_from_"))
            config = config_of(golden[source].shape[0])
            sums = processed(golden[source], config).astype(np.float64).sum((1, 2))
            # Each of the summed values may be off by the tolerance of pixel values.
            atol = 1e-6 * golden[source][..., 0].size
            yield compare(full, sums, target, atol=atol)


def _value_head_init(folder: Path, manifest: dict) -> Iterator[VectorResult]:
    """Mean and deviation of a fresh head against the reference's, within sampling noise."""
    statistics = manifest.get(VALUE_HEAD_INIT, {})
    if not statistics:
        return
    settings = manifest["settings"]
    config = load_config(
        folder / "checkpoint",
        value_type="chunk_level" if settings.get("value_type") == "chunk_level" else "action_level",
        chunk=settings["num_action_chunks"],
    )
    head = ValueHead(config, Maker.create(config, nnx.Rngs(0)))
    ours = {}
    for path, variable in hf_keys.parameters(head):
        key = hf_keys.source_of(f"value_head/{path}", config).keys[0]
        ours[key.removeprefix("value_head.")] = np.asarray(variable[...], np.float64)
    for name, golden in statistics.items():
        array = ours[name]
        sampling_error = 6 * golden["std"] / np.sqrt(array.size)
        yield compare(
            f"value_head_init/{name}",
            [array.mean(), array.std()],
            [golden["mean"], golden["std"]],
            atol=sampling_error,
        )


def _expected_tensors(config: OpenVLAOFTConfig) -> dict[str, list[int]]:
    tensors = {}
    for path, variable in hf_keys.parameters(abstract_model(config)):
        source = hf_keys.source_of(path, config)
        shape = list(source.hf_shape(variable.shape))
        tensors |= dict.fromkeys(source.keys, shape)
    return tensors


def _optional_value_heads(folder: Path) -> dict[str, dict]:
    keys = json.loads((folder / "real_7b" / "keys.json").read_text())
    return {
        f"real_7b/{name}": shapes
        for name, shapes in keys.items()
        if name.startswith("optional_value_head_")
    }


def _real_keys(folder: Path) -> Iterator[VectorResult]:
    """Names and shapes of the real checkpoint's tensors, from our model's shapes alone."""
    golden = json.loads((folder / "real_7b" / "keys.json").read_text())
    values = json.loads((folder / "real_7b" / "config_values.json").read_text())
    hf = values["config_json_as_saved"]
    config = OpenVLAOFTConfig.from_hf(hf)
    ours = _expected_tensors(config)
    shapes = {key: entry["shape"] for key, entry in golden["tensors"].items()}
    wrong = {key for key in ours | shapes if ours.get(key) != shapes.get(key)}
    name = "real_7b/keys"
    yield VectorResult(name, len(wrong), 0.0, not wrong, str(sorted(wrong)[:4]) if wrong else "")
    total = sum(int(np.prod(shape)) for shape in ours.values())
    yield _equal("real_7b/total_parameters", total, golden["total_parameters"])
    for name, expected in _optional_value_heads(folder).items():
        value_type = name.removeprefix("real_7b/optional_value_head_")
        config = OpenVLAOFTConfig.from_hf(hf, value_type=value_type)
        ours = _expected_tensors(config)
        expected = {
            key: [config.chunk if size == "num_action_chunks" else size for size in shape]
            for key, shape in expected.items()
        }
        yield _equal(name, {key: ours.get(key) for key in expected}, expected)


def _lora_names(folder: Path) -> VectorResult:
    """The adapter's modules against the names of the reference's trainable parameters."""
    info = json.loads((folder / "lora_info.json").read_text())
    golden = {
        name.removeprefix("base_model.model.").split(".lora_")[0]
        for name in info["trainable_parameter_names"]
        if ".lora_" in name
    }
    ours = LoraAdapter(folder / "lora_adapter").modules
    return _equal("lora_info/trainable_parameter_names", sorted(ours), sorted(golden))

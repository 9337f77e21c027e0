"""The files of a checkpoint folder: where each tensor is; tensors are read and written one by one.

No file stays mapped. The pages of a tensor are released with it, so the peak resident size of a
process (`ru_maxrss`) is the memory that it really holds.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from policies.openvla_oft.hf_keys import plain_key

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
VALUE_HEAD_FILE = "value_head.safetensors"
VALUE_HEAD = "value_head."
# Types that weights may have; tensors of other types (counters, quantised ones) are not weights.
FLOATS = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
BYTES = {"BF16": 2, "F16": 2, "F32": 4}
LFS = b"version https://git-lfs"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# Networks that OpenVLA-OFT saves beside the weights: file prefix -> what it means.
OTHER_HEADS = {
    "action_head": "an action head: L1 regression or diffusion, so the token head is untrained",
    "noisy_action_projector": "the input layer of a diffusion head",
    "proprio_projector": "an input layer for the robot's state, which this policy does not read",
    "vision_backbone--": "a vision backbone with FiLM layers, which the shards lack",
}


@dataclass(frozen=True)
class Entry:
    """One tensor on disk: its file, dtype as safetensors names it, and shape."""

    file: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size of the tensor's data."""
        return int(np.prod(self.shape, dtype=np.int64)) * BYTES.get(self.dtype, 0)


def read_json(path: Path) -> dict[str, Any] | None:
    """Content of a JSON file, None if there is no such file.

    Raises:
        ValueError: the file holds no JSON object.
    """
    if not path.is_file():
        return None
    refuse_pointer(path)
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: no valid JSON ({error}); copy the file again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got a {type(content).__name__}")
    return content


def refuse_pointer(path: Path) -> None:
    """Refuse what Git leaves in the place of a large file that was not fetched.

    Raises:
        ValueError: the file is a Git LFS pointer.
    """
    with path.open("rb") as stream:
        if stream.read(len(LFS)) == LFS:
            raise ValueError(f"{path}: a Git LFS pointer, not the file; run `git lfs pull`")


@contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """Open a safetensors file for a short time.

    Raises:
        ValueError: the file is damaged, cut short or a Git LFS pointer.
    """
    refuse_pointer(path)
    try:
        with safe_open(path, "numpy") as file:
            yield file
    except SafetensorError as error:
        size = path.stat().st_size
        raise ValueError(
            f"{path}: not a whole safetensors file ({error}; {size} bytes are there); "
            f"copy or download it again"
        ) from error


def entries(path: Path) -> dict[str, Entry]:
    """Return what a safetensors file holds, from its header alone."""
    with open_tensors(path) as file:
        found = {}
        for key in file.keys():  # noqa: SIM118
            part = file.get_slice(key)
            found[key] = Entry(path.name, part.get_dtype(), tuple(part.get_shape()))
        return found


def read_tensor(path: Path, key: str) -> np.ndarray:
    """Return a copy of one tensor in its own dtype.

    Raises:
        ValueError: it has NaN or infinite entries.
    """
    with open_tensors(path) as file:
        tensor = file.get_tensor(key)
    if not _all_finite(tensor):
        bad = int((~np.isfinite(tensor)).sum())
        raise ValueError(
            f"{path}: tensor {key} has {bad} entries of {tensor.size} that are NaN or infinite; "
            f"the checkpoint is damaged, or its training diverged"
        )
    return tensor


def _all_finite(tensor: np.ndarray) -> bool:
    if tensor.dtype == jnp.bfloat16:
        # All exponent bits are set. NumPy's own test of bfloat16 takes five times as long.
        return not ((tensor.view(np.uint16) & 0x7FFF) >= 0x7F80).any()
    return bool(np.isfinite(tensor).all())


class CheckpointFiles:
    """The weights of a folder, by key. If there is an index, it decides which files are used.

    Keys are plain: what wrappers add to them is left out (`hf_keys.plain_key`).

    Attributes:
        entries: every tensor, key -> where and what.
        absent: keys that the index names but that are in no file.
        notes: files that were not used.

    Raises:
        FileNotFoundError: there are no readable weights, or a shard is missing.
        ValueError: a file is damaged, or the actions of the checkpoint come from another head.
    """

    def __init__(self, folder: str | Path):
        self.folder = folder = Path(folder)
        _refuse_other_heads(folder)
        weight_map = _weight_map(folder)
        files = sorted(set(weight_map.values()))
        missing = [name for name in files if not (folder / name).is_file()]
        if missing:
            raise FileNotFoundError(
                f"{folder}: {INDEX} names files that are not there: {', '.join(missing)}; "
                f"copy or download them"
            )
        if (folder / VALUE_HEAD_FILE).is_file():
            files.append(VALUE_HEAD_FILE)
        self.entries: dict[str, Entry] = {}
        self._stored: dict[str, str] = {}
        for name in files:
            for stored, entry in entries(folder / name).items():
                key = plain_key(stored)
                if self._stored.setdefault(key, stored) != stored:
                    raise ValueError(
                        f"{folder}: {stored} and {self._stored[key]} are two names of one tensor; "
                        f"remove the one that is outdated"
                    )
                if key not in self.entries or weight_map.get(stored) == name:
                    self.entries[key] = entry
        self.absent = sorted(set(weight_map) - set(self._stored.values()))
        self.notes = _leftovers(folder, files)
        if renamed := [f"{old} as {new}" for new, old in self._stored.items() if new != old]:
            self.notes.append(f"{len(renamed)} tensors go by plainer names, such as {renamed[0]}")

    @property
    def keys(self) -> set[str]:
        """Keys of all tensors."""
        return set(self.entries)

    def read(self, key: str) -> np.ndarray:
        """One tensor, in its own dtype; see `read_tensor`."""
        return read_tensor(self.folder / self.entries[key].file, self._stored[key])


def _weight_map(folder: Path) -> dict[str, str]:
    index = read_json(folder / INDEX)
    if index is None:
        if (folder / SINGLE).is_file():
            return dict.fromkeys(entries(folder / SINGLE), SINGLE)
        raise FileNotFoundError(f"{folder}: {_why_no_weights(folder)}")
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{folder / INDEX}: has no weight_map; copy the file again")
    strange = [n for n in weight_map.values() if not isinstance(n, str) or n != Path(n).name]
    if strange:
        raise ValueError(f"{folder / INDEX}: expected plain file names, got {strange[:3]}")
    return weight_map


def _why_no_weights(folder: Path) -> str:
    if not folder.is_dir():
        return "there is no such folder"
    if pickles := _matching(folder, PICKLES):
        return (
            f"holds only PyTorch pickles ({', '.join(pickles[:4])}), which are not read because "
            f"unpickling runs code. Where you trust them, convert them once: load the folder with "
            f"transformers and call save_pretrained(NEW, safe_serialization=True)"
        )
    for place in (folder, folder / "lora_adapter"):
        if (place / "adapter_config.json").is_file():
            return (
                f"holds a LoRA adapter without its base ({place.name}/): give the base's folder "
                f"as checkpoint and {place} as lora_adapter"
            )
    return f"neither {INDEX} nor {SINGLE} is there"


def _refuse_other_heads(folder: Path) -> None:
    found = {
        path.name: meaning
        for prefix, meaning in OTHER_HEADS.items()
        for path in sorted(folder.glob(f"{prefix}*"))
        if path.is_file()
    }
    if found:
        listed = "\n".join(f"  {name}: {meaning}" for name, meaning in found.items())
        raise ValueError(
            f"{folder}: this checkpoint does not act through its action tokens:\n{listed}\n"
            f"Reinforcement learning here samples action tokens, and from such a checkpoint they "
            f"would be noise (zero success). Fine-tune on tokens (OpenVLA-OFT with "
            f"--use_l1_regression False --use_proprio False, or tools/finetune_policy). Where the "
            f"file cannot matter, because the tokens were trained since, move it out of the folder"
        )


def _leftovers(folder: Path, used: list[str]) -> list[str]:
    unused = sorted(set(_matching(folder, ("*.safetensors", *PICKLES))) - set(used))
    if not unused:
        return []
    note = f"not read, because {used[0] if used == [SINGLE] else INDEX} counts: {', '.join(unused)}"
    if SINGLE in unused:
        note += f" (transformers itself would prefer {SINGLE}: remove what is outdated)"
    return [note]


def _matching(folder: Path, patterns: Iterable[str]) -> list[str]:
    return sorted({path.name for pattern in patterns for path in folder.glob(pattern)})


def write_tensors(
    path: Path, wanted: dict[str, Entry], tensor: Callable[[str], np.ndarray]
) -> None:
    """Write a safetensors file with one tensor in memory at a time.

    Args:
        wanted: key -> dtype and shape on disk.
        tensor: gives a tensor by its key, in any float dtype.

    Raises:
        ValueError: a tensor has another shape than wanted.
    """
    # Wider types first, as safetensors itself does: every tensor stays aligned.
    keys = sorted(wanted, key=lambda key: (-BYTES[wanted[key].dtype], key))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key in keys:
        begin, end = end, end + wanted[key].nbytes
        header[key] = {
            "dtype": wanted[key].dtype,
            "shape": list(wanted[key].shape),
            "data_offsets": [begin, end],
        }
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    with path.open("wb") as stream:
        stream.write(len(head).to_bytes(8, "little") + head)
        for key in keys:
            array = np.ascontiguousarray(tensor(key), jnp.dtype(FLOATS[wanted[key].dtype]))
            if array.shape != wanted[key].shape:
                raise ValueError(f"{key}: expected {wanted[key].shape}, got {array.shape}")
            stream.write(array.reshape(-1).view(np.uint8).data)

"""Reads public weight files without running anything in them, and writes safetensors files.

Public formats are Lightning (`state_dict`), DeepSpeed (`module`, also as a folder), action
predictor (`model_state_dict` beside statistics), bare state dicts and safetensors. Tensors of zip
`.pt` files and of safetensors files are mapped, so a tensor takes memory only when it is used.
Writing holds one tensor at a time.
"""

import json
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from evac_jax.errors import CheckpointError
from evac_jax.files.restricted_npy import encode_latin1

# What wrappers put in front of keys (DeepSpeed, DistributedDataParallel), and at any depth
# (torch.compile).
PREFIXES = ("_forward_module.", "module.")
INSERTED = "_orig_mod."
DEEPSPEED_FILES = "*_model_states.pt"
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# Names of types in a safetensors header.
STORED = {
    torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
SHOWN = 8
# Classes of configurations and training state that Lightning and DeepSpeed store beside weights.
# Each is replaced by an empty object; none is looked up, imported or called.
BESIDE_WEIGHTS = re.compile(
    r"(omegaconf|pytorch_lightning|lightning|lightning_fabric|deepspeed)\..+"
    r"|argparse\.Namespace|typing\.\w+|pathlib\.\w*Path"
    r"|builtins\.(object|dict|list|tuple|set|int|float|str|bytes|bool)"
)


# How numpy pickles plain arrays; numpy 2 moved the module.
_NUMPY = [
    np.ndarray,
    np.dtype,
    *(type(np.dtype(name)) for name in "?bhilqBHILQefdgFDUSMm"),
    *(
        (np._core.multiarray._reconstruct, f"numpy.{core}.multiarray._reconstruct")  # noqa: SLF001
        for core in ("core", "_core")
    ),
    (encode_latin1, "_codecs.encode"),
]


class _LeftOut:
    """Replaces an object of a class that is not needed; it ignores all arguments."""

    def __new__(cls, *_args, **_options):
        return super().__new__(cls)

    def __init__(self, *_args, **_options):
        pass

    def __setstate__(self, _state):
        pass


def _left_out_dict(*_args) -> dict:
    return {}


def _left_out_number(*_args) -> _LeftOut:
    return _LeftOut()


def find_file(path: str | Path) -> Path:
    """The weight file at `path`: the file itself, or the one inside a DeepSpeed folder.

    Raises:
        CheckpointError: there is none, or the weights are divided into several files.
    """
    path = Path(path)
    if path.is_file():
        return path
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such weight file")
    for folder in (path, path / "checkpoint"):
        found = sorted(file.name for file in folder.glob(DEEPSPEED_FILES))
        if found == ["mp_rank_00_model_states.pt"]:
            return folder / found[0]
        if found:
            raise CheckpointError(
                f"{folder}: weights are spread over {len(found)} files ({found[0]}, ...); join "
                "them where they were made, with DeepSpeed's zero_to_fp32.py, and name the result"
            )
    raise CheckpointError(
        f"{path}: expected a weight file, or a DeepSpeed folder with "
        "checkpoint/mp_rank_00_model_states.pt"
    )


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """State dict of a file in any of the known containers, on the CPU, mapped where possible.

    Raises:
        CheckpointError: if there is no such file, it is damaged, it holds more than plain
            tensors (nothing is ever unpickled that could run code), or no weights at all.
    """
    path = find_file(path)
    try:
        with path.open("rb") as stream:
            begin = stream.read(24)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    if begin.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path}: a Git LFS pointer, not the weights; run `git lfs pull`")
    if path.suffix == ".safetensors":
        try:
            return unwrap(load_file(path), str(path))
        # A broken header can raise any of these; each means a bad file.
        except Exception as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{_damaged(path, 'safetensors')} ({error})") from error
    # The table of contents of a zip file is at its end; if it is missing, the file is truncated.
    if begin.startswith(b"PK") and not zipfile.is_zipfile(path):
        raise CheckpointError(_damaged(path, "PyTorch"))
    return unwrap(_load_pickled(path), str(path))


def _load_pickled(path: Path) -> Any:
    zipped = zipfile.is_zipfile(path)
    asked_for = torch.serialization.get_unsafe_globals_in_checkpoint
    try:
        # Only zip files can list in advance the classes that they need; for others torch refuses.
        beside = [n for n in (asked_for(path) if zipped else ()) if BESIDE_WEIGHTS.fullmatch(n)]
        scalars = [
            (_left_out_number, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")
        ]
        harmless = [*_NUMPY, *scalars, (_left_out_dict, "collections.defaultdict")]
        with torch.serialization.safe_globals([*harmless, *((_LeftOut, n) for n in beside)]):
            refused = sorted(asked_for(path)) if zipped else []
            if not refused:
                return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    # A damaged pickle can raise any of these; each means a bad file.
    except Exception as error:
        raise CheckpointError(
            f"{path}: damaged, or more than plain tensors. Only weights are read, never pickled "
            "objects. Get the file again, or, if you trust it, convert it to .safetensors where "
            f"it was made. ({_reason(error)})"
        ) from error
    raise CheckpointError(
        f"{path}: refused, its pickle asks for {', '.join(refused[:SHOWN])}; loading that could "
        "run code. Only weights are read, never pickled objects; if you trust the file, convert "
        "it to .safetensors where it was made."
    )


def _reason(error: Exception) -> str:
    """The cause in torch's message, without its advice to load the file unsafely."""
    found = error.__context__ if isinstance(error, pickle.UnpicklingError) else None
    text = str(found or error).strip().partition("\n")[0].partition(" Please use ")[0]
    return text or type(error).__name__


def _damaged(path: Path, kind: str) -> str:
    return (
        f"{path}: not a whole {kind} file, {path.stat().st_size} bytes; damaged or cut short: get "
        "it again and compare its size with the source's"
    )


def unwrap(content: Any, name: str = "checkpoint") -> dict[str, Tensor]:
    """The state dict inside a container; wrappers' prefixes are removed from keys that have them.

    Args:
        content: Lightning ("state_dict"), DeepSpeed ("module"), action predictor
            ("model_state_dict" beside its statistics), or a bare state dict.
        name: for the error message.

    Raises:
        CheckpointError: it contains no state dict of plain tensors.
    """
    state = content
    if isinstance(content, Mapping):
        if isinstance(content.get("model_state_dict"), Mapping):
            beside = {k: _tensor(v) for k, v in content.items() if k != "model_state_dict"}
            state = {key: value for key, value in beside.items() if isinstance(value, Tensor)}
            state.update(content["model_state_dict"])
        else:
            for key in ("state_dict", "module"):
                if isinstance(content.get(key), Mapping):
                    state = content[key]
                    break
    tensors = isinstance(state, Mapping) and all(isinstance(v, Tensor) for v in state.values())
    if not tensors or not state:
        found = sorted(map(str, content))[:SHOWN] if isinstance(content, Mapping) else type(content)
        raise CheckpointError(
            f"{name}: expected a state dict, bare or under 'state_dict' or 'module', got {found}"
        )
    plain = {_plain_key(str(key)): value for key, value in state.items()}
    if len(plain) < len(state):
        raise CheckpointError(f"{name}: several keys mean one weight: some have a wrapper's prefix")
    return plain


def _plain_key(key: str) -> str:
    key = key.replace(INSERTED, "")
    while prefix := next((prefix for prefix in PREFIXES if key.startswith(prefix)), ""):
        key = key.removeprefix(prefix)
    return key


def _tensor(value: Any) -> Any:
    plain = isinstance(value, np.ndarray) and value.dtype.kind in "fiu"
    return torch.from_numpy(value) if plain else value


def cast(value: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """`value` in `dtype`.

    Raises:
        CheckpointError: the weight holds NaN or infinity, before or after the cast; names it.
    """
    result = value.to(dtype)
    if dtype.is_floating_point and not result.isfinite().all():
        if value.isfinite().all():
            reason = f"is not finite as {str(dtype).removeprefix('torch.')}; take bfloat16"
        else:
            wrong = int((~value.isfinite()).sum())
            reason = (
                f"holds NaN or infinity in {wrong} of {value.numel()} places; the file is damaged "
                "or its training had diverged: take another one"
            )
        raise CheckpointError(f"{name} {reason}")
    return result


def write_weights(
    path: Path,
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write a safetensors file, one tensor at a time.

    Args:
        path: overwritten; pass a temporary path and rename it afterwards.
        tensors: on any device, with any memory layout.
        dtype: store floating-point weights in this type; None = as they are.
        progress: called with (bytes written, bytes in all).

    Raises:
        CheckpointError: a weight is not finite, or its type is not supported.
    """
    kept = {
        key: dtype if dtype is not None and value.is_floating_point() else value.dtype
        for key, value in tensors.items()
    }
    if odd := [f"{key} ({kind})" for key, kind in kept.items() if kind not in STORED]:
        raise CheckpointError(f"{path}: cannot store {', '.join(odd[:SHOWN])}")
    # Wide types first, so that the offset of every tensor is a multiple of its type's size.
    order = sorted(tensors, key=lambda key: (-kept[key].itemsize, key))
    header, end = {}, 0
    for key in order:
        begin, end = end, end + tensors[key].numel() * kept[key].itemsize
        shape = list(tensors[key].shape)
        header[key] = {"dtype": STORED[kept[key]], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for key in order:
            value = cast(tensors[key].detach(), kept[key], key).cpu().contiguous()
            stream.write(value.reshape(-1).view(torch.uint8).numpy())
            if progress is not None:
                progress(header[key]["data_offsets"][1], end)
        stream.flush()
        os.fsync(stream.fileno())

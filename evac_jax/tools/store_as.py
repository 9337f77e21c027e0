"""Stores a folder of weights in half precision. It takes half the bytes and is loaded as before.

    python -m evac_jax.tools.store_as --source DIR --out DIR2 --dtype float16

Measure scores on this copy, because it is the one that others will use.
"""

import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from evac_jax.errors import CheckpointError, StorageError
from evac_jax.files import cards
from evac_jax.files.atomic import whole_folder
from evac_jax.tools.command_line import Parser, run_tool

DTYPES = ("float16", "bfloat16")


def store(source: Path, out: Path, dtype: str) -> None:
    """Write the new folder `out`: float32 tensors of `source` as `dtype`, JSON files as they are.

    In a policy folder, config.json then names the new precision. `stored_as` is added to the card.

    Raises:
        CheckpointError: `out` exists, there are no weights, they are damaged, or a value does not
            fit.
        StorageError: `out` cannot be written.
    """
    if out.exists():
        raise CheckpointError(f"--out: {out} exists; choose another folder or remove it")
    weights = sorted(source.glob("*.safetensors"))
    if not weights:
        raise CheckpointError(f"--source: {source} has no *.safetensors")
    with whole_folder(out) as partial:
        partial.mkdir()
        for file in weights:
            try:
                with safe_open(file, "numpy") as stream:
                    names, metadata = stream.keys(), stream.metadata()
                    tensors = {name: _cast(name, stream.get_tensor(name), dtype) for name in names}
            except SafetensorError as error:
                raise CheckpointError(f"{file} is damaged ({error}); copy it anew") from error
            try:
                save_file(tensors, partial / file.name, metadata=metadata)
            except SafetensorError as error:
                raise StorageError(f"{out} cannot be written: {error}; make room there") from error
        for file in sorted(source.glob("*.json")):
            shutil.copyfile(file, partial / file.name)
        _name_precision(partial / "config.json", dtype)
        card = cards.read(source) | {"stored_as": dtype}
        if len(weights) == 1:
            card["sha256"] = cards.sha256(partial / weights[0].name)
        cards.write_json(partial / "card.json", card)


def _name_precision(file: Path, dtype: str) -> None:
    """Change the precision in a Hugging Face configuration; other files do not contain it."""
    config = cards.read_json(file) if file.is_file() else {}
    if "torch_dtype" in config:
        config["torch_dtype"] = config.setdefault("text_config", {})["torch_dtype"] = dtype
        cards.write_json(file, config)


def _cast(name: str, tensor: np.ndarray, dtype: str) -> np.ndarray:
    if tensor.dtype != np.float32:
        return tensor
    with np.errstate(over="ignore"):
        cast = tensor.astype(jnp.dtype(dtype))
    if not np.isfinite(cast.astype(np.float32)).all():
        raise CheckpointError(f"{name}: a value is not finite as {dtype}; take bfloat16")
    return cast


def main() -> None:
    """Command line."""
    parser = Parser("store_as", __doc__)
    parser.add_argument("--source", required=True, type=Path, help="folder of float32 weights")
    parser.add_argument("--out", required=True, type=Path, help="new folder")
    parser.add_argument("--dtype", required=True, choices=DTYPES, help="precision of the copy")
    args = parser.parse_args()
    store(args.source, args.out, args.dtype)


if __name__ == "__main__":
    run_tool(main)

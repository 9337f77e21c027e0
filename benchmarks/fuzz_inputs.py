"""Valid files of every kind that the project reads from outside, and ways to damage them.

Each maker writes one small folder as a stranger might hand it over. `damage` changes a copy of it:
bytes, lengths, JSON values, headers, links, and pickles that would run code if they were loaded.
"""

import dataclasses
import io
import json
import os
import pickle
import random
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from flax import nnx
from PIL import Image

from evac_jax.bridge import protocol
from evac_jax.bridge.types import EnvSpec, StepResult
from evac_jax.evac import model_folders
from evac_jax.files.recordings import EpisodeWriter
from evac_jax.sim.camera import libero_camera
from evac_jax.sim.reward import RewardConfig, RewardNet
from policies.openvla_oft import peft
from policies.openvla_oft.action_tokens import ActionStatistics
from policies.openvla_oft.config import OpenVLAOFTConfig, VisionTowerConfig
from policies.openvla_oft.export_hf import create_policy_folder
from policies.openvla_oft.model import OpenVLAOFT
from policies.spec import ActionSpec

TASKS = ["push the red block left", "open the drawer"]
POSE = [0.1, 0.2, 0.3, 0.0, 0.0, 0.0, 1.0, 0.5]
SIZE, LENGTH = 16, 4
_STATISTICS = {
    "tiny": {"action": {"q01": [-1.0] * 7, "q99": [1.0] * 7, "mask": [True] * 6 + [False]}}
}
_POLICY = OpenVLAOFTConfig(
    dinov2=VisionTowerConfig(16, 2, 2, 24, True, 2, layer_scale=True),
    siglip=VisionTowerConfig(12, 2, 2, 20, attention_pool=True),
    image_size=16,
    patch_size=8,
    hidden_size=32,
    intermediate_size=40,
    num_layers=1,
    num_heads=4,
    num_kv_heads=4,
    vocab_size=640,
    vocab_padding=64,
    pad_token_id=576,
    chunk=2,
    max_prompt_length=24,
    value_type="none",
)  # fmt: skip


# --- valid material -------------------------------------------------------------------------------


def _picture(seed: int) -> np.ndarray:
    """Return uint8 [SIZE SIZE 3]; pictures of one colour are refused as cast from other ranges."""
    return np.random.default_rng(seed).integers(0, 256, (SIZE, SIZE, 3)).astype(np.uint8)


def make_policy(folder: Path) -> None:
    """Hugging Face folder of a policy, in several shards, and an adapter for it."""
    statistics = ActionStatistics.from_norm_stats(_STATISTICS, "tiny")
    model = OpenVLAOFT(_POLICY, statistics, rngs=nnx.Rngs(0))
    base = create_policy_folder(
        model, folder / "base", tasks=TASKS, norm_stats=_STATISTICS, max_shard_bytes=60_000
    )
    config = dataclasses.replace(_POLICY, lora_rank=2, lora_alpha=4.0)
    with_adapter = OpenVLAOFT(config, statistics, rngs=nnx.Rngs(0))
    peft.save_adapter(with_adapter, folder / "adapter", base=base)


def make_networks(folder: Path) -> None:
    """A classifier as a model folder, and the same weights as public checkpoints have them."""
    torch.manual_seed(0)
    net = RewardNet(RewardConfig(width=4, num_instructions=len(TASKS)))
    model_folders.save_model(folder / "reward", net)
    state = {key: value.clone() for key, value in net.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 3}, folder / "lightning.ckpt")
    torch.save(state, folder / "old.pt", _use_new_zipfile_serialization=False)


def make_starts(folder: Path) -> None:
    """RLinf's start frames and keyframes."""
    folder.mkdir(parents=True)
    for n, name in enumerate(("a.npy", "b.npy", "c_kir.npy")):
        image = _picture(n)
        frame = {"image": image, "state": np.array(POSE, np.float32), "instruction": TASKS[n % 2]}
        np.save(folder / name, np.array([frame, dict(frame)], object), allow_pickle=True)


def make_lerobot(folder: Path) -> None:
    """A LeRobot dataset v2.1 with pictures inside its parquet files."""
    picture = io.BytesIO()
    Image.fromarray(_picture(3)).save(picture, format="PNG")
    info = {
        "codebase_version": "v2.1",
        "fps": 10,
        "chunks_size": 1000,
        "total_episodes": 2,
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "features": {
            "image": {"dtype": "image", "shape": [SIZE, SIZE, 3]},
            "observation.state": {"dtype": "float32", "shape": [8]},
            "action": {"dtype": "float32", "shape": [7]},
            "next.success": {"dtype": "bool", "shape": [1]},
        },
    }
    (folder / "meta").mkdir(parents=True)
    (folder / "data/chunk-000").mkdir(parents=True)
    for n in range(2):
        columns = {
            "observation.state": [[0.1, 0.2, 0.3, 0.0, 0.0, 1.5, 0.04, -0.04]] * LENGTH,
            "action": [[0.1] * 6 + [-1.0]] * LENGTH,
            "task_index": [n] * LENGTH,
            "episode_index": [n] * LENGTH,
            "frame_index": list(range(LENGTH)),
            "next.success": [False] * (LENGTH - 1) + [True],
            "image": [{"bytes": picture.getvalue(), "path": None}] * LENGTH,
        }
        path = info["data_path"].format(episode_chunk=0, episode_index=n)
        pq.write_table(pa.table(columns), folder / path)
    (folder / "meta/info.json").write_text(json.dumps(info))
    lines = [json.dumps({"task_index": n, "task": text}) for n, text in enumerate(TASKS)]
    (folder / "meta/tasks.jsonl").write_text("\n".join(lines))


def make_episodes(folder: Path) -> None:
    """A recording of our own."""
    intrinsic, c2w = libero_camera()
    with EpisodeWriter(
        folder,
        image_shape=(1, SIZE, SIZE, 3),
        instructions=TASKS,
        sources=["x"],
        intrinsic=intrinsic,
        c2w=c2w,
        facts={},
    ) as writer:
        for n in range(2):
            writer.add(
                frames=np.tile(_picture(n), (LENGTH, 1, 1, 1, 1)),
                actions=np.zeros((LENGTH - 1, 7), np.float32),
                poses=np.tile(np.array(POSE, np.float32), (LENGTH, 1)),
                success=np.arange(LENGTH) == LENGTH - 1,
                task=n,
                source=0,
            )


def make_messages(folder: Path) -> None:
    """One message of every kind of the bridge, each in a file of its own."""
    folder.mkdir(parents=True)
    env = EnvSpec(
        num_envs=2,
        image_shape=(1, SIZE, SIZE, 3),
        proprio_dim=8,
        action=ActionSpec(),
        instructions=tuple(TASKS),
        num_starts=4,
        max_episode_steps=8,
    )
    flags = np.zeros(2, bool)
    result = StepResult(
        np.zeros(2, np.int32), np.zeros((2, 8), np.float32), np.zeros((2, 8), np.float32),
        flags, flags, flags, {"return": np.zeros(2, np.float32)}, {"imagine": 0.1},
    )  # fmt: skip
    messages = {
        "start": protocol.Start({"make": "module:make", "config": {"size": 16}}),
        "hello": protocol.Hello(env),
        "attach": protocol.Attach(2),
        "reset": protocol.Reset(1, 0, 0, np.arange(2), 7),
        "step": protocol.Step(2, 0, 0, np.zeros((2, 8, 7), np.float32)),
        "reply": protocol.Reply(2, 0, result),
        "failure": protocol.Failure("text", "traceback"),
    }
    for name, message in messages.items():
        (folder / f"{name}.bin").write_bytes(protocol.encode(message))


# --- damage ---------------------------------------------------------------------------------------

CANARY = "EVAC_JAX_FUZZ_CANARY"  # environment variable: the file that executed code would make
_VALUES = (
    None, True, -1, 0, 1, 2**31, 10**18, 1e30, float("nan"), float("inf"), -0.5, "", "2", "abc",
    "../../../../etc/passwd", "x" * 5000, "\x00", "<script>", [], {}, [None], [[]], {"a": None},
)  # fmt: skip


class _Runs:
    """Pickles to something that would make the canary's file when it is loaded."""

    def __reduce__(self):
        return os.mkdir, (os.environ[CANARY],)


def _bytes(rng: random.Random, path: Path) -> None:
    data = bytearray(path.read_bytes())
    for _ in range(rng.choice((1, 1, 4, 32))):
        if data:
            # Headers decide more than weights do.
            end = len(data) if rng.random() < 0.3 else min(len(data), 512)
            data[rng.randrange(end)] = rng.randrange(256)
    path.write_bytes(data)


def _cut(rng: random.Random, path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: rng.choice((0, 1, 8, len(data) // 2, max(len(data) - 1, 0)))])


def _lengthen(rng: random.Random, path: Path) -> None:
    with path.open("ab") as file:
        file.write(rng.randbytes(rng.choice((1, 64, 4096))))


def _remove(rng: random.Random, path: Path) -> None:
    path.unlink()


def _folder(rng: random.Random, path: Path) -> None:
    path.unlink()
    path.mkdir()


def _link(rng: random.Random, path: Path) -> None:
    path.unlink()
    path.symlink_to(rng.choice(("/etc/passwd", "/nowhere", path.name, "/proc/self/maps", "..")))


def _pointer(rng: random.Random, path: Path) -> None:
    path.write_text(
        f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 123456\n"
    )


def _exchange(rng: random.Random, path: Path) -> None:
    others = [p for p in path.parent.iterdir() if p.is_file()]
    shutil.copyfile(rng.choice(others), path.with_name("tmp.exchange"))
    path.with_name("tmp.exchange").replace(path)


def _runs_code(rng: random.Random, path: Path) -> None:
    if path.suffix == ".npy":
        np.save(path, np.array([_Runs(), {"image": 1}], object), allow_pickle=True)
    elif rng.random() < 0.5:
        torch.save({"state_dict": {"weight": torch.zeros(2)}, "more": _Runs()}, path)
    else:
        path.write_bytes(pickle.dumps(_Runs()))


def _zip_bomb(rng: random.Random, path: Path) -> None:
    """A zip of a pickle and tensor data that is 300 MB of zeros when it is unpacked."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"weight": 1}))
        archive.writestr("archive/version", "3\n")
        with archive.open("archive/data/0", "w") as entry:
            for _ in range(300):
                entry.write(bytes(2**20))


def _huge_header(rng: random.Random, path: Path) -> None:
    """Headers that promise far more than is there."""
    if path.suffix == ".npy":
        shape = rng.choice(("(10000000000000,)", "(4294967296, 4294967296)", "(-1,)", "(1e9,)"))
        kind = rng.choice(("<f4", "|O", "|u1", "<M8[s]", "bogus"))
        text = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}".encode()
        path.write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + bytes(64))
    else:
        length = rng.choice((2**63 - 1, 2**40, 2**31, 0))
        path.write_bytes(struct.pack("<Q", length) + b'{"a":{"dtype":"F32","shape":[4]}}')


def _json_value(rng: random.Random, path: Path) -> None:
    """Another value, or none, at a random place of a JSON file or of a safetensors header."""
    data, rest = path.read_bytes(), b""
    if path.suffix == ".safetensors":
        (length,) = struct.unpack("<Q", data[:8])
        data, rest = data[8 : 8 + length], data[8 + length :]
    lines = data.decode().splitlines() if path.suffix == ".jsonl" else [data.decode()]
    at = rng.randrange(len(lines))
    tree = json.loads(lines[at])
    holder, key = rng.choice(list(_places(tree)))
    if isinstance(holder, dict) and rng.random() < 0.2:
        del holder[key]
    else:
        holder[key] = rng.choice(_VALUES)
    lines[at] = json.dumps(tree)
    data = "\n".join(lines).encode()
    path.write_bytes((struct.pack("<Q", len(data)) + data + rest) if rest else data)


def _places(tree: Any):
    """Yield every (holder, key) of a JSON tree; of long lists the first few."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree[:4])
    for key, value in list(items):
        yield tree, key
        if isinstance(value, dict | list):
            yield from _places(value)


def _column(rng: random.Random, path: Path) -> None:
    """A column of a parquet file that is missing, of another type, or has a null."""
    table = pq.read_table(path)
    name = rng.choice(table.column_names)
    at = table.column_names.index(name)
    kept = table.drop_columns([name])
    values = table[name].to_pylist()
    how = rng.randrange(5)
    if how == 1:
        values[rng.randrange(len(values))] = None
    elif how == 2:
        values = [str(value) for value in values]
    elif how == 3:
        values = [value[:-1] if isinstance(value, list) else 7 for value in values]
    elif how == 4:
        values = [[float("nan")] * 8 for _ in values]
    pq.write_table(kept if how == 0 else kept.add_column(at, name, pa.array(values)), path)


ANY: tuple[Callable, ...] = (
    _bytes, _bytes, _bytes, _cut, _lengthen, _remove, _folder, _link, _pointer, _exchange,
)  # fmt: skip
BY_SUFFIX: dict[str, tuple[Callable, ...]] = {
    ".json": (_json_value,),
    ".jsonl": (_json_value,),
    ".safetensors": (_json_value, _huge_header, _runs_code, _zip_bomb),
    ".npy": (_huge_header, _runs_code),
    ".pt": (_runs_code, _zip_bomb),
    ".ckpt": (_runs_code, _zip_bomb),
    ".parquet": (_column,),
}


def damage(rng: random.Random, folder: Path) -> str:
    """Change one or two files below `folder`; return what was done, to be read by a person."""
    told = []
    for _ in range(rng.choice((1, 1, 1, 2))):
        files = sorted(p for p in folder.rglob("*") if p.is_file() and not p.is_symlink())
        # Small files of settings are as many ways to be wrong as the large ones.
        path = rng.choice(files)
        own = BY_SUFFIX.get(path.suffix, ())
        change = rng.choice(own) if own and rng.random() < 0.6 else rng.choice(ANY)
        try:
            change(rng, path)
        except (ValueError, OSError, pa.ArrowException, struct.error, IndexError):
            _bytes(rng, path)  # damaged twice: the second change could not read what it changes
        told.append(f"{change.__name__.strip('_')} {path.relative_to(folder)}")
    return ", ".join(told)

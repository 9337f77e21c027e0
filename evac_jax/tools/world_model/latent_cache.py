"""Latents of recorded frames and of their trajectory maps, computed once and stored on disk.

The autoencoder is frozen while a world model trains, so with the cache a step only needs the
denoiser. The cache has one folder for each folder of episodes. If episodes are added later, only
these are encoded:

    <cache>/<first digits of the data card's sha256>/
        frames.npy, maps.npy   float16 [F V 4 h w], with the rows of the episodes
        done.npy               bool, which blocks of rows are encoded; a stopped run continues here
        card.json              the sources of the latents
"""

import hashlib
import json
import math
import multiprocessing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from absl import logging
from torch import Tensor

from evac_jax.errors import DataError
from evac_jax.evac.autoencoder import Autoencoder
from evac_jax.evac.config import EvacConfig
from evac_jax.evac.model import Camera
from evac_jax.evac.trajectory_maps import draw_maps, normalize_maps
from evac_jax.files import cards, recordings
from evac_jax.files.atomic import whole_folder
from evac_jax.sim.actions import both_arms
from evac_jax.tools.distributed import ALONE, Ranks
from evac_jax.tools.world_model.imagine import camera_of, to_images

BLOCK = 128  # rows encoded at once; independent of the number of processes, so the bits are equal


class Rows:
    """Concatenated arrays, which are read by row number and never copied as a whole."""

    def __init__(self, arrays: Sequence[np.ndarray]):
        self._arrays = arrays
        self._ends = np.cumsum([len(array) for array in arrays])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        first = self._arrays[0]
        out = np.empty((*rows.shape, *first.shape[1:]), first.dtype)
        which = np.searchsorted(self._ends, rows, side="right")
        for index in np.unique(which):
            here, array = which == index, self._arrays[index]
            out[here] = array[rows[here] - (self._ends[index] - len(array))]
        return out


@dataclass(frozen=True)
class Latents:
    """Scaled latents, float16 [F V 4 h w], of frames and of their trajectory maps."""

    frames: Rows
    maps: Rows


def draw_pose_maps(poses: Tensor, camera: Camera, config: EvacConfig) -> Tensor:
    """Trajectory maps [B, V, 3, H, W] in [-1, 1] of single poses [B, 8]."""
    w2c = torch.linalg.inv(camera.c2w.double()).float()[:, :, None]
    drawn = draw_maps(
        both_arms(poses)[:, None], camera.intrinsic, w2c, config.maps, config.image_size
    )
    return normalize_maps(drawn)[:, :, 0]


def autoencoder_digest(autoencoder: Autoencoder) -> str:
    """SHA-256 of the weights and the configuration, independent of the folder."""
    digest = hashlib.sha256(json.dumps(autoencoder.config.to_dict()).encode())
    for name, value in sorted(autoencoder.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def cached_latents(
    cache: Path,
    folders: Sequence[Path],
    autoencoder: Autoencoder,
    config: EvacConfig,
    *,
    processes: int = 1,
    ranks: Ranks = ALONE,
) -> Latents:
    """Return the latents of the episodes in `folders`; encode those that are missing.

    Args:
        cache: folder of caches; created if missing.
        folders: of episodes, in the order in which `recordings.load` joins them.
        autoencoder: frozen, on the device that encodes.
        config: image size and trajectory maps.
        processes: number of processes that encode at the same time, on the CPU.
        ranks: of a distributed run; they share the work and the folder.

    Raises:
        DataError: the cache was made with another autoencoder or other maps, or a file is damaged.
    """
    digest = autoencoder_digest(autoencoder)
    parts = [
        _cached(cache, Path(f), autoencoder, config, digest, processes, ranks) for f in folders
    ]
    return Latents(Rows([part[0] for part in parts]), Rows([part[1] for part in parts]))


def _cached(cache, folder, autoencoder, config, digest, processes, ranks):
    """Return the mapped arrays of one folder of episodes."""
    data = recordings.load(folder)
    card_digest = cards.sha256(folder / "card.json")
    place = cache / card_digest[:16]
    facts = {
        "episodes": card_digest,
        "autoencoder": digest,
        "maps": config.maps.to_dict(),
        "image_size": list(config.image_size),
        "block": BLOCK,
    }
    if ranks.first and not place.exists():
        _create(place, data, config, facts)
    ranks.barrier()
    _check(place, folder, facts)
    todo = np.flatnonzero(~_open(place, "done", "r"))
    if len(todo):
        logging.info("encoding %d rows of %s into %s", len(todo) * BLOCK, folder, place)
        mine = todo[ranks.rank :: ranks.world]
        _encode_in_processes(place, folder, autoencoder, config, mine, processes)
    ranks.barrier()
    if not _open(place, "done", "r").all():
        raise DataError(f"{place}: not all rows were encoded; run it again to go on")
    return _open(place, "frames", "r"), _open(place, "maps", "r")


def _create(
    place: Path, data: recordings.Episodes, config: EvacConfig, facts: dict[str, Any]
) -> None:
    """Create the empty files of a cache, all or none."""
    rows, views = data.frames.shape[:2]
    shape = (rows, views, config.autoencoder.latent_channels, *config.latent_size)
    with whole_folder(place) as partial:
        partial.mkdir()
        for name in ("frames", "maps"):
            np.lib.format.open_memmap(partial / f"{name}.npy", "w+", np.float16, shape)
        np.save(partial / "done.npy", np.zeros(math.ceil(rows / BLOCK), bool))
        cards.write_json(partial / "card.json", facts)


def _check(place: Path, folder: Path, facts: dict[str, Any]) -> None:
    """Raise if the cache was made from something else."""
    try:
        found = json.loads((place / "card.json").read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{place}: no readable card.json ({error}); remove this folder") from error
    differing = sorted(key for key in facts if found.get(key) != facts[key])
    if differing:
        raise DataError(
            f"{place} holds latents of {folder} that were made with another "
            f"{' and '.join(differing)}; remove that folder, or name another one with --cache"
        )


def _open(place: Path, name: str, mode: str) -> np.ndarray:
    try:
        return np.load(place / f"{name}.npy", mmap_mode=mode, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(f"{place}: {name}.npy is damaged ({error}); remove this folder") from error


def _encode_in_processes(place, folder, autoencoder, config, blocks, processes) -> None:
    """Encode blocks of rows, in this process or, on the CPU, in several."""
    if processes == 1 or len(blocks) < 2:
        _encode(place, folder, autoencoder, config, blocks)
        return
    # As NumPy arrays, because PyTorch would pass tensors through shared memory, which may be small.
    weights = {name: value.cpu().numpy() for name, value in autoencoder.state_dict().items()}
    context = multiprocessing.get_context("spawn")
    workers = [
        context.Process(
            target=_encode_shard,
            args=(place, folder, weights, autoencoder.config, config, blocks[index::processes]),
        )
        for index in range(processes)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if failed := [worker.exitcode for worker in workers if worker.exitcode]:
        raise DataError(
            f"{len(failed)} of {processes} encoding processes failed (exit codes {failed}, their "
            "reasons are above); run it again to go on, with fewer --encode_processes if they "
            "were killed for memory"
        )


def _encode_shard(place, folder, weights, autoencoder_config, config, blocks) -> None:
    torch.set_num_threads(1)
    autoencoder = Autoencoder(autoencoder_config)
    autoencoder.load_state_dict({name: torch.from_numpy(v) for name, v in weights.items()})
    _encode(place, folder, autoencoder.eval(), config, blocks)


@torch.inference_mode()
def _encode(place, folder, autoencoder, config, blocks) -> None:
    data = recordings.load(folder)
    device = next(autoencoder.parameters()).device
    camera = camera_of(data, device)
    out = {name: _open(place, name, "r+") for name in ("frames", "maps", "done")}
    for block in blocks:
        rows = slice(int(block) * BLOCK, (int(block) + 1) * BLOCK)
        poses = torch.from_numpy(np.array(data.poses[rows])).to(device)
        pictures = {
            "frames": to_images(data.frames[rows], device),
            "maps": draw_pose_maps(poses, camera, config),
        }
        for name, images in pictures.items():
            latents = autoencoder.encode_mean_scaled(images.flatten(0, 1))
            shape = out[name][rows].shape
            out[name][rows] = latents.reshape(shape).half().cpu().numpy()
        out["frames"].flush()
        out["maps"].flush()
        out["done"][block] = True
    out["done"].flush()

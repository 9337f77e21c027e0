"""Makes a folder of initial states out of pictures.

    python -m evac_jax.tools.episodes.import_starts --source DIR --out DIR2 --camera CAMERA.json

DIR holds the pictures (PNG, or what else Pillow reads) and `starts.json`, a list with one entry
per start:

    {"image": "kitchen_3.png", "instruction": "open the drawer",
     "pose": [x, y, z (metres), quaternion x, y, z, w, gripper]}

A world model with several cameras needs "image" as a list, one picture per camera.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import logging
from PIL import Image

from evac_jax.errors import DataError
from evac_jax.files import cards, meaning
from evac_jax.sim.initial_states import Starts, pack_starts
from evac_jax.tools.command_line import Parser, refuse_existing, run_tool
from evac_jax.tools.episodes import importing

LIST_FILE = "starts.json"


class PictureStarts:
    """The starts of a folder of pictures, see the module; an `InitialStates`.

    Args:
        folder: holds starts.json.
        image_size: pixels per side to resize to; 0 = as they are.
        camera: of --camera.

    Raises:
        DataError: names the entry or the picture at fault.
        ConfigError: the camera cannot be.
    """

    def __init__(self, folder: Path, image_size: int, camera: str):
        try:
            entries = json.loads((folder / LIST_FILE).read_text())
        except (OSError, ValueError) as error:
            raise DataError(f"--source={folder}: cannot read {LIST_FILE} ({error})") from error
        if not isinstance(entries, list) or not entries:
            raise DataError(f"{folder / LIST_FILE}: expected a list with one entry per start")
        read = [_entry(folder, n, entry) for n, entry in enumerate(entries)]
        shape = read[0][0].shape
        for n, (images, _, _) in enumerate(read):
            if images.shape != shape:
                raise DataError(
                    f"{folder / LIST_FILE}: entry {n}: pictures {images.shape}, the first entry's "
                    f"are {shape}; one camera cannot fit both"
                )
        self.camera = importing.read_camera(camera, shape[0], shape[1:3], image_size)
        images = importing.resize(np.stack([images for images, _, _ in read]), image_size)
        self.camera_size = tuple(images.shape[2:4])
        texts = [text for _, _, text in read]
        self.instructions, self.num_starts = tuple(dict.fromkeys(texts)), len(texts)
        tasks = np.array([self.instructions.index(text) for text in texts], np.int32)
        poses = meaning.check_poses(np.stack([pose for _, pose, _ in read]), str(folder))
        self._starts = Starts(images, poses, tasks)

    def load(self, ids: np.ndarray) -> Starts:
        """Return the starts named by `ids`, int64 [B]."""
        starts = self._starts
        return Starts(starts.images[ids], starts.poses[ids], starts.task[ids])


def _entry(folder: Path, n: int, entry: object) -> tuple[np.ndarray, np.ndarray, str]:
    """Images uint8 [V H W 3], pose float32 [8] and instruction of an entry."""
    where = f"{folder / LIST_FILE}: entry {n}"
    if not isinstance(entry, dict) or entry.keys() != {"image", "instruction", "pose"}:
        raise DataError(f'{where}: expected {{"image": .., "instruction": .., "pose": ..}}')
    names = entry["image"] if isinstance(entry["image"], list) else [entry["image"]]
    try:
        pictures = [np.asarray(Image.open(folder / name).convert("RGB")) for name in names]
        pose = np.asarray(entry["pose"], np.float32)
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{where}: {error}") from error
    text = entry["instruction"]
    if pose.shape != (8,) or not isinstance(text, str) or not text.strip():
        raise DataError(f"{where}: expected 8 numbers as pose and a text as instruction")
    if len({picture.shape for picture in pictures}) != 1:
        raise DataError(f"{where}: its pictures differ in size, or there are none")
    meaning.check_frame(np.stack(pictures), where)
    return np.stack(pictures), pose, text.strip()


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = Parser("episodes.import_starts", __doc__)
    add = parser.add_argument
    add("--source", required=True, type=Path, help=f"folder with {LIST_FILE} and the pictures")
    add("--out", required=True, type=Path, help="new folder")
    parser.add_image_size()
    add("--camera", required=True, help="as for import_rlinf: a JSON file, or libero")
    args = parser.parse_args(argv)
    logging.set_verbosity(logging.INFO)
    refuse_existing(args.out)
    source = PictureStarts(args.source, args.image_size, args.camera)
    pack_starts(source, np.arange(source.num_starts), args.out, **cards.card())
    logging.info("%d starts -> %s", source.num_starts, args.out)


if __name__ == "__main__":
    run_tool(main)

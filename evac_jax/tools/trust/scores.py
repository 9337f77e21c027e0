"""Differences between imagined and true episodes: images, poses, coloured objects, verdicts.

One chunk of frames is compared at a time, so no whole episode is in memory; only a few numbers are
kept for the summary. NumPy only.
"""

import functools
from dataclasses import dataclass

import numpy as np

from evac_jax.telemetry.report import wilson_interval

LUMA = np.array((0.299, 0.587, 0.114), np.float32)  # Rec. 601
SSIM_WINDOW, SSIM_SIGMA = 11, 1.5
# Cosine between a pixel and a colour, both as RGB vectors. Shading scales the colour of a surface
# but keeps its direction. Table, floor and plate are below 0.95 for every block colour.
SAME_COLOR = 0.97
DARKEST = 60.0  # length of an RGB vector below which its direction is noise
GRIPPER = 110.0  # length below which a pixel can only be the gripper's palm
LEAST_AREA = 8 / 64**2  # smallest share of the picture for a visible object


@dataclass
class Records:
    """The comparison of N episodes of at most T actions; NaN if there is nothing to compare.

    Attributes:
        source: index into the recording's sources, [N].
        imagined: success in imagination, bool [N].
        real: success of the recording, bool [N].
        mse: mean squared error of all pixels, grey levels squared, [N T].
        ssim: structural similarity of the first view, [N T].
        pose_mm: distance of the imagined end effector from the true one, millimetres, [N T].
        thing_px: distance between the centroids of an object in both frames, pixels, [N T C]: the
            blocks, then the gripper; NaN if it is not in both.
        thing_lost: 1 if an object is in the true frame but not in the imagined one, 0 if it is in
            both, NaN if it is not in the true one, [N T C].
    """

    source: np.ndarray
    imagined: np.ndarray
    real: np.ndarray
    mse: np.ndarray
    ssim: np.ndarray
    pose_mm: np.ndarray
    thing_px: np.ndarray
    thing_lost: np.ndarray

    @classmethod
    def empty(cls, episodes: int, steps: int, things: int) -> "Records":
        """Return records without any comparison."""

        def nothing(*shape: int) -> np.ndarray:
            return np.full((episodes, steps, *shape), np.nan, np.float32)

        verdicts = (np.zeros(episodes, bool) for _ in range(2))
        tracked = (nothing(things) for _ in range(2))
        return cls(
            np.zeros(episodes, np.int32), *verdicts, nothing(), nothing(), nothing(), *tracked
        )


@functools.cache
def _band(size: int, window: int) -> np.ndarray:
    """Matrix [size - window + 1, size] that averages with a Gaussian, without a border."""
    x = np.arange(window) - (window - 1) / 2
    weights = np.exp(-0.5 * (x / SSIM_SIGMA) ** 2)
    band = np.zeros((size - window + 1, size), np.float32)
    for row in range(len(band)):
        band[row, row : row + window] = weights / weights.sum()
    return band


def ssim(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return the structural similarity of the luminance of pictures uint8 [.. H W 3], float32 [..].

    Gaussian window of 11 pixels (fewer in smaller pictures), sigma 1.5, K1 0.01, K2 0.03; mean over
    the positions where the window fits.

    Source: Wang et al. 2004, IEEE Transactions on Image Processing 13(4).
    """
    height, width = one.shape[-3:-1]
    window = min(SSIM_WINDOW, height, width)
    rows, columns = _band(height, window), _band(width, window).T
    x, y = one.astype(np.float32) @ LUMA, other.astype(np.float32) @ LUMA

    def average(values: np.ndarray) -> np.ndarray:
        return rows @ values @ columns

    mean_x, mean_y = average(x), average(y)
    var_x, var_y = average(x * x) - mean_x**2, average(y * y) - mean_y**2
    both = average(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    similarity = (2 * mean_x * mean_y + c1) * (2 * both + c2)
    similarity /= (mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)
    return similarity.mean((-2, -1))


def locate(frames: np.ndarray, colors: np.ndarray) -> np.ndarray:
    """Return centroids (column, row) of blocks and gripper in frames uint8 [.. H W 3], [.. C+1 2].

    Blocks are found by their colour. The gripper is last; it is darker than everything else. NaN if
    an object fills less than `LEAST_AREA` of the picture.

    Args:
        frames: any number of pictures of the miniature.
        colors: RGB of the blocks [C 3].
    """
    height, width = frames.shape[-3:-1]
    pixels = frames.astype(np.float32)
    wanted = (colors / np.linalg.norm(colors, axis=1, keepdims=True)).astype(np.float32)
    length = np.linalg.norm(pixels, axis=-1)
    block = pixels @ wanted.T > SAME_COLOR * np.maximum(length, DARKEST)[..., None]
    hit = np.concatenate((block, (length < GRIPPER)[..., None]), -1)
    columns, rows = hit.sum(-3), hit.sum(-2)  # [.. W C], [.. H C]
    area = columns.sum(-2).astype(np.float32)
    area[area < LEAST_AREA * height * width] = np.nan
    x = (columns * np.arange(width)[:, None]).sum(-2) / area
    y = (rows * np.arange(height)[:, None]).sum(-2) / area
    return np.stack((x, y), -1)


def compare(
    records: Records,
    where: tuple[np.ndarray, np.ndarray],
    imagined: np.ndarray,
    real: np.ndarray,
    colors: np.ndarray | None,
) -> None:
    """Add the comparison of frames to the records.

    Args:
        records: written at [episode, step] of `where`.
        where: episodes [n] and steps [n]; step 0 is the frame after the first action.
        imagined: uint8 [n V H W 3].
        real: the same from the recording.
        colors: RGB [C 3] of the blocks to track in the first view, or None.
    """
    error = imagined.astype(np.float32) - real
    records.mse[where] = np.square(error).mean(axis=(1, 2, 3, 4))
    records.ssim[where] = ssim(imagined[:, 0], real[:, 0])
    if colors is None:
        return
    dreamt, true = locate(imagined[:, 0], colors), locate(real[:, 0], colors)  # [n C 2]
    records.thing_px[where] = np.linalg.norm(dreamt - true, axis=-1)
    lost = np.isnan(dreamt[..., 0]).astype(np.float32)
    records.thing_lost[where] = np.where(np.isnan(true[..., 0]), np.nan, lost)


def psnr(mse: np.ndarray) -> float | None:
    """Return the PSNR (dB) of all squared errors together, None if there are none."""
    mean = _mean(mse)
    return None if mean is None else float(10 * np.log10(255**2 / max(mean, 1e-6)))


def _mean(values: np.ndarray) -> float | None:
    known = values[~np.isnan(values)]
    return float(known.mean(dtype=np.float64)) if known.size else None


def share(hits: int, n: int) -> dict:
    """Return a share with its 95 % Wilson interval; the rate is None if `n` is 0."""
    hits, n = int(hits), int(n)
    rate = hits / n if n else None
    return {"rate": rate, "interval_95": list(wilson_interval(hits, n)), "hits": hits, "of": n}


def verdicts(imagined: np.ndarray, real: np.ndarray) -> dict[str, dict]:
    """Return the shares that show how far imagined success can be trusted; arguments are bool [N].

    "imagined_success", "real_success" and "agreement" are shares of all episodes. "false_success"
    is the share of imagined successes that really fail. "missed_success" is the share of real
    successes that are not imagined.
    """
    return {
        "imagined_success": share(imagined.sum(), len(imagined)),
        "real_success": share(real.sum(), len(real)),
        "agreement": share((imagined == real).sum(), len(real)),
        "false_success": share((imagined & ~real).sum(), imagined.sum()),
        "missed_success": share((real & ~imagined).sum(), real.sum()),
    }


def spearman(one: list[float], other: list[float]) -> float | None:
    """Return the rank correlation; ties get their mean rank.

    None for fewer than three pairs, or if one side is constant and so has no order.
    """
    if len(one) < 3:
        return None
    ranks = []
    for values in (one, other):
        _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
        ranks.append((counts.cumsum() - (counts - 1) / 2)[place])
    a, b = (rank - rank.mean() for rank in ranks)
    norm = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / norm) if norm > 0 else None


def curves(records: Records, rows: np.ndarray, width: int) -> dict[str, list]:
    """Return the errors over time, one entry per `width` steps.

    Args:
        records: of all episodes.
        rows: the episodes to use.
        width: 1 for every step, or the chunk length for every chunk; the last part may be shorter.
    """
    parts = [slice(t, t + width) for t in range(0, records.mse.shape[1], width)]

    def over(values: np.ndarray, figure) -> list:
        return [figure(values[rows][:, part]) for part in parts]

    result = {
        "psnr": over(records.mse, psnr),
        "ssim": over(records.ssim, _mean),
        "end_effector_mm": over(records.pose_mm, _mean),
    }
    if records.thing_px.shape[2]:
        result |= {
            "block_px": over(records.thing_px[..., :-1], _mean),
            "blocks_lost": over(records.thing_lost[..., :-1], _mean),
            "gripper_px": over(records.thing_px[..., -1:], _mean),
        }
    return result


def summarise(records: Records, sources: tuple[str, ...], chunk: int) -> dict:
    """Return the figures of the report: overall, per kind of episode, over time, and the ranking.

    Args:
        records: of all episodes.
        sources: names of the kinds.
        chunk: actions of a chunk.
    """

    def group(rows: np.ndarray) -> dict:
        return {
            "episodes": int(rows.sum()),
            "pictures": int((~np.isnan(records.mse[rows])).any(1).sum()),
            **verdicts(records.imagined[rows], records.real[rows]),
            "per_chunk": curves(records, rows, chunk),
        }

    everyone = np.ones(len(records.source), bool)
    rows = {name: records.source == index for index, name in enumerate(sources)}
    kinds = {name: group(which) for name, which in rows.items() if which.any()}
    pairs = [(k["imagined_success"]["rate"], k["real_success"]["rate"]) for k in kinds.values()]
    overall = group(everyone)
    per_chunk = overall["per_chunk"]["psnr"]
    return {
        "figures": {
            "agreement": overall["agreement"]["rate"],
            "false_success": overall["false_success"]["rate"],
            "psnr_1": per_chunk[0],
            "psnr_4": per_chunk[3] if len(per_chunk) > 3 else None,
        },
        "overall": overall,
        "kinds": kinds,
        "ranking": {"spearman": spearman(*map(list, zip(*pairs, strict=True))), "of": len(pairs)},
        "drift": curves(records, everyone, 1),
    }

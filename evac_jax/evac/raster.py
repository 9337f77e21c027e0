"""Draws filled circles and thick lines for a whole batch, with exactly the pixels of OpenCV.

The public EVAC weights were trained on maps drawn with OpenCV's integer geometry, so an edge that
is one pixel off is a distribution shift. Every shape here is convex along a row, so one closed
interval of columns per row describes it. The intervals follow from OpenCV's fixed-point
recurrences, solved in closed form; a shape costs O(H) instead of O(H W) integer operations.

A shape is a tensor `[2, N, P, H]` int64: first and last column per row of each of P pieces, empty
if first > last. A thick line has three pieces, because OpenCV leaves small holes between the body
of a line and its round ends, which a single interval would fill.

Source: opencv/opencv 4.x and 5.x, modules/imgproc/src/drawing.cpp (Circle, ThickLine,
FillConvexPoly, Line2, LineIterator, clipLine), facts only.
"""

import functools
import math

import torch
from torch import Tensor

SHIFT = 16  # OpenCV's sub-pixel bits
ONE = 1 << SHIFT
HALF = ONE >> 1
EMPTY_FIRST, EMPTY_LAST = 1 << 40, -(1 << 40)  # an interval that never wins a min / max
# OpenCV's Python bindings take 32-bit coordinates; points beyond them cannot be drawn there.
LIMIT = (1 << 31) - 1


def circle_half_widths(radius: int) -> list[int]:
    """Half width of each row of OpenCV's filled circle, from the centre row to row `radius`."""
    widths = [0] * (radius + 1)
    error, dx, dy, plus, minus = 0, radius, 0, 1, 2 * radius - 1
    while dx >= dy:
        widths[dy] = max(widths[dy], dx)
        widths[dx] = max(widths[dx], dy)
        dy += 1
        error += plus
        plus += 2
        if error > 0:
            error -= minus
            dx -= 1
            minus -= 2
    return widths


def circle(center: Tensor, radius: int, height: int) -> Tensor:
    """Rows of filled circles.

    Args:
        center: [N, 2] int64 pixel (column, row).
        radius: pixels, >= 0.
        height: rows of the canvas.

    Returns:
        [2, N, 1, height] column intervals, not clipped to the canvas width.
    """
    widths = torch.tensor(circle_half_widths(radius), device=center.device)
    rows = torch.arange(height, device=center.device)
    offset = (rows - center[:, 1:]).abs()  # [N H]
    half = widths[offset.clamp(max=radius)]
    return _interval(center[:, :1] - half, center[:, :1] + half, offset <= radius)[:, :, None]


def line(start: Tensor, end: Tensor, thickness: int, height: int, width: int) -> Tensor:
    """Rows of 8-connected lines without anti-aliasing.

    Args:
        start: [N, 2] int64 pixel (column, row), within +-2^31.
        end: [N, 2] in the same form.
        thickness: pixels, >= 1. Above 1 the ends are round.
        height: rows of the canvas.
        width: columns of the canvas; the geometry depends on it, because OpenCV clips the
            outline to the canvas before it rounds.

    Returns:
        [2, N, 1 or 3, height] column intervals; their part outside the canvas is unspecified.
    """
    if thickness < 1:
        raise ValueError(f"line thickness must be >= 1, got {thickness}")
    if thickness == 1:
        return _thin_line(start, end, height, width)[:, :, None]
    # Recent OpenCV first cuts the centre line, in whole pixels, to the canvas and a margin.
    margin = thickness
    start, end, visible = _clip(
        start + margin, end + margin, width - 1 + 2 * margin, height - 1 + 2 * margin
    )
    start, end = start - margin, end - margin
    squared = (end - start).double().square().sum(1, keepdim=True)
    scale = (thickness * HALF + (thickness & 1) * HALF) / squared.sqrt()
    direction = torch.stack((end[:, 1] - start[:, 1], start[:, 0] - end[:, 0]), 1).double()
    normal = (direction * scale).nan_to_num(0.0).round().long()  # round half to even, as cvRound
    p0, p1 = start << SHIFT, end << SHIFT
    corners = torch.stack((p0 + normal, p0 - normal, p1 - normal, p1 + normal), 1)  # [N 4 2]
    body = _merge(
        _convex_fill(corners, height, width),
        *(_outline(corners[:, i - 1], corners[:, i], height, width) for i in range(4)),
    )
    body = _interval(*body, squared > 0)[:, :, None]
    cap = (thickness * HALF + HALF) >> SHIFT
    pieces = torch.cat((body, circle(start, cap, height), circle(end, cap, height)), 2)
    return _interval(*pieces, visible[:, None, None])


def covers(shape: Tensor, width: int) -> Tensor:
    """Mask [N, H, width] of the pixels of a shape [2, N, P, H]."""
    # 16-bit columns: this is the only O(H W) work, and memory bandwidth limits it.
    columns = torch.arange(width, device=shape.device, dtype=torch.int16)
    bounds = shape.clamp(-1, width).to(torch.int16)[..., None]
    pieces = [(columns >= first) & (columns <= last) for first, last in bounds.unbind(2)]
    return functools.reduce(torch.logical_or, pieces)


def _interval(first: Tensor, last: Tensor, keep: Tensor) -> Tensor:
    return torch.stack((torch.where(keep, first, EMPTY_FIRST), torch.where(keep, last, EMPTY_LAST)))


def _merge(*shapes: Tensor) -> Tensor:
    """Row-wise hull [2, N, H] of parts that overlap or touch in every row that they share."""
    first = functools.reduce(torch.minimum, [shape[0] for shape in shapes])
    last = functools.reduce(torch.maximum, [shape[1] for shape in shapes])
    return torch.stack((first, last))


def _convex_fill(corners: Tensor, height: int, width: int) -> Tensor:
    """Scan-line fill of a fixed-point parallelogram [N, 4, 2]; its last row stays unfilled."""
    rows = torch.arange(height, device=corners.device)
    x = corners[..., 0]
    row = (corners[..., 1] + HALF) >> SHIFT  # [N 4]
    x_next, row_next = x.roll(-1, 1), row.roll(-1, 1)
    down = row < row_next  # an edge is walked from its upper vertex
    top, bottom = torch.where(down, row, row_next), torch.where(down, row_next, row)
    x_top, x_bottom = torch.where(down, x, x_next), torch.where(down, x_next, x)
    span = (bottom - top).clamp(min=1)
    slope = torch.div((x_bottom - x_top) * 2 + span, 2 * span, rounding_mode="trunc")
    at = x_top[..., None] + slope[..., None] * (rows - top[..., None])  # [N 4 H]
    active = (top[..., None] <= rows) & (rows < bottom[..., None])
    at = (at + HALF) >> SHIFT
    body = _merge(*_interval(at, at, active).unbind(2))
    column = (x + HALF) >> SHIFT
    visible = ((column.amax(1) >= 0) & (row.amax(1) >= 0) & (column.amin(1) < width)) & (
        row.amin(1) < height
    )
    return _interval(*body, visible[:, None])


def _outline(p: Tensor, q: Tensor, height: int, width: int) -> Tensor:
    """One fixed-point edge, one pixel wide (OpenCV's Line2)."""
    p, q, visible = _clip(p, q, (width << SHIFT) - 1, (height << SHIFT) - 1)
    delta = q - p
    wide = delta[:, 0].abs() > delta[:, 1].abs()  # columns are the major axis
    backward = torch.where(wide, delta[:, 0], delta[:, 1]) < 0
    p, q = torch.where(backward[:, None], q, p), torch.where(backward[:, None], p, q)
    delta = q - p
    major = torch.where(wide, delta[:, 0], delta[:, 1])
    minor = torch.where(wide, delta[:, 1], delta[:, 0])
    step = torch.div(minor * ONE, major | 1, rounding_mode="trunc")[:, None]
    count = (major >> SHIFT)[:, None]  # points 0..count
    begin = p + HALF
    rows = torch.arange(height, device=p.device)

    column0 = (begin[:, :1]) >> SHIFT
    n_first, n_last = _steps_in_row(begin[:, 1:], step, count, rows)
    along_columns = _interval(column0 + n_first, column0 + n_last, n_first <= n_last)

    n = rows - (begin[:, 1:] >> SHIFT)
    column = (begin[:, :1] + n * step) >> SHIFT
    along_rows = _interval(column, column, (n >= 0) & (n <= count))

    tip = (q + HALF) >> SHIFT
    tip_column = tip[:, :1].expand(-1, height)
    last_point = _interval(tip_column, tip_column, rows == tip[:, 1:])
    both = _merge(torch.where(wide[:, None], along_columns, along_rows), last_point)
    return _interval(*both, visible[:, None])


def _steps_in_row(begin: Tensor, step: Tensor, count: Tensor, rows: Tensor):
    """First and last n in 0..count with (begin + n step) >> SHIFT equal to each row."""
    # For a falling edge the mirrored problem has a rising one: floor(a) = r <=> floor(-a-e) = -r-1.
    falling = step < 0
    low = torch.where(falling, -(rows << SHIFT) - ONE + 1, rows << SHIFT)
    offset = torch.where(falling, -begin, begin)
    pace = step.abs().clamp(min=1)
    first = -torch.div(offset - low, pace, rounding_mode="floor")
    last = -torch.div(offset - low - ONE, pace, rounding_mode="floor") - 1
    level = step == 0
    same_row = (begin >> SHIFT) == rows
    first = torch.where(level, torch.where(same_row, 0, EMPTY_FIRST), first.clamp(min=0))
    last = torch.where(level, torch.where(same_row, count, EMPTY_LAST), torch.minimum(last, count))
    return first, last


def _thin_line(p: Tensor, q: Tensor, height: int, width: int) -> Tensor:
    """Bresenham's line from the left end to the right one (OpenCV's LineIterator)."""
    p, q, visible = _clip(p, q, width - 1, height - 1)
    leftward = (q[:, :1] - p[:, :1]) < 0
    p, q = torch.where(leftward, q, p), torch.where(leftward, p, q)
    dx, dy = (q - p).abs().unbind(1)
    sign = torch.where(q[:, 1] < p[:, 1], -1, 1)[:, None]
    steep = (dy > dx)[:, None]
    dx, dy = dx[:, None], dy[:, None]
    m = (torch.arange(height, device=p.device) - p[:, 1:]) * sign  # rows gone from p, [N H]

    twice = (2 * dy).clamp(min=1)
    enter = torch.div(dx * (2 * m - 1), twice, rounding_mode="floor") + 1
    leave = torch.div(dx * (2 * m + 1), twice, rounding_mode="floor")
    flat = dy == 0
    enter = torch.where(flat | (m == 0), 0, enter)
    leave = torch.where(flat, dx, torch.minimum(leave, dx))
    steep_at = torch.div(2 * dx * m + dy - 1, twice, rounding_mode="floor")
    first = p[:, :1] + torch.where(steep, steep_at, enter)
    last = p[:, :1] + torch.where(steep, steep_at, leave)
    return _interval(first, last, (m >= 0) & (m <= dy) & visible[:, None])


def _clip(p: Tensor, q: Tensor, right: int, bottom: int) -> tuple[Tensor, Tensor, Tensor]:
    """Cut segments to [0, right] x [0, bottom] with OpenCV's order and rounding.

    Returns:
        The new ends [N, 2] and a mask [N] of the segments that meet the canvas.
    """
    x1, y1 = p.unbind(1)
    x2, y2 = q.unbind(1)

    def code_x(x):
        return torch.where(x < 0, -1, torch.where(x > right, 1, 0))

    def code_y(y):
        return torch.where(y < 0, -1, torch.where(y > bottom, 1, 0))

    def same_side(a, b):
        return (a == b) & (a != 0)

    def cut(apply, code, limit, along, across, along_from, along_to, across_from, across_to):
        # Moves `along` to the border, with doubles and truncation toward zero as in clipLine.
        border = torch.where(code < 0, 0, limit)
        span = (along_to - along_from).double()
        shift = (border - along).double() * (across_to - across_from).double() / span
        moved = across + shift.nan_to_num(0.0, 0.0, 0.0).long()
        return torch.where(apply, border, along), torch.where(apply, moved, across)

    cx1, cx2, cy1, cy2 = code_x(x1), code_x(x2), code_y(y1), code_y(y2)
    possible = ~(same_side(cx1, cx2) | same_side(cy1, cy2))
    y1, x1 = cut(possible & (cy1 != 0), cy1, bottom, y1, x1, y1, y2, x1, x2)
    y2, x2 = cut(possible & (cy2 != 0), cy2, bottom, y2, x2, y1, y2, x1, x2)
    cx1, cx2 = code_x(x1), code_x(x2)
    possible = possible & ~same_side(cx1, cx2)
    x1, y1 = cut(possible & (cx1 != 0), cx1, right, x1, y1, x1, x2, y1, y2)
    x2, y2 = cut(possible & (cx2 != 0), cx2, right, x2, y2, x1, x2, y1, y2)
    return torch.stack((x1, y1), 1), torch.stack((x2, y2), 1), possible


def to_pixels(uv: Tensor) -> Tensor:
    """Pixel coordinates truncated toward zero; not-a-number becomes a point far outside."""
    return uv.nan_to_num(-math.inf).clamp(-LIMIT, LIMIT).long()

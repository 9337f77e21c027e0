"""The order of a vector's numbers, by the names that a LeRobot dataset gives them."""

import re
from collections.abc import Sequence

import numpy as np
from absl import logging

from evac_jax.errors import DataError

XYZ, TURN = ("x", "y", "z"), ("rx", "ry", "rz")
ACTION = (*XYZ, *TURN, "gripper")
# By --state.
STATES = {
    "axis_angle": (*XYZ, *TURN, "gripper", "gripper"),
    "quaternion": (*XYZ, "qx", "qy", "qz", "qw", "gripper"),
}
# Name -> what it is. Conversions of LIBERO call a rotation vector roll, pitch, yaw too.
KNOWN = {
    **{name: name for name in (*ACTION, "qx", "qy", "qz", "qw")},
    **dict(zip(("roll", "pitch", "yaw"), TURN, strict=True)),
    **dict(zip(("wx", "wy", "wz"), TURN, strict=True)),
    **dict(zip(("axis_angle1", "axis_angle2", "axis_angle3"), TURN, strict=True)),
    **dict.fromkeys(
        ("gripper_opening", "gripper_closes", "gripper_pos", "gripper_open"), "gripper"
    ),
    **dict.fromkeys(("gripper_0", "gripper_1", "gripper_left", "gripper_right"), "gripper"),
}
PREFIX = re.compile(r"(?:eef?|tcp|delta|d)?[._]?(?=.)")


def order_of(names: Sequence[str], expected: Sequence[str], where: str) -> list[int]:
    """Return where each expected number stands, as the names tell.

    Names that are not known are logged, and leave the numbers where they are.

    Args:
        names: of the numbers; none = the dataset does not tell.
        expected: what the numbers must be, in order: names that `KNOWN` points to.
        where: begins messages.

    Raises:
        DataError: known names that are not the expected ones, or in another order while not all
            are known.
    """
    told = [KNOWN.get(name.lower()) or KNOWN.get(PREFIX.sub("", name.lower(), 1)) for name in names]
    if None not in told and sorted(map(str, told)) == sorted(expected):
        places = [[n for n, kind in enumerate(told) if kind == wanted] for wanted in expected]
        order = [places[n][expected[:n].count(wanted)] for n, wanted in enumerate(expected)]
        if order != list(range(len(expected))):
            logging.info("%s: put into our order by their names %s", where, list(names))
        return order
    for n, (kind, wanted) in enumerate(zip(told, expected, strict=False)):
        if kind not in (None, wanted):
            raise DataError(
                f"{where}: expected the numbers {' '.join(expected)}, got {names[n]!r} as number "
                f"{n} of {list(names)}; choose another feature or --state, or correct the names in "
                "meta/info.json"
            )
    if names:
        told_as = "%s: the names %s do not tell all numbers; they are taken for %s in this order"
        logging.warning(told_as, where, list(names), " ".join(expected))
    return list(range(len(expected)))


def put_in_order(values: np.ndarray, order: Sequence[int]) -> np.ndarray:
    """Return values [T n] in an order of `order_of`; those of another width as they are."""
    return values[:, order] if values.shape[1:] == (len(order),) else values

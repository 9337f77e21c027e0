import numpy as np
import pytest

from evac_jax.errors import DataError
from evac_jax.tools.episodes.export_lerobot import ACTION as EXPORTED_ACTION
from evac_jax.tools.episodes.export_lerobot import STATE as EXPORTED_STATE
from evac_jax.tools.episodes.lerobot_names import ACTION, STATES, order_of, put_in_order

QUATERNION, AXIS_ANGLE = STATES["quaternion"], STATES["axis_angle"]


@pytest.mark.parametrize(
    ("names", "expected", "order"),
    [
        (" ".join(EXPORTED_STATE), QUATERNION, range(8)),
        (" ".join(EXPORTED_ACTION), ACTION, range(7)),
        ("x y z roll pitch yaw gripper gripper", AXIS_ANGLE, range(8)),
        ("X Y Z axis_angle1 axis_angle2 axis_angle3 gripper gripper", AXIS_ANGLE, range(8)),
        ("ee.x ee.y ee.z ee.wx ee.wy ee.wz ee.gripper_pos", ACTION, range(7)),
        ("x y z qw qx qy qz gripper", QUATERNION, (0, 1, 2, 4, 5, 6, 3, 7)),
        ("gripper delta_x delta_y delta_z rx ry rz", ACTION, (1, 2, 3, 4, 5, 6, 0)),
        ("gripper x y z rx ry rz gripper", AXIS_ANGLE, (1, 2, 3, 4, 5, 6, 0, 7)),
        ("", ACTION, range(7)),
    ],
)
def test_known_names_tell_the_order_without_a_warning(names, expected, order, caplog):
    with caplog.at_level("WARNING", logger="absl"):
        assert order_of(names.split(), expected, "action") == list(order)
    assert not caplog.records


@pytest.mark.parametrize("names", ["state", "x y z a b c gripper"])
def test_unknown_names_leave_the_order_and_are_told(names, caplog):
    with caplog.at_level("WARNING", logger="absl"):
        assert order_of(names.split(), ACTION, "action") == list(range(7))
    assert [f"names {names.split()} do not tell" in text for text in caplog.messages] == [True]


@pytest.mark.parametrize(
    ("names", "told"),
    [
        ("gripper x y z a b c", "got 'gripper' as number 0"),
        ("x y z qx qy qx qw gripper", "got 'qx' as number 3"),
    ],
)
def test_known_names_in_the_place_of_others_are_refused(names, told):
    with pytest.raises(DataError, match=f"action: expected the numbers x y z rx .*{told}"):
        order_of(names.split(), ACTION, "action")


def test_numbers_of_another_width_are_left_for_others_to_refuse():
    values = np.arange(6).reshape(2, 3)
    np.testing.assert_array_equal(put_in_order(values, [2, 0, 1]), [[2, 0, 1], [5, 3, 4]])
    np.testing.assert_array_equal(put_in_order(values, [1, 0]), values)

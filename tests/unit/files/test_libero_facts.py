"""What recordings and policies tell of LIBERO goes with them, and is compared."""

import pytest

from evac_jax.config.libero import LiberoConfig
from evac_jax.errors import DataError
from evac_jax.files import libero_facts

FAST = LiberoConfig(image_size=64, crop=(0.03, 0.99, 0.06, 0.86), action_repeat=2).facts()
AS_JSON = FAST | {"crop": [0.03, 0.99, 0.06, 0.86]}


def test_card_tells_its_own_facts_or_those_of_what_it_started_from():
    assert libero_facts.told({}) == {}
    assert libero_facts.told({"libero": {}, "start": "a digest"}) == {}
    assert libero_facts.told({"libero": FAST, "start": {"libero": {"image_size": 8}}}) == FAST
    assert libero_facts.told({"start": {"start": {"libero": FAST}}}) == FAST


def test_differences_are_named_whether_or_not_they_were_json():
    assert libero_facts.differences(FAST, AS_JSON) == ""
    told = libero_facts.differences(AS_JSON, LiberoConfig(image_size=64).facts())
    assert told == (
        "crop ([0.03, 0.99, 0.06, 0.86] and [0.0, 1.0, 0.0, 1.0]), action_repeat (2 and 1)"
    )


def test_recordings_of_another_pace_are_not_joined():
    other = FAST | {"suite": "libero_goal"}
    common = libero_facts.common([{"libero": FAST}, {"libero": other}])
    assert common == {key: value for key, value in FAST.items() if key != "suite"}
    assert libero_facts.common([{}, {}]) == {}
    for faster in ({"libero": FAST | {"action_repeat": 1}}, {}):
        with pytest.raises(DataError, match="action_repeat"):
            libero_facts.common([{"libero": FAST}, faster])

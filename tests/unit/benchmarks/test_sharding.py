import argparse

import numpy as np
import pytest

from benchmarks import sharding
from benchmarks.sharding import Layout


@pytest.mark.slow
def test_loss_and_gradients_are_those_of_one_device_when_cut_over_devices_and_processes():
    rows = sharding.measure([sharding.ONE, Layout(2, 1, 2)], ("ppo",))
    assert [row["layout"] for row in rows] == ["1p-1x1", "2p-1x2"]
    assert rows[0]["figures"]["grad_norm"] > 0
    for row in rows[1:]:
        # Else nothing would have been tested: parameters are cut, and parts are exchanged.
        assert row["figures"]["cut"] > 0.8
        assert row["figures"]["received"]["all-gather"] > 1e6
        for name in sharding.COMPARED:
            assert row["difference"][name] < sharding.GOAL, (row["layout"], name)


def test_one_wrong_entry_of_one_small_gradient_is_seen():
    told = {"loss": 1e-3, "loss_terms": 1.0, "grad_norm": 2.0}
    golden = {"large": np.full((4, 4), 100.0), "small": np.array([1e-3, 2e-3])}
    wrong = {"large": golden["large"], "small": np.array([1e-3, 2.2e-3])}
    found = sharding.compare(told | {"loss": 2e-3}, wrong, told, golden)
    assert found["gradients"] == pytest.approx(0.1)
    assert found["worst"] == "small"
    assert found["loss"] == pytest.approx(1e-3)  # of its terms, which cancel
    assert found["grad_norm"] == 0


@pytest.mark.parametrize("name", ["1x2", "3p-1x2", "1p-3x1", "2p-1x1"])
def test_impossible_layouts_are_refused(name):
    with pytest.raises(argparse.ArgumentTypeError, match=name):
        Layout.parse(name)

import math

import pytest

from benchmarks import guards
from benchmarks.guards import Outcome
from evac_jax import overrides
from evac_jax.config import from_config_dict


def _line(iteration, imagined, real, false=None, alarm=0.0):
    figures = {"imagined_success": imagined, "real_success": real, "twin_alarm": alarm}
    figures |= {"false_success": false} if false is not None else {}
    return {"iteration": iteration} | {f"eval/{name}": value for name, value in figures.items()}


def test_twin_figures_are_means_over_the_last_iterations_and_the_first_alarm():
    lines = [
        {"iteration": 0, "eval/ground_truth/success_rate": 0.2},
        _line(1, 0.9, 0.9, 0.0),
        _line(2, 0.4, 0.2, 0.5, alarm=1.0),
        _line(3, 0.8, 0.2, 0.75, alarm=1.0),
    ]
    assert guards.twin_figures(lines, 2) == {
        "imagined": pytest.approx(0.6),
        "replayed": pytest.approx(0.2),
        "false_success": pytest.approx((0.4 * 0.5 + 0.8 * 0.75) / 1.2),
        "alarm": 2,
    }
    quiet = guards.twin_figures([_line(1, 0.0, 0.0)], 3)
    assert quiet["false_success"] is None
    assert quiet["alarm"] is None


def test_table_and_figures_tell_the_gap_and_what_was_gained():
    bad = Outcome(before=0.3, after=0.2, imagined=0.9, replayed=0.3, false_success=0.7, alarm=4)
    shipped = Outcome(0.3, 0.6, 0.6, 0.6, None, None)
    outcomes = {"shipped classifier": [shipped], "bad classifier": [bad, bad]}
    numbers = guards.figures(outcomes)
    assert numbers["gap_bad"] == pytest.approx(60)
    assert numbers["gain_bad"] == pytest.approx(-10)
    assert numbers["alarms_bad"] == 1
    assert math.isnan(numbers["gap_guarded"])
    lines = guards.table(outcomes).splitlines()
    assert lines[2].split()[-6:] == ["60.0", "60.0", "-", "30.0", "60.0", "-"]
    assert lines[3].split()[-6:] == ["90.0", "30.0", "70.0", "30.0", "20.0", "4,4"]


@pytest.mark.parametrize("variant", guards.VARIANTS)
def test_settings_of_every_variant_are_fields_of_the_configuration(variant, tmp_path):
    config = overrides.load(str(guards.ROOT / "configs/grpo.py"))
    for name, value in guards.VARIANTS[variant].items():
        section, field = name.split(".")
        assert field in config[section]
        config[section][field] = value
    for name in ("reward.checkpoint", "env.keyframe_data"):
        section, field = name.split(".")
        config[section][field] = ",".join(str(tmp_path) for _ in config[section][field].split(","))
    from_config_dict(config.to_dict())

import dataclasses
import math

import jax
import pytest

from benchmarks import guards
from benchmarks.guards import Outcome
from evac_jax.errors import ConfigError
from evac_jax.shapes import EpisodeShapes, check_sizes


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


def _present(settings, tmp_path):
    """The settings with a folder that exists in the place of every other one."""
    folders = {
        name: ",".join(str(tmp_path) for _ in settings[name].split(","))
        for name in ("reward.checkpoint", "env.keyframe_data")
        if name in settings
    }
    return settings | folders


@pytest.mark.parametrize("variant", guards.VARIANTS)
def test_run_of_every_variant_passes_the_checks_before_training(variant, tmp_path):
    settings = guards.settings_of(variant, tmp_path)
    config = guards.config_of(_present(settings, tmp_path))
    episode = EpisodeShapes((1, 64, 64, 3), chunk=8, max_steps=config.env.max_episode_steps)
    mesh = jax.make_mesh((1,), ("data",))
    check_sizes(config, mesh, mesh, episode)
    broken = dataclasses.replace(episode, max_steps=episode.max_steps + 1)
    with pytest.raises(ConfigError, match="multiple of the world model's chunk"):
        check_sizes(config, mesh, mesh, broken)


def test_every_guard_is_on_in_the_last_variant():
    for guard in guards.GUARDS.values():
        assert guard.items() <= guards.VARIANTS["bad, all guards"].items()


@pytest.mark.parametrize("variant", guards.VARIANTS)
def test_checkpoint_of_every_variant_can_be_evaluated(variant, tmp_path):
    """The reference policy is in a checkpoint exactly when the evaluation expects it."""
    settings = _present(guards.settings_of(variant, tmp_path), tmp_path)
    trained = guards.config_of(settings)
    evaluated = guards.config_of(guards.evaluation_settings(settings))
    assert (trained.algo.kl_beta > 0) == (evaluated.algo.kl_beta > 0)
    plain = guards.config_of({})
    algo = dataclasses.replace(evaluated.algo, kl_beta=plain.algo.kl_beta)
    assert dataclasses.replace(evaluated, algo=algo) == plain


def test_listing_shows_the_flags_and_runs_nothing(tmp_path, monkeypatch, capsys):
    work = tmp_path / "work"
    monkeypatch.setattr("sys.argv", ["guards", "--list", "--work", str(work)])
    guards.main()
    shown = capsys.readouterr().out
    assert f"  --config.env.keyframe_data={work}/demonstrations" in shown.splitlines()
    assert all(f"{variant}:" in shown.splitlines() for variant in guards.VARIANTS)
    assert not work.exists()


def test_variant_that_cannot_run_is_named_before_anything_runs(tmp_path, monkeypatch):
    missing = {"reward.checkpoint": f"{tmp_path}/none"}
    monkeypatch.setitem(guards.VARIANTS, "bad classifier", missing)
    with pytest.raises(ConfigError, match="bad classifier: .*(?s:.*)none' does not exist"):
        guards.prepare(["shipped classifier", "bad classifier"], tmp_path)
    guards.prepare(["shipped classifier"], tmp_path)
    assert not any(tmp_path.iterdir())

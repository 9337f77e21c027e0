import json
import math

import pytest

from benchmarks import learning, runs
from benchmarks.learning import Bench, Result, figures, table


def _result(greedy, sampled, *, start=(0.4, 0.3), minutes=8.0, iteration=4):
    return Result(
        start={"greedy": start[0], "sampled": start[1]},
        after={"greedy": greedy, "sampled": sampled},
        iteration=iteration,
        training_minutes=minutes - 1,
        minutes=minutes,
    )


ARMS = {
    "grpo": {0: _result(0.6, 0.55, minutes=9.0), 1: _result(0.7, 0.45)},  # +20 +25, +30 +15
    "ceiling": {0: _result(0.7, 0.7), 1: _result(0.7, 0.7)},  # +30, +40
    "ppo": {0: _result(0.55, 0.42), 1: _result(0.53, 0.44)},  # +15 +12, +13 +14
}


def test_figures_are_differences_in_points_and_the_smaller_share():
    numbers = figures(ARMS)
    expected = {
        "greedy_gain_mean": 25.0,
        "greedy_gain_min": 20.0,
        "sampled_gain_mean": 20.0,
        "ppo_gain_mean": 13.0,
        "ceiling_share": 0.5,  # sampled: 20 / 40; greedy: 25 / 30
        "minutes_max": 9.0,
    }
    assert list(numbers) == list(expected)  # the order of the last line
    assert numbers == pytest.approx(expected)


def test_missing_arms_and_useless_ceilings_give_nan_instead_of_a_number():
    assert math.isnan(figures({"grpo": ARMS["grpo"]})["ppo_gain_mean"])
    no_gain = ARMS | {"ceiling": {0: _result(0.4, 0.7)}}
    assert math.isnan(figures(no_gain)["ceiling_share"])


def test_table_has_a_line_per_run_and_a_mean_per_arm():
    lines = table(ARMS).splitlines()
    assert len(lines) == 2 + 3 * 3
    assert " ".join(lines[2].split()) == "grpo 0 4 40.0 30.0 60.0 55.0 +20.0 +25.0 9.0 8.0"
    assert " ".join(lines[4].split()) == "grpo mean +25.0 +20.0"


def test_chart_is_drawn_when_runs_were_evaluated_at_different_iterations(tmp_path):
    runs = [{0: 0.2, 4: 0.3, 8: 0.5}, {0: 0.2, 4: 0.4}]
    learning.draw(tmp_path / "curve.png", {"grpo": runs, "ppo": runs[:1]})
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


class _Launches:
    """Stands for launch.py: counts, and leaves the files that it would leave."""

    def __init__(self, monkeypatch):
        self.calls = []
        monkeypatch.setattr(runs.subprocess, "run", self._run)
        self.returncode = 0

    def _run(self, command, **_):
        flags = dict(part.lstrip("-").split("=", 1) for part in command[2:])
        self.calls.append(flags)
        folder = learning.Path(flags["config.log.dir"]) / flags["config.log.run"]
        folder.mkdir()
        if flags.get("mode") == "eval":
            greedy = float(flags["config.policy.eval_temperature"]) == 0
            rate = 0.6 if "config.checkpoint.step" in flags else 0.4
            outcome = {"ground_truth": {"rate": rate if greedy else rate - 0.1}}
            (folder / "evaluation.json").write_text(json.dumps({"success": outcome}))
        else:
            name = "eval/ground_truth/success_rate"
            metrics = [{"iteration": 0, name: 0.4}, {"iteration": 4, name: 0.7}]
            (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, metrics)))
            (folder / "config.json").write_text(json.dumps({"policy": {"temperature": 0.5}}))
            (folder / "summary.json").write_text(json.dumps({"seconds": {"step": 60.0}}))
        return runs.subprocess.CompletedProcess(command, self.returncode)


def _bench(work, **settings):
    return Bench(
        work, settings, iterations=4, scenes=512, selection_scenes=256, interval=4
    )  # fmt: skip


def test_runs_are_chosen_and_reported_on_different_scenes_and_never_repeated(tmp_path, monkeypatch):
    launches = _Launches(monkeypatch)
    result = _bench(tmp_path).result("ceiling", 1)
    assert result.iteration == 4
    assert result.gain("greedy") == pytest.approx(20)
    assert result.gain("sampled") == pytest.approx(20)
    assert result.training_minutes == 1.0
    training, *evaluations = launches.calls
    assert training["config.env.simulator"] == "ground_truth"
    assert training["config.seed"] == "1"
    assert training["config.eval.starts"] == "(1000000, 2000000)"
    assert [e["config.eval.starts"] for e in evaluations] == ["(2000000, 3000000)"] * 4
    assert {e["config.policy.eval_temperature"] for e in evaluations} == {"0.0", "0.5"}
    restored = [e["config.checkpoint.step"] for e in evaluations if "config.checkpoint.step" in e]
    assert restored == ["4", "4"]

    again = _bench(tmp_path).result("ceiling", 1)
    assert again == result
    assert len(launches.calls) == 5
    _bench(tmp_path).result("ceiling", 2)  # the start policy's figures serve every seed
    assert len(launches.calls) == 5 + 3


def test_changed_settings_or_weights_run_again(tmp_path, monkeypatch):
    launches = _Launches(monkeypatch)
    weights = tmp_path / "reward"
    weights.mkdir()
    (weights / "model.safetensors").write_text("a")
    settings = {"reward.checkpoint": str(weights)}
    bench = _bench(tmp_path / "work", **settings)
    first = bench.train("grpo", 0)
    assert bench.train("grpo", 0) == first
    assert _bench(tmp_path / "work", **settings, **{"optim.lr": "1e-4"}).train("grpo", 0) != first
    (weights / "model.safetensors").write_text("b")
    assert bench.train("grpo", 0) != first
    assert len(launches.calls) == 3


def test_interrupted_run_starts_anew_so_that_its_minutes_are_its_own(tmp_path, monkeypatch):
    launches = _Launches(monkeypatch)
    folder = _bench(tmp_path).train("grpo", 0)
    (folder / "minutes.json").unlink()
    assert _bench(tmp_path).train("grpo", 0) == folder
    assert len(launches.calls) == 2


def test_failed_command_ends_the_benchmark_with_its_last_words(tmp_path, monkeypatch):
    launches = _Launches(monkeypatch)
    launches.returncode = 2
    with pytest.raises(SystemExit, match="ended with status 2"):
        _bench(tmp_path).train("grpo", 0)

import json

import pytest

from evac_jax.errors import DataError
from evac_jax.tools.policy import choose


def _evaluation(folder, name, rate, **changes):
    """Write an evaluation and the policy that it is of."""
    policy = folder / f"policy_{name}"
    policy.mkdir()
    (policy / "config.json").write_text(json.dumps(name))
    values = {"policy": str(policy), "run": "", "lora_adapter": ""} | changes
    values["success"] = {"ground_truth": {"rate": rate}}
    (folder / name).mkdir()
    (folder / name / "evaluation.json").write_text(json.dumps(values))
    return str(folder / name)


def _main(folders, out):
    choose.main(["--evaluations", *folders, "--between", "0.15", "0.5", "--out", str(out)])


def test_first_policy_in_the_range_is_copied(tmp_path):
    rates = {"a": 0.1, "b": 0.2, "c": 0.3}
    _main([_evaluation(tmp_path, name, rate) for name, rate in rates.items()], tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == "b"


def test_success_of_each_is_told_where_none_is_in_the_range(tmp_path):
    folders = [_evaluation(tmp_path, "a", 0.1), _evaluation(tmp_path, "b", 0.9)]
    with pytest.raises(DataError, match=r"policy_a: 0\.100, .*policy_b: 0\.900"):
        _main(folders, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_folder_that_is_no_evaluation_of_a_policy_is_refused(tmp_path):
    with pytest.raises(DataError, match="expected the folder of"):
        _main([str(tmp_path)], tmp_path / "out")
    with pytest.raises(DataError, match="is of runs/x, expected a policy's folder"):
        _main([_evaluation(tmp_path, "a", 0.2, run="runs/x")], tmp_path / "out")

import sys

import pytest

from configs import grpo
from evac_jax import checkpoint
from evac_jax.config import import_string
from evac_jax.config.algorithms import load_algorithm
from evac_jax.config.build import from_config_dict, to_dict
from evac_jax.errors import CheckpointError, ConfigError
from evac_jax.files import cards
from evac_jax.tools.policy import export

CODE = """
class Whole:
    spec = parts = reset = step = park = close = None

class Half:
    reset = step = None

class Judge:
    def __init__(self, *arguments): pass
    def probability(self, frames, task): return task
    def to(self, device): return self

class Algorithm:
    class Config: pass
    problems = make_update = print

number = 3
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A user's folder with the module `my_code`, which is the working directory."""
    (tmp_path / "my_code.py").write_text(CODE)
    (tmp_path / "my_broken_code.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    for name in ("my_code", "my_broken_code"):
        sys.modules.pop(name, None)


def told(text, **wanted):
    with pytest.raises(ConfigError) as error:
        import_string.load(text, **wanted)
    return str(error.value)


def test_module_is_found_in_the_working_directory(mine):
    whole = import_string.load("my_code:Whole", makes=import_string.ENVIRONMENT)
    assert whole.__module__ == "my_code"


def test_message_says_what_is_wrong_with_the_users_code(mine, tmp_path):
    assert "expected \"module:attribute\", got ':Whole'" in told(":Whole")
    assert f"looked in {tmp_path} and in PYTHONPATH): ModuleNotFoundError" in told("nowhere:x")
    assert "'my_code' has no attribute 'whole'" in told("my_code:whole")
    assert "ZeroDivisionError: division by zero" in told("my_broken_code:x")
    assert "to be a function or a class, got 3" in told("my_code:number", makes=["step"])
    missing = told("my_code:Half", makes=import_string.ENVIRONMENT)
    assert "'my_code:Half' lacks parts, park, close; expected parts, reset, step" in missing


def values(**changes):
    values = grpo.get_config().to_dict()
    for name, value in changes.items():
        section, field = name.split("__")
        values[section][field] = value
    return values


def test_all_mistakes_of_own_code_come_in_one_message(mine):
    wrong = values(eval__ground_truth="my_code:Half", reward__judge="nowhere:x", reward__veto=0.5)
    with pytest.raises(ConfigError) as error:
        from_config_dict(wrong)
    message = str(error.value)
    assert "config.eval.ground_truth: 'my_code:Half' lacks parts" in message
    assert "config.reward.judge: cannot import 'nowhere:x'" in message
    assert "config.reward.veto: compares classifiers" in message


def test_own_code_needs_no_classifier_and_is_recorded_as_it_was_given(mine):
    own = values(
        eval__ground_truth="my_code:Whole", reward__judge="my_code:Judge", reward__checkpoint=""
    )
    config = from_config_dict(own | {"algorithm": "examples.rloo:RLOO"})
    found = to_dict(config)
    assert found["algorithm"] == "examples.rloo:RLOO"
    assert found["eval"]["ground_truth"] == "my_code:Whole"
    assert found["reward"]["judge"] == "my_code:Judge"
    assert from_config_dict(found) == config


def test_code_that_a_runs_files_name_is_not_imported(mine, tmp_path):
    config = from_config_dict(grpo.get_config().to_dict())
    run = tmp_path / "run"
    run.mkdir()
    saved = to_dict(config) | {"algorithm": "my_broken_code:x"}
    saved["eval"]["ground_truth"] = saved["reward"]["judge"] = "my_broken_code:x"
    cards.write_json(run / checkpoint.CONFIG_FILE, saved)
    with pytest.raises(CheckpointError, match="the run has 'my_broken_code:x', now 'grpo'"):
        checkpoint.check_resumable(checkpoint.saved_config(run), to_dict(config))
    assert export.find_run(run).facts["algorithm"] == "my_broken_code:x"
    assert "my_broken_code" not in sys.modules


def test_mistyped_choice_names_the_import_form():
    with pytest.raises(ConfigError) as error:
        from_config_dict(values(eval__ground_truth="minature", reward__judge="mine"))
    message = str(error.value)
    assert "'none') or 'module:attribute', got 'minature'. Did you mean 'miniature'?" in message
    assert "expected one of ('classifier', 'vlm') or 'module:attribute', got 'mine'" in message
    with pytest.raises(ConfigError, match="or 'module:attribute', got 'rloo'"):
        load_algorithm("rloo")


def test_algorithm_whose_settings_the_trainer_cannot_read_is_refused(mine):
    with pytest.raises(ConfigError, match=r"config\.algorithm: .* derived from algos\.policy_gr"):
        load_algorithm("my_code:Algorithm")
    with pytest.raises(ConfigError, match="'my_code:Whole' lacks Config, problems, make_update"):
        load_algorithm("my_code:Whole")

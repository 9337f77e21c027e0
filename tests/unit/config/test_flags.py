import os
import subprocess
import sys

import pytest

from evac_jax.config.flags import arguments, check_flags, preset_names, read_config, read_preset
from evac_jax.errors import ConfigError


def test_mistyped_fields_are_listed_together_with_hints(repository, monkeypatch):
    monkeypatch.chdir(repository)
    flags = ["--config.algo.clip_hihg=0.3", "--config.group_size", "4", "--config.seed=1.5"]
    with pytest.raises(ConfigError) as error:
        check_flags(flags)
    message = str(error.value)
    assert "--config.algo.clip_hihg: unknown field. Did you mean 'algo.clip_high'?" in message
    assert "--config.group_size: unknown field. Did you mean 'algo.group_size'?" in message
    assert "--config.seed: expected int, got '1.5'" in message


def test_valid_fields_pass(repository, monkeypatch):
    monkeypatch.chdir(repository)
    flags = ["--config.algo.group_size=4", "--config.eval.starts=(3, 9)", "--mode=eval"]
    check_flags(flags)
    with pytest.raises(ConfigError) as error:
        check_flags([*flags, "--config.sed=1"])
    assert str(error.value).count("--config.") == 1


@pytest.mark.parametrize(
    ("flag", "why"),
    [
        (
            "--noconfig.log.tensorbord",
            "--noconfig.log.tensorbord: unknown field. Did you mean 'log.tensorboard'?",
        ),
        ("--noconfig.optim.lr", "sets a bool to False and takes no value; use --config.optim.lr="),
        ("--noconfig.video.save=1", "--noconfig.video.save: sets a bool to False and takes no val"),
        ("--config.video.save=maybe", "--config.video.save: expected bool, got 'maybe'"),
    ],
)
def test_switch_is_refused_when_it_is_mistyped(repository, monkeypatch, flag, why):
    monkeypatch.chdir(repository)
    with pytest.raises(ConfigError) as error:
        check_flags([flag, "--mode=eval"])
    assert why in str(error.value)


def test_switch_takes_no_value_from_the_next_argument(repository, monkeypatch):
    monkeypatch.chdir(repository)
    check_flags(["--config.video.save", "--noconfig.log.tensorboard", "--mode=eval"])


def test_arguments_are_read_from_flag_files_and_begin_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    (tmp_path / "flags").write_text("--config=~/my.py:lora\n--config.seed=1\n")
    given = [f"--flagfile={tmp_path}/flags", "--config.log.run=a~/b"]
    assert arguments(given) == ["--config=/home/me/my.py:lora", "--config.seed=1", given[1]]
    with pytest.raises(ConfigError, match="--flagfile: .*No such file"):
        arguments(["--flagfile=nothing"])


def test_missing_preset_file_is_named():
    with pytest.raises(ConfigError, match="no file 'configs/nothing.py'"):
        check_flags(["--config=configs/nothing.py"])


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("def get_config(:\n", r"SyntaxError: invalid syntax \(mine.py, line 1\)"),
        ("import os\nos.nothing()\n", "mine.py, line 2: AttributeError: module 'os'"),
    ],
)
def test_preset_that_cannot_be_run_is_named_with_the_line(tmp_path, monkeypatch, text, why):
    (tmp_path / "mine.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path / "mine.py", "mine.py"):
        with pytest.raises(ConfigError, match=why):
            check_flags([f"--config={path}"])


def test_paths_are_not_looked_at_when_a_configuration_is_only_read(
    repository, tmp_path, monkeypatch
):
    (tmp_path / "config.json").write_text('{"model_type": "openvla"}')
    monkeypatch.chdir(tmp_path)  # a folder of another model
    config = read_config(str(repository / "configs/grpo.py:lora"))
    assert config.world_model.checkpoint == ""


def test_preset_that_is_suggested_exists_from_any_folder(tmp_path, monkeypatch, repository):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=f"try --config={repository}/configs/grpo.py"):
        check_flags(["--config=configs/grpo.py"])


def test_entry_of_a_tuple_is_refused_as_only_the_whole_can_be_set(repository, monkeypatch):
    monkeypatch.chdir(repository)
    with pytest.raises(ConfigError, match=r"expected the whole value, as --config\.eval\.starts="):
        check_flags(["--config.eval.starts[0]=3"])


@pytest.mark.parametrize(
    ("value", "right"), [("(cpu,)", '("cpu",)'), ("(cpu, cuda:0)", '("cpu","cuda:0",)')]
)
def test_text_in_a_tuple_is_refused_with_the_flag_that_is_read(
    repository, monkeypatch, value, right
):
    monkeypatch.chdir(repository)
    with pytest.raises(ConfigError) as error:
        check_flags([f"--config.simulator.devices={value}"])
    assert f"needs quotes, as --config.simulator.devices='{right}'" in str(error.value)
    assert read_preset(
        "configs/grpo.py", [f"--config.simulator.devices={right}"]
    ).simulator.devices == tuple(right.strip("()").replace('"', "").rstrip(",").split(","))


def test_preset_is_changed_by_flags_as_launch_reads_them(repository, monkeypatch):
    monkeypatch.chdir(repository)
    flags = ["--config.optim.lr=1", "--config.eval.starts", "(3, 9)", "--config.policy.remat=full"]
    flags += ["--config.algo.micro_batch=8", "--config.simulator.devices=cuda:0"]
    values = read_preset("configs/grpo.py:lora", [*flags, "--noconfig.video.save"])
    assert (values.optim.lr, values.eval.starts) == (1.0, (3, 9))
    assert (values.policy.remat, values.policy.lora_rank) == ("full", 32)
    assert (values.algo.micro_batch, values.simulator.devices) == (8, ("cuda:0",))
    assert values.video.save is False
    assert "lora" in preset_names("configs/grpo.py")


@pytest.mark.parametrize("flag", ["--config.video.save=perhaps", "rest", "--devices=2"])
def test_preset_is_refused_when_a_flag_cannot_be_read(repository, monkeypatch, flag):
    monkeypatch.chdir(repository)
    with pytest.raises(ConfigError, match=r"these overrides cannot be used:\s"):
        read_preset("configs/grpo.py", [flag])


def launch(repository, *flags):
    return subprocess.run(
        [sys.executable, "launch.py", *flags],
        cwd=repository,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_mistyped_field_is_refused_when_no_preset_is_named(repository):
    done = launch(repository, "--config.trian.iterations=2", "--config.optim.lrr=1")
    assert done.returncode == 2
    assert "--config.trian.iterations: unknown field. Did you mean 'train.iterations'?" in (
        done.stderr
    )
    assert "--config.optim.lrr: unknown field. Did you mean 'optim.lr'?" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("flag", "why"),
    [
        ("--mode=trian", "value should be one of <train|eval|collect|export|serve>"),
        ("--mod=train", "Unknown command line flag 'mod'. Did you mean: mode ?"),
        ("--nologtostderr=3", "--nologtostderr=3 does not take an argument"),
        ("train", "expected flags alone, such as --config.seed=1, got ['train']"),
    ],
)
def test_argument_that_is_no_flag_is_refused_with_one_message(repository, flag, why):
    done = launch(repository, flag)
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("ConfigError: ")
    assert why in line


def test_preset_is_found_at_home(repository, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "my.py").write_text("from configs.grpo import get_config\n")
    done = launch(repository, "--config=~/my.py", "--export_dir=nowhere")
    assert done.stderr.splitlines()[0].endswith(f"train grpo with the preset {tmp_path}/my.py")


def test_first_line_says_what_is_trained_when_no_preset_is_named(repository):
    done = launch(repository, "--export_dir=nowhere")  # ends before anything is loaded
    assert done.stderr.splitlines()[0].endswith("train grpo with the preset configs/grpo.py")


def test_folder_that_is_no_world_is_refused_with_one_message(repository, tmp_path):
    done = launch(repository, f"--config.world={tmp_path}")
    assert done.returncode == 2
    assert f"config.world: '{tmp_path}' is no world's folder" in done.stderr
    assert "Traceback" not in done.stderr


def test_help_lists_the_fields_with_the_values_of_the_preset(repository):
    told = launch(repository, "--help", "--config=configs/ppo.py:lora").stdout
    assert "with the values of configs/ppo.py:lora" in told
    words = " ".join(told.split())
    assert "--config.policy.lora_rank: <int, at least 0>: rank of the LoRA adapters" in words
    assert "(default: 32)" in words
    assert "--config.optim.schedule: <constant|cosine|openpi_cosine" in words
    assert "--config.algo.gae_lambda: <float, 0..1>: trace decay" in words
    assert "groups with at least 10 % success" in words
    assert "--mode: <train|eval|collect|export|serve>" in words
    assert "--config.policy.lora_rank" not in launch(repository, "--helpshort").stdout

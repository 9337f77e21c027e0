"""`make libero-check` shows a policy what its card says it was trained on."""

import json

import pytest
from ml_collections.config_flags import tuple_parser

from evac_jax.config.libero import LiberoConfig
from evac_jax.errors import CheckpointError
from evac_jax.tools.policy import libero_flags


def write_card(folder, **facts):
    (folder / "card.json").write_text(json.dumps(facts))
    return folder


def test_flags_are_those_of_the_card(tmp_path, capsys):
    crop = (0.03, 0.99, 0.06, 0.86)
    config = LiberoConfig(
        image_size=64, crop=crop, oversample=3, reflections=False, action_repeat=2, max_steps=56
    )
    write_card(tmp_path, start={"libero": config.facts()})
    libero_flags.main([str(tmp_path)])
    told = dict(flag.split("=") for flag in capsys.readouterr().out.split())
    assert tuple_parser.TupleParser().parse(told.pop("--config.libero.crop")) == crop
    assert told == {
        "--config.libero.image_size": "64",
        "--config.libero.oversample": "3",
        "--config.libero.reflections": "False",
        "--config.libero.action_repeat": "2",
        "--config.libero.max_steps": "56",
    }


def test_length_of_episodes_is_told_only_for_the_suite_that_was_learned(tmp_path, capsys):
    write_card(tmp_path, libero=LiberoConfig(suite="libero_goal", image_size=64).facts())
    libero_flags.main([str(tmp_path), "--suite", "libero_10"])
    assert "image_size=64" in (told := capsys.readouterr().out)
    assert "max_steps" not in told
    libero_flags.main([str(tmp_path), "--suite", "libero_goal"])
    assert "max_steps=300" in (told := capsys.readouterr().out)
    assert "tasks" not in told


def test_chosen_tasks_are_told_for_the_suite_that_was_learned(tmp_path, capsys):
    config = LiberoConfig(suite="libero_goal", tasks=(0, 3), extra_states=True)
    write_card(tmp_path, libero=config.facts())
    libero_flags.main([str(tmp_path), "--suite", "libero_goal"])
    told = capsys.readouterr().out
    assert "--config.libero.tasks=0,3 --config.libero.extra_states=True" in told
    libero_flags.main([str(tmp_path)])
    assert "tasks" not in capsys.readouterr().out


def test_length_that_recordings_do_not_share_is_not_told(tmp_path, capsys):
    facts = LiberoConfig(suite="libero_goal", image_size=64).facts()
    del facts["episode_steps"]
    write_card(tmp_path, libero=facts)
    libero_flags.main([str(tmp_path), "--suite", "libero_goal"])
    assert "max_steps" not in capsys.readouterr().out


def test_nothing_is_told_for_a_policy_without_such_a_card(tmp_path, capsys):
    libero_flags.main([str(tmp_path)])
    assert capsys.readouterr().out == "\n"
    with pytest.raises(CheckpointError, match="nowhere"):
        libero_flags.main([str(tmp_path / "nowhere")])

"""Every field is declared once: its type makes the checks, the messages and the reference."""

from typing import Annotated, Any, Literal, get_args

import pytest

from algos import ALGORITHMS
from configs import grpo
from evac_jax.config import libero
from evac_jax.config.build import default_config, from_config_dict
from evac_jax.config.checks import SOLVER_ETAS
from evac_jax.config.fields import Kind, value_problems, walk
from evac_jax.evac.sampler import SOLVERS
from evac_jax.sim.actions import GRIPPER_RULES
from evac_jax.sim.env_config import DTYPES
from evac_jax.sim.initial_states import INITIAL_STATES
from evac_jax.simulators import GROUND_TRUTHS, ground_truth_specs, world_model_specs
from policies.ranges import Range, Share


def fields(algorithm="ppo"):
    return {field.name: field for field in walk(default_config(algorithm))}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_field_has_a_meaning_and_a_default_that_it_allows(algorithm):
    assert not [name for name, field in fields(algorithm).items() if len(field.meaning) < 8]
    assert value_problems(default_config(algorithm)) == []


@pytest.mark.parametrize(
    ("bounds", "words", "inside", "outside"),
    [
        (Range(1), "at least 1", (1, 2), (0, 0.99)),
        (Range(0, open="low"), "> 0", (1e-9,), (0, -1)),
        (Range(high=0), "at most 0", (0, -3), (1,)),
        (Range(high=0, open="high"), "< 0", (-1,), (0,)),
        (Range(0, 1), "0..1", (0, 1), (-0.1, 1.1)),
        (Range(0, 1, open="high"), "a number in [0, 1)", (0,), (1,)),
        (Range(0, 1, open="both"), "a number in (0, 1)", (0.5,), (0, 1)),
    ],
)
def test_range_holds_the_numbers_that_its_words_say(bounds, words, inside, outside):
    assert str(bounds) == words
    assert all(number in bounds for number in inside)
    assert not any(number in bounds for number in (*outside, float("nan")))


def told(hint, value):
    return Kind.of(hint).problems(value, "a.b")


def test_value_is_refused_with_what_is_expected():
    assert told(Share, 2.0) == ["config.a.b: expected 0..1, got 2.0"]
    assert told(Share | None, 2.0) == ["config.a.b: expected None or 0..1, got 2.0"]
    assert told(Literal["warn", "stop"], "wran") == [
        "config.a.b: expected one of ('warn', 'stop'), got 'wran'. Did you mean 'warn'?"
    ]
    assert told(tuple[Annotated[int, Range(1)], ...], (1, 0, -1)) == [
        "config.a.b: expected at least 1, got 0",
        "config.a.b: expected at least 1, got -1",
    ]
    assert told(Share | None, None) == told(Literal[0, 1], 1) == told(tuple[str, ...], ()) == []


@pytest.mark.parametrize("hint", [float, Share, float | None, tuple[float, float]])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_float_is_refused_when_it_is_not_finite(hint, value):
    value = (0.0, value) if hint == tuple[float, float] else value
    (line,) = told(hint, value)
    assert "a finite number, got" in line


@pytest.mark.parametrize(
    ("hint", "value", "expected"),
    [
        (Share, True, "float"),
        (int, 1.0, "int"),
        (Literal[0, 1], True, "int"),
        (bool, 1, "bool"),
        (tuple[int, int], (1,), "2 entries"),
        (tuple[int, ...], 1, "a tuple"),
        (str, None, "str"),
    ],
)
def test_value_of_another_type_is_refused(hint, value, expected):
    problems = []
    Kind.of(hint).convert(value, "a.b", problems)
    assert problems == [f"config.a.b: expected {expected}, got {value!r}"]


def test_int_becomes_a_float_where_one_is_expected():
    problems = []
    kind = Kind.of(tuple[Share, ...])
    assert [type(x) for x in kind.convert([0, 1.0], "a", problems)] == [float, float]
    assert not problems
    with pytest.raises(TypeError, match="no fields of type"):
        Kind.of(dict[str, Any])


def test_flags_have_plain_types():
    preset = grpo.get_config()
    for name, field in fields("grpo").items():
        section, kind = preset, field.kind.type
        *path, last = name.split(".")
        for key in path:
            section = section[key]
        assert section.get_type(last) is kind, name


def test_choices_are_the_entries_of_the_tables_that_they_name():
    known = fields()
    assert known["env.gripper"].kind.choices == tuple(GRIPPER_RULES)
    assert set(known["env.initial_states"].kind.choices) == set(INITIAL_STATES)
    assert set(known["eval.ground_truth"].kind.choices) == {*GROUND_TRUTHS, "none"}
    assert known["simulator.dtype"].kind.choices == DTYPES
    assert known["world_model.solver"].kind.choices == tuple(SOLVER_ETAS) == SOLVERS
    assert get_args(libero.Suite) == tuple(libero.MAX_STEPS)
    for algorithm in ALGORITHMS:
        assert f'"{algorithm}"' in known["algorithm"].meaning


def test_setting_keeps_its_name_on_the_way_to_the_simulator(repository):
    values = grpo.get_config().to_dict()
    values["env"] |= {"keyframes": 0.5, "keyframe_data": str(repository)}
    config = from_config_dict(values)
    names = {field.name.rpartition(".")[2]: field.value for field in walk(config)}
    # A checkpoint has its section's name, `vlm` is a section; the other two are worked out.
    own = {"world_model", "reward", "vlm", "clip_envs", "skip_finished"}
    shared_out = {"num_envs": config.envs_per_process}
    for spec in world_model_specs(config) + ground_truth_specs(config):
        settings = {k: v for k, v in spec["config"].items() if k not in own}
        if spec["environment"].startswith("evac_jax.miniature"):
            shared_out = {"num_envs": config.eval.ground_truth_envs}
        expected = {name: names[name] for name in settings} | shared_out
        assert settings == expected


def test_paths_may_begin_with_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    problems: list[str] = []
    assert Kind(str).convert("~/policy,~/other", "policy.checkpoint", problems) == (
        "/home/me/policy,/home/me/other"
    )
    assert Kind(str).convert("a~/b", "log.run", problems) == "a~/b"
    mix = "noisy=0.5,policy:~/x@1=0.3,policy:~/y=0.2"
    assert Kind(str).convert(mix, "collect.mix", problems) == (
        "noisy=0.5,policy:/home/me/x@1=0.3,policy:/home/me/y=0.2"
    )
    assert not problems

import json
import shutil
import sys

import pytest

from evac_jax.errors import CheckpointError, ConfigError
from evac_jax.tools.recipes import miniature as build
from evac_jax.tools.recipes import shipping
from evac_jax.tools.recipes.stages import Stage, Workshop, stamps


def test_scale_divides_every_count_but_keeps_floors():
    def scaled(scale):
        return shipping.scaled(build.COUNTS, scale, build.FLOORS)

    assert scaled(1.0) == build.COUNTS
    assert scaled(0.1)["base"] == round(0.1 * build.COUNTS["base"])
    assert scaled(0.01)["base"] == build.FLOORS["base"]
    assert scaled(0.01)["rl"] == 1
    for wrong in (0, 1.5):
        with pytest.raises(ConfigError, match="--scale"):
            scaled(wrong)


def test_changed_count_runs_only_what_rests_on_it(monkeypatch):
    before = stamps(build.make_stages())
    monkeypatch.setitem(build.COUNTS, "sloppy", 601)
    after = stamps(build.make_stages())
    changed = {name for name in before if before[name] != after[name]}
    late = {"rollouts_start", "pose_model", "world_model_full", "reward", "rl", "trust", "world"}
    assert {"policy", *late} <= changed
    assert not changed & {"base", "autoencoder", "policy_expert", "rollouts_expert"}


def _made(tmp_path, monkeypatch, size=10):
    """A build of one fake stage per shipped folder."""
    script = (
        "import json, pathlib, sys; out = pathlib.Path(sys.argv[1]); out.mkdir(); "
        "(out / 'model.safetensors').write_bytes(bytes(int(sys.argv[2]))); "
        "(out / 'progress.pt').write_text('not shipped'); "
        "(out / 'card.json').write_text(json.dumps({'scores': {'psnr': 26.5}}))"
    )
    stages = [
        Stage(source, ("-c", script, f"{{work}}/{source}", str(size)), output=source)
        for source in build.SHIPPED.values()
    ]
    packed = "import pathlib, sys; pathlib.Path(sys.argv[1]).mkdir(); "
    packed += "pathlib.Path(sys.argv[1], 'world.json').write_text('{}')"
    stages.append(Stage("world", ("-c", packed, "{work}/world"), output="world"))
    monkeypatch.setattr(build, "make_stages", lambda scale: stages)
    monkeypatch.setattr(shipping.commands, "trust_figures", lambda folder: {"agreement": 0.9})
    return stages


def _main(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["miniature", *map(str, arguments)])
    build.main()


def test_build_ships_weights_with_a_card_that_verifies(tmp_path, monkeypatch, capsys):
    stages = _made(tmp_path, monkeypatch)
    target = tmp_path / "shipped"
    shutil.copytree(tmp_path, target, ignore=lambda *_: [])  # an older version is in the way
    monkeypatch.setattr(build, "MINIATURE_WEIGHTS", str(target))
    _main(monkeypatch, "--work", tmp_path / "work", "--ship", "--cores", 1)
    assert "bytes=" in capsys.readouterr().out.splitlines()[-1]

    card = json.loads((target / "card.json").read_text())
    assert [stage["name"] for stage in card["stages"]] == [stage.name for stage in stages]
    assert all(stage["seconds"] > 0 for stage in card["stages"])
    assert card["scores"]["reward"] == {"psnr": 26.5}
    assert card["trust"] == {"agreement": 0.9}
    assert card["machine"]["cores"] >= 1
    assert str(tmp_path) not in json.dumps(card)  # of no use to anybody else
    assert card["files"].keys() >= {"world.json"}
    assert sorted(p.name for p in (target / "reward").iterdir()) == [
        "card.json",
        "model.safetensors",
    ]
    _main(monkeypatch, "--verify", "--weights", target)

    (target / "policy" / "model.safetensors").write_bytes(b"other")
    (target / "reward" / "model.safetensors").unlink()
    (target / "new.json").write_text("{}")
    with pytest.raises(SystemExit) as error:
        _main(monkeypatch, "--verify", "--weights", target)
    assert "policy/model.safetensors: changed" in str(error.value)
    assert "reward/model.safetensors: missing" in str(error.value)
    assert "new.json: not in the card" in str(error.value)


def test_weights_that_are_too_large_are_not_assembled(tmp_path, monkeypatch):
    stages = _made(tmp_path, monkeypatch, size=build.MAX_BYTES // len(build.SHIPPED) + 1)
    workshop = Workshop(tmp_path / "work", cores=1)
    workshop.run(stages)
    with pytest.raises(ConfigError, match="at most 12000000 may be shipped"):
        shipping.assemble(build.recipe(), workshop, stages, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_without_a_card_cannot_be_verified(tmp_path):
    with pytest.raises(CheckpointError, match="not a card of recipes.miniature"):
        shipping.verify(tmp_path, build.recipe())


@pytest.mark.parametrize("arguments", [["--ship", "--scale", "0.5"], ["--ship", "base"]])
def test_weights_of_a_part_are_never_shipped(arguments):
    with pytest.raises(SystemExit):
        shipping.parse(build.recipe(), arguments)

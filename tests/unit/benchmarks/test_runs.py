"""What a kept run is found again by; what runs do is tested with `benchmarks.learning`."""

from benchmarks.runs import Runs
from tests.unit import world_folder

PRESET = "configs/grpo.py:own"


def test_run_is_found_again_by_the_files_of_the_world_that_it_names(tmp_path):
    runs, folder = Runs(tmp_path / "work", {}), tmp_path / "one"
    world = {"world": str(world_folder.write(folder))}
    first = runs.key(PRESET, world)
    assert runs.key(PRESET, world) == first
    for part in ("starts", "policy"):
        (folder / part / "data.bin").write_bytes(b"another")
        changed = runs.key(PRESET, world)
        assert changed != first
        first = changed


def test_run_is_found_again_when_its_world_was_moved(tmp_path):
    runs, folder = Runs(tmp_path / "work", {}), tmp_path / "one"
    first = runs.key(PRESET, {"world": str(world_folder.write(folder))})
    assert runs.key(PRESET, {"world": str(folder.rename(tmp_path / "other"))}) == first


def test_run_is_found_again_when_only_a_card_was_rewritten(tmp_path):
    runs, folder = Runs(tmp_path / "work", {}), tmp_path / "reward"
    folder.mkdir()
    (folder / "model.safetensors").write_text("weights")
    settings = {"reward.checkpoint": str(folder)}
    first = runs.key("configs/grpo.py", settings)
    (folder / "card.json").write_text("{}")
    assert runs.key("configs/grpo.py", settings) == first
    assert runs.key("configs/grpo.py", settings, extra=["run", 4]) != first

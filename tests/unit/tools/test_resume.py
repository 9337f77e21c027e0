import pytest

from evac_jax.errors import DataError
from evac_jax.tools.resume import check_folder


def test_only_a_folder_of_the_tools_own_is_continued(tmp_path):
    check_folder(tmp_path / "new", "progress.pt")
    check_folder(tmp_path, "progress.pt")  # empty
    (tmp_path / ".tmp-progress.pt").touch()  # of a run that was killed while it saved
    check_folder(tmp_path, "progress.pt")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(DataError, match="nothing to go on with .no progress.pt.; choose another"):
        check_folder(tmp_path, "progress.pt", "tensorboard")
    with pytest.raises(DataError, match="config.json exists"):
        check_folder(tmp_path / "config.json", "progress.pt")
    (tmp_path / "tensorboard").mkdir()
    check_folder(tmp_path, "progress.pt", "tensorboard")

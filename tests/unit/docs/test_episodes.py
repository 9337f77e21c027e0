"""docs/episodes.md: its lines write a recording, and the card holds what the page says."""

import re
import subprocess
import sys

from evac_jax.files import recordings


def test_lines_of_the_page_write_a_recording_when_they_lie_elsewhere(repository, tmp_path):
    page = (repository / "docs" / "episodes.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (command,) = re.findall(r"^PYTHONPATH=.* my_script.py$", page, re.MULTILINE)
    (tmp_path / "my_script.py").write_text(code)
    command = command.replace("CHECKOUT/.venv/bin/python", sys.executable)
    command = command.replace("CHECKOUT", str(repository))
    subprocess.run(command, shell=True, cwd=tmp_path, check=True)
    recordings.verify(tmp_path / "mine")
    data = recordings.load(tmp_path / "mine")
    assert data.frames.shape == (2 * 17, 1, 64, 64, 3)
    assert data.length.tolist() == [16, 16]
    assert data.start.tolist() == [-1, -1]
    card = data.card
    assert card["instructions"] == ["put the red block on the plate"]
    assert card["episodes"] == {"teleoperation": 2}
    assert card["success_once"] == {"teleoperation": 1.0}
    assert (card["command"], card["robot"]) == ("my_robot/record.py", "arm 3")
    assert set(card["sha256"]) == {f"{name}.npy" for name in (
        *recordings.PER_FRAME, *recordings.PER_EPISODE, *recordings.SHARED
    )}  # fmt: skip

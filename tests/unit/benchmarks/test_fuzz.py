import pickle
import random
import subprocess
import sys

import pytest

from benchmarks import fuzz, fuzz_inputs
from evac_jax.errors import DataError


def ends_with(error: BaseException):
    def read():
        raise error

    return read


@pytest.mark.parametrize(
    ("read", "kind"),
    [
        (lambda: None, "ok"),
        (ends_with(DataError("no such field")), "error"),
        (ends_with(SystemExit("no message of ours")), "crash"),
        (ends_with(SystemExit(2)), "error"),  # of a command's parser
        (ends_with(SystemExit(1)), "crash"),
        (ends_with(KeyError("field")), "crash"),
        (ends_with(fuzz._TimeUpError()), "crash"),
    ],
)
def test_only_success_and_the_projects_own_errors_are_good_ends(read, kind):
    assert fuzz._outcome(read)[0] == kind


def test_damage_is_repeated_by_its_number_and_leaves_the_original(tmp_path, monkeypatch):
    monkeypatch.setenv(fuzz_inputs.CANARY, str(tmp_path / "canary"))
    made = []
    for name in ("one", "two"):
        fuzz_inputs.make_lerobot(tmp_path / name)
        rng = random.Random("lerobot 0 7")
        made.append([fuzz_inputs.damage(rng, tmp_path / name) for _ in range(20)])
    assert made[0] == made[1]
    assert len(set(made[0])) > 10


def test_code_in_a_pickle_is_noticed_when_it_is_run(tmp_path, monkeypatch):
    canary = tmp_path / "canary"
    monkeypatch.setenv(fuzz_inputs.CANARY, str(canary))
    pickle.loads(pickle.dumps(fuzz_inputs._Runs()))
    assert canary.is_dir()


def test_writing_outside_and_programs_are_noticed_while_a_reader_reads(tmp_path):
    # An audit hook stays for good, so it is tried in a process of its own.
    code = (
        "import os, pathlib, sys\n"
        "from benchmarks.fuzz import _Watch\n"
        "inside, outside = map(pathlib.Path, sys.argv[1:])\n"
        "watch = _Watch(inside)\n"
        "(outside / 'before').write_text('')\n"
        "with watch.armed_for_input() as seen:\n"
        "    (inside / 'in').write_text('')\n"
        "    (inside / 'in').read_text()\n"
        "    (outside / 'out').write_text('')\n"
        "    os.system('true')\n"
        "print(len(seen), seen)\n"
    )
    for name in ("in", "out"):
        (tmp_path / name).mkdir()
    command = [sys.executable, "-c", code, str(tmp_path / "in"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=fuzz.ROOT, check=True)
    assert done.stdout.startswith("2 ")
    assert "write" in done.stdout
    assert "os.system" in done.stdout

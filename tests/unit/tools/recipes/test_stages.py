import dataclasses
import json
import os
import sys

import pytest

from evac_jax.errors import ConfigError, DataError, EvacJaxError
from evac_jax.tools.recipes import stages
from evac_jax.tools.recipes.stages import Stage, Workshop

# Appends its name to a journal and writes the output: argv = journal, name, output [, status].
SCRIPT = """
import os, pathlib, sys
journal, name, output, status = sys.argv[1:5]
with open(journal, "a") as stream:
    stream.write(name + " " + str(len(os.sched_getaffinity(0))) + "\\n")
path = pathlib.Path(output)
path.parent.mkdir(parents=True, exist_ok=True)
if status == "0":
    path.mkdir(exist_ok=True)
    with (path / "trace").open("a") as stream:
        stream.write("x")
print("last words of", name)
sys.exit(int(status))
"""


def _stage(name, *inputs, status=0, extra="", **changes):
    command = ("-c", SCRIPT, "{work}/journal", name, "{work}/" + name, str(status), extra)
    return Stage(name, command, inputs, name, **changes)


def _journal(workshop):
    path = workshop.work / "journal"
    return [line.split()[0] for line in path.read_text().splitlines()] if path.exists() else []


def _workshop(tmp_path):
    return Workshop(tmp_path / "work", cores=2)


DIAMOND = [_stage("a"), _stage("b", "a"), _stage("c", "a"), _stage("d", "b", "c")]


def test_inputs_come_before_what_needs_them_and_nothing_runs_twice(tmp_path):
    workshop = _workshop(tmp_path)
    workshop.run(DIAMOND)
    order = _journal(workshop)
    assert sorted(order) == ["a", "b", "c", "d"]
    assert order[0] == "a"
    assert order[-1] == "d"
    workshop.run(DIAMOND)
    assert len(_journal(workshop)) == 4
    record = workshop.record("d")
    assert record["done"]
    assert record["seconds"] > 0
    assert workshop.clock() > 0


def test_changed_command_runs_again_with_all_that_rests_on_it_and_nothing_else(tmp_path):
    workshop = _workshop(tmp_path)
    workshop.run(DIAMOND)
    changed = [DIAMOND[0], _stage("b", "a", extra="other"), *DIAMOND[2:]]
    workshop.run(changed)
    assert _journal(workshop)[4:] == ["b", "d"]
    # The old output was removed first.
    assert (workshop.work / "b" / "trace").read_text() == "x"


def test_lost_output_is_made_again(tmp_path):
    workshop = _workshop(tmp_path)
    workshop.run(DIAMOND[:1])
    (workshop.work / "a").rename(tmp_path / "lost")
    workshop.run(DIAMOND[:1])
    assert _journal(workshop) == ["a", "a"]


def test_failed_stage_is_quoted_and_the_next_call_goes_on_from_there(tmp_path):
    workshop = _workshop(tmp_path)
    with pytest.raises(EvacJaxError, match="'b' failed: exit status 3") as error:
        workshop.run([DIAMOND[0], _stage("b", "a", status=3)])
    assert "last words of b" in str(error.value)
    workshop.run(DIAMOND[:2])
    assert _journal(workshop) == ["a", "b", "b"]


def test_stage_without_its_output_has_failed(tmp_path):
    with pytest.raises(EvacJaxError, match="it made no thing"):
        _workshop(tmp_path).run([Stage("a", ("-c", "pass"), output="thing")])


@pytest.mark.parametrize("resumes", [True, False])
def test_traces_of_a_killed_stage_stay_only_where_it_can_use_them(tmp_path, resumes):
    workshop = _workshop(tmp_path)
    stage = _stage("a", resumes=resumes)
    workshop.run([stage])
    path = workshop.work / "stamps" / "a.json"
    (workshop.work / "a.partial").mkdir()
    earlier = json.loads(path.read_text()) | {"done": False, "seconds": 1000.0}
    path.write_text(json.dumps(earlier))
    workshop.run([stage])
    assert (workshop.work / "a" / "trace").read_text() == ("xx" if resumes else "x")
    assert (workshop.record("a")["seconds"] > 1000) == resumes
    assert (workshop.work / "a.partial").exists() == resumes


def test_stages_get_the_cores_they_ask_for(tmp_path):
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one core")
    workshop = _workshop(tmp_path)
    workshop.run([_stage("one"), _stage("two", cores=2)])
    lines = (workshop.work / "journal").read_text().splitlines()
    assert dict(line.split() for line in lines) == {"one": "1", "two": "2"}


def test_stamps_do_not_depend_on_where_the_work_lies(tmp_path):
    for name in "xy":
        Workshop(tmp_path / name, cores=1).run(DIAMOND[:1])
    records = [Workshop(tmp_path / name).record("a") for name in "xy"]
    assert records[0]["stamp"] == records[1]["stamp"] == stages.stamps(DIAMOND)["a"]
    assert "{work}/a" in records[0]["command"]


def test_only_the_named_stages_run_and_not_before_what_they_need(tmp_path):
    workshop = _workshop(tmp_path)
    with pytest.raises(ConfigError, match="is what they need: a, b; run these"):
        workshop.run(DIAMOND, ["c", "d"])
    with pytest.raises(ConfigError, match="no stage 'e'; there are"):
        workshop.run(DIAMOND, ["e"])
    assert _journal(workshop) == []
    workshop.run(DIAMOND, stages.needed_for(DIAMOND, ["c"]))
    assert _journal(workshop) == ["a", "c"]
    workshop.run(DIAMOND, ["c", "b"])
    assert _journal(workshop) == ["a", "c", "b"]


def test_second_process_in_the_same_folder_is_refused(tmp_path):
    first = _workshop(tmp_path)
    with pytest.raises(DataError, match="another process is at work"):
        _workshop(tmp_path)
    assert first.work.is_dir()


def test_tables_that_cannot_be_run_are_refused():
    with pytest.raises(ConfigError, match=r"'b' needs \['a'\]"):
        stages.check([DIAMOND[1], DIAMOND[0]])
    with pytest.raises(ConfigError, match="'a' comes twice"):
        stages.check([DIAMOND[0], DIAMOND[0]])


def test_stage_is_shown_as_one_would_type_it():
    stage = dataclasses.replace(DIAMOND[0], command=("-m", "a.b", "--steps", "3"))
    assert stage.shown == "python -m a.b --steps 3"
    assert sys.executable not in stage.shown


def test_record_of_bytes_that_are_no_text_is_refused_by_name(tmp_path):
    workshop = _workshop(tmp_path)
    workshop.run([_stage("a")])
    (record,) = tmp_path.rglob("a.json")
    record.write_bytes(b"\xff")
    with pytest.raises(DataError, match=r"a\.json: expected a JSON object"):
        workshop.record("a")


def test_folder_of_other_files_is_no_workshop(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(DataError, match="exists and holds nothing to go on with"):
        Workshop(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]

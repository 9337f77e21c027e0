"""LIBERO's demonstrations, written by scripted players (`libero_demo_files`) and read again."""

import sys

import h5py
import numpy as np
import pytest

from evac_jax.errors import ConfigError, DataError
from evac_jax.files import libero_facts, recordings
from evac_jax.sim.libero_tasks import instruction_of
from evac_jax.tools.episodes import import_libero_demos, libero_demos
from tests.unit.sim import libero_fakes
from tests.unit.tools.episodes import libero_demo_files as files

TASKS = libero_fakes.TASKS


@pytest.fixture(scope="module")
def truths():
    return [files.play(0, pauses=(0, 1, 5, 6, 30)), files.play(1)]


def imported(folder, *options, camera=("--camera", "libero")):
    out = folder / f"out{len(list(folder.glob('out*')))}"
    flags = ["--source", str(folder / "demos"), "--out", str(out), *camera, *options]
    import_libero_demos.main(flags)
    recordings.verify(out)
    return recordings.load(out)


def rows(data, n):
    return data.rows(np.array(n), np.arange(data.length[n] + 1))


@pytest.mark.parametrize("convention", ["opengl", "opencv"])
def test_libero_own_files_show_what_came_after_an_action(truths, tmp_path, convention):
    path = tmp_path / "demos" / f"{TASKS[0]}_demo.hdf5"
    files.write(path, truths, after=True, convention=convention)
    data = imported(tmp_path)
    assert data.instructions == (instruction_of(TASKS[0]),)
    assert data.sources == ("demonstration",)
    assert data.start.tolist() == [-1, -1]
    for n, truth in enumerate(truths):
        at = rows(data, n)
        np.testing.assert_array_equal(data.frames[at, 0], truth.pictures[1:])
        np.testing.assert_allclose(data.actions[at[:-1]], truth.actions[1:], atol=1e-6)
        np.testing.assert_allclose(data.poses[at, :3], truth.poses[1:, :3], atol=1e-6)
        np.testing.assert_allclose(data.poses[at, 7], truth.poses[1:, 7], atol=1e-6)
        np.testing.assert_array_equal(data.success[at], truth.success[1:])


def test_regenerated_files_show_what_was_before_an_action(truths, tmp_path):
    files.write(tmp_path / "demos" / f"{TASKS[0]}_demo.hdf5", truths, after=False)
    data = imported(tmp_path)
    for n, truth in enumerate(truths):
        at = rows(data, n)
        np.testing.assert_array_equal(data.frames[at, 0], truth.pictures[:-1])
        np.testing.assert_allclose(data.actions[at[:-1]], truth.actions[:-1], atol=1e-6)
        # The frame of success itself was not stored; the last one stands for it.
        assert np.flatnonzero(data.success[at]).tolist() == [len(truth.actions) - 1]


def test_actions_that_do_nothing_are_left_out_when_asked(truths, tmp_path):
    files.write(tmp_path / "demos" / f"{TASKS[0]}_demo.hdf5", truths[:1], after=False)
    data, whole = imported(tmp_path, "--no_noops"), imported(tmp_path)
    pauses = [0, 1, 5, 6, 30]
    kept = np.delete(np.arange(whole.length[0] + 1), pauses)
    assert data.length[0] == whole.length[0] - 5
    np.testing.assert_array_equal(data.frames, whole.frames[kept])
    np.testing.assert_array_equal(data.actions, whole.actions[kept])


def test_what_does_nothing_is_told_as_openvla_does():
    """Its `is_noop` compares with the action kept last; before the first one only motion counts."""
    actions = np.zeros((7, 7), np.float32)
    actions[:, 6] = [-1, 1, -1, 1, 1, -1, -1]
    actions[2, :3] = 0.00005, 0.0001, 0.0  # a norm of 1.1e-4
    actions[4, 3] = 0.00009
    left = libero_demos.without_no_ops({"actions": actions, "frames": np.arange(8)})
    np.testing.assert_array_equal(left["frames"], [2, 3, 5, 7])
    np.testing.assert_array_equal(left["actions"][:, 6], [-1, 1, -1])


def test_pictures_are_resized_and_the_camera_with_them(truths, tmp_path):
    files.write(tmp_path / "demos" / f"{TASKS[0]}_demo.hdf5", truths, after=True)
    small, whole = imported(tmp_path, "--image_size", "8"), imported(tmp_path)
    assert small.frames.shape[1:] == (1, 8, 8, 3)
    np.testing.assert_allclose(small.intrinsic[0, 0, 0], whole.intrinsic[0, 0, 0] / 2)


def test_states_are_rendered_and_the_last_action_is_played(truths, tmp_path, monkeypatch):
    libero, flags = simulator(tmp_path, monkeypatch)
    files.write(tmp_path / "demos" / f"{TASKS[0]}_demo.hdf5", truths, after=True)
    data = imported(tmp_path, "--render", *flags, camera=())
    assert data.frames.shape[1:] == (1, libero.image_size, libero.image_size, 3)
    assert not libero_facts.differences(data.card["libero"], libero.facts())
    for n, truth in enumerate(truths):
        at = rows(data, n)
        np.testing.assert_allclose(data.actions[at[:-1]], truth.actions, atol=1e-6)
        np.testing.assert_allclose(data.poses[at[:-1], :3], truth.poses[:-1, :3], atol=1e-6)
        last = truth.poses[-2, :3] + 0.1 * truth.actions[-1, :3]  # as the stand-in moves
        np.testing.assert_allclose(data.poses[at[-1], :3], last, atol=1e-5)
        seen = data.frames[at[:-1], 0, -2, -3]
        drawn = np.rint(100 * np.abs(truth.poses[:-1, :3])).astype(np.uint8)
        np.testing.assert_array_equal(seen, drawn)
        # The cabinet stands where the demonstration's model has it.
        np.testing.assert_array_equal(data.frames[at, 0, -3, -3], [[10, 20, 30]] * len(at))


def test_a_demonstration_is_on_the_same_side_however_it_is_imported(tmp_path, monkeypatch):
    _, flags = simulator(tmp_path, monkeypatch)
    short = []
    for seed in range(25):
        truth = files.play(100 + seed)
        rest = truth.actions[:4], truth.poses[:5] + 0.01 * seed * np.eye(8)[0], truth.success[-5:]
        short.append(files.Truth(*rest))
    path = tmp_path / "demos" / f"{TASKS[0]}_demo.hdf5"
    files.write(path, short, after=True)
    sides = [imported(tmp_path).held_out, imported(tmp_path, "--image_size", "8").held_out]
    sides.append(imported(tmp_path, "--render", *flags, camera=()).held_out)
    files.write(path, short, after=False)
    sides.append(imported(tmp_path).held_out)
    assert 0 < sides[0].sum() < 25
    for side in sides[1:]:
        np.testing.assert_array_equal(side, sides[0])


def simulator(folder, monkeypatch):
    """Return the stand-in's configuration and the options that name it."""
    for name, value in libero_fakes.environment(folder).items():
        monkeypatch.setenv(name, value)
    libero = libero_fakes.write(folder)
    libero_fakes.write_states(libero, [np.zeros((2, files.LENGTH))] * 2)
    flags = ["--root", libero.root, "--python", sys.executable, "--renderer", libero.renderer]
    return libero, [*flags, "--image_size", str(libero.image_size)]


def test_render_refuses_files_of_another_suite_or_version(truths, tmp_path, monkeypatch):
    libero, flags = simulator(tmp_path, monkeypatch)
    path = tmp_path / "demos" / "open_it_demo.hdf5"
    files.write(path, truths, after=True)
    with pytest.raises(DataError, match="no task 'open_it'"):
        imported(tmp_path, "--render", *flags, camera=())
    path.rename(path.with_name(f"{TASKS[0]}_demo.hdf5"))
    libero_fakes.write_states(libero, [np.zeros((2, files.LENGTH + 1))] * 2)
    with pytest.raises(DataError, match="states of 10 numbers, libero_spatial has 11"):
        imported(tmp_path, "--render", *flags, camera=())


def spoil(name, value=None, attribute=None):
    def change(file):
        if attribute:
            file[name].attrs[attribute] = value
            return
        del file[name]
        if value is not None:
            file[name] = value

    return change


def cast_last_picture(file):
    """As if it had been of 0..1."""
    file["data/demo_0/obs/agentview_rgb"][-1] = 1


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (cast_last_picture, r"frame \d+: the picture holds no value from 2 to 254"),
        (spoil("data"), "not a readable file"),
        (spoil("data/demo_0/states"), "states"),
        (spoil("data/demo_0/obs/ee_pos", np.zeros((3, 3))), "obs/ee_pos: expected"),
        (spoil("data/demo_0/obs/agentview_rgb", np.zeros((3, 8, 8, 3))), "agentview_rgb: expected"),
        (spoil("data/demo_0/actions", np.full((3, 7), 2.0)), "actions reach 2"),
        (spoil("data", "metal", "macros_image_convention"), "macros_image_convention"),
        (spoil("data", np.bytes_(b"\xff"), "macros_image_convention"), "macros_image_convention"),
        (spoil("data/demo_0", "<mujoco", "model_file"), "not a MuJoCo model"),
    ],
)
def test_damaged_file_is_refused_by_name_and_nothing_is_left(truths, tmp_path, change, told):
    path = tmp_path / "demos" / f"{TASKS[0]}_demo.hdf5"
    files.write(path, truths[:1], after=True)
    with h5py.File(path, "a") as file:
        change(file)
    with pytest.raises(DataError, match=told) as raised:
        imported(tmp_path)
    assert TASKS[0] in str(raised.value)
    assert not list(tmp_path.glob("out*"))


def test_joints_that_fit_neither_way_are_refused(truths, tmp_path):
    path = tmp_path / "demos" / f"{TASKS[0]}_demo.hdf5"
    files.write(path, truths[:1], after=True)
    with h5py.File(path, "a") as file:
        joints = file["data/demo_0/obs/joint_states"]
        joints[...] = joints[()] + 1.0
    with pytest.raises(DataError, match="cannot tell whether obs shows"):
        imported(tmp_path)


def test_wrong_names_and_missing_camera_are_refused(tmp_path):
    (tmp_path / "demos").mkdir()
    with pytest.raises(DataError, match="found none"):
        imported(tmp_path)
    files.write(tmp_path / "demos" / f"{TASKS[0]}_demo.hdf5", [files.play(1)], after=True)
    with pytest.raises(ConfigError, match="--camera: needed"):
        imported(tmp_path, camera=())
    with pytest.raises(ConfigError, match="--camera: not with --render"):
        imported(tmp_path, "--render")
    with pytest.raises(ConfigError, match="--crop, --oversample, --no-reflections: only with"):
        imported(tmp_path, "--crop", "0,1,0,0.9")
    with pytest.raises(ConfigError, match="--no-reflections: only with"):
        imported(tmp_path, "--no-reflections")
    with pytest.raises(ConfigError, match=r"--oversample: .*9"):
        imported(tmp_path, "--render", "--oversample", "9", camera=())

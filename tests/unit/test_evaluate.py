from types import SimpleNamespace

import numpy as np

from evac_jax.bridge.types import IDLE
from evac_jax.evaluate import _films, task_by_task


def test_each_environment_plays_its_tasks_one_after_another():
    starts = np.arange(8)  # of four tasks
    assert task_by_task(starts, 4, 1).tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert task_by_task(starts, 4, 2).tolist() == [0, 2, 4, 6, 1, 3, 5, 7]
    assert task_by_task(starts, 4, 4).tolist() == starts.tolist()


def test_episodes_that_fill_no_whole_row_are_all_played_once():
    order = task_by_task(np.arange(3, 10), 3, 2)
    assert order.tolist() == [3, 7, 6, 5, 9, 8, 4, IDLE]
    assert sorted(order[order != IDLE]) == list(range(3, 10))


def test_film_knows_its_start_and_idle_environments_are_not_filmed():
    simulators = SimpleNamespace(spec=SimpleNamespace(instructions=("lift it", "push it")))
    first = np.zeros((3, 1, 4, 4, 3), np.uint8)
    clips = [np.ones((3, 2, 1, 4, 4, 3), np.uint8)]
    result = SimpleNamespace(
        rewards=np.zeros((3, 2)), success=np.array([True, False, False]), task=np.array([1, 0, 0])
    )
    films = _films(simulators, np.array([70, IDLE, 72]), [result], first, clips, 4)
    assert [(film.start, film.instruction) for film in films] == [(70, "push it"), (72, "lift it")]
    assert [film.facts["success"] for film in films] == [True, False]
    assert films[0].side_by_side.shape == (3, 4, 4, 3)

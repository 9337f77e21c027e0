from types import SimpleNamespace

import numpy as np

from evac_jax.bridge.types import IDLE
from evac_jax.evaluate import _films, by_task


def test_success_is_told_by_text_in_the_order_of_the_tasks():
    task, success = np.array([1, 0, 1, 1]), np.array([True, False, False, True])
    assert by_task(("open", "close", "push"), task, success) == {"open": [0, 1], "close": [2, 3]}


def test_tasks_of_the_same_text_are_counted_together():
    task, success = np.array([0, 2, 2, 1]), np.array([True, False, True, False])
    assert by_task(("open", "close", "open"), task, success) == {"open": [2, 3], "close": [0, 1]}


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

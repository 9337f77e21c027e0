import numpy as np

from evac_jax.evaluate import by_task


def test_success_is_told_by_text_in_the_order_of_the_tasks():
    task, success = np.array([1, 0, 1, 1]), np.array([True, False, False, True])
    assert by_task(("open", "close", "push"), task, success) == {"open": [0, 1], "close": [2, 3]}


def test_tasks_of_the_same_text_are_counted_together():
    task, success = np.array([0, 2, 2, 1]), np.array([True, False, True, False])
    assert by_task(("open", "close", "open"), task, success) == {"open": [2, 3], "close": [0, 1]}

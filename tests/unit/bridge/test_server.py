import numpy as np
import pytest

from evac_jax.bridge.server import check_result
from evac_jax.bridge.types import EnvSpec, StepResult
from evac_jax.errors import SimulatorError
from policies.spec import ActionSpec

ENV = EnvSpec(3, (1, 8, 8, 3), 7, ActionSpec(7, 2), ("push", "pull"), 9, 8)


def result(*task):
    flags = np.zeros(3, bool)
    return StepResult(
        task=np.array(task, np.int32),
        proprio=np.zeros((3, 7), np.float32),
        rewards=np.zeros((3, 2), np.float32),
        terminated=flags,
        truncated=flags,
        success=flags,
    )


def test_result_is_accepted_when_every_task_has_an_instruction():
    check_result(ENV, result(0, 1, -1))


@pytest.mark.parametrize("task", [(0, 1, 2), (0, -2, 1)])
def test_task_without_an_instruction_is_refused(task):
    with pytest.raises(SimulatorError, match="'task': expected places in the 2 instructions"):
        check_result(ENV, result(*task))

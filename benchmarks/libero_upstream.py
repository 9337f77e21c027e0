"""Plays actions in LIBERO's own environment, as its users do; nothing of evac_jax takes part.

    .venv-libero/bin/python -m benchmarks.libero_upstream SUITE TASK STATE SEED ACTIONS.npy OUT.npz

The interpreter is LIBERO's. `libero_env` and the tests of the simulator compare with what this
writes: `frames` as the environment gives them, `position`, `quaternion` and `fingers` of the hand,
`joints` of the arm, MuJoCo's `states`, and `success`, at the start and after every action;
`language`, the instruction; and `model`, the scene as LIBERO's demonstrations store it.

Source: the README of LIBERO and moojink/openvla-oft's run_libero_eval.py.
"""

import os
import sys
from collections.abc import Sequence

os.environ.setdefault("MUJOCO_GL", "egl")
os.environ.setdefault("PYOPENGL_PLATFORM", "egl")

import numpy as np
from libero.libero import benchmark, get_libero_path
from libero.libero.envs import OffScreenRenderEnv

WAIT_STEPS, NO_MOTION = 10, [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0]


def main(argv: Sequence[str]) -> None:
    """Command line."""
    suite_name, task_id, state_id, seed, actions, out = argv
    suite = benchmark.get_benchmark_dict()[suite_name]()
    task = suite.get_task(int(task_id))
    env = OffScreenRenderEnv(
        bddl_file_name=os.path.join(
            get_libero_path("bddl_files"), task.problem_folder, task.bddl_file
        ),
        camera_heights=256,
        camera_widths=256,
    )
    env.seed(int(seed))
    env.reset()
    seen = env.set_init_state(suite.get_task_init_states(int(task_id))[int(state_id)])
    for _ in range(WAIT_STEPS):
        seen, _, done, _ = env.step(NO_MOTION)
    told, states = [(seen, done)], [env.get_sim_state()]
    for action in np.load(actions):
        seen, _, done, _ = env.step(action)
        told.append((seen, done))
        states.append(env.get_sim_state())
    names = {
        "frames": "agentview_image",
        "position": "robot0_eef_pos",
        "quaternion": "robot0_eef_quat",
        "fingers": "robot0_gripper_qpos",
        "joints": "robot0_joint_pos",
    }
    values = {name: np.stack([seen[key] for seen, _ in told]) for name, key in names.items()}
    values |= {"states": np.stack(states), "success": [done for _, done in told]}
    np.savez(out, **values, language=task.language, model=env.sim.model.get_xml())
    env.close()


if __name__ == "__main__":
    main(sys.argv[1:])

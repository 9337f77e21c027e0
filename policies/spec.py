"""The meaning of a policy's actions, in a form that both processes can import.

It uses the standard library only, because the simulator process reads it without importing JAX.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class ActionSpec:
    """Shape and meaning of one action chunk.

    Attributes:
        dim: entries of one action; 7 = translation 3, rotation 3 (axis-angle or Euler deltas),
            gripper 1.
        chunk: number of actions per decision; also the number of frames that the world model
            imagines for it.
        convention: name of the meaning; policy and simulator must have the same one (checked at
            start-up). "delta_ee_7": end-effector deltas, gripper as the environment expects it.
    """

    dim: int = 7
    chunk: int = 8
    convention: str = "delta_ee_7"

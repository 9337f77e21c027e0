"""What a policy's actions mean: the one contract that both processes can import.

Standard library only, because the simulator process reads it without importing JAX.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class ActionSpec:
    """Shape and meaning of one action chunk.

    Attributes:
        dim: entries of one action; 7 = translation 3, rotation 3 (axis-angle or Euler deltas),
            gripper 1.
        chunk: actions of one decision; also the frames that the world model imagines for it.
        convention: name of the meaning, compared between policy and simulator at start-up.
            "delta_ee_7": end-effector deltas, gripper as the environment wants it.
    """

    dim: int = 7
    chunk: int = 8
    convention: str = "delta_ee_7"

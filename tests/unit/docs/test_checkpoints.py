"""docs/checkpoints.md: its lines read a checkpoint with Orbax alone."""

import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np

from evac_jax.checkpoint import Checkpoints
from evac_jax.devices import sharding

PROOF = """
assert not {"evac_jax", "policies", "algos"} & set(sys.modules)
np.savez(sys.argv[2], **{name.replace("/", "|"): array for name, array in state.items()})
"""


def test_lines_of_the_page_restore_what_several_devices_saved(repository, tmp_path):
    mesh = sharding.make_mesh(2, 2)
    cut = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    saved = {
        "params": {"kernel": jax.device_put(jnp.arange(8.0).reshape(4, 2), cut)},
        "step": jnp.asarray(3, jnp.int32),
    }
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=None)
    checkpoints.save(8, saved, {"run": "x"})
    checkpoints.close()
    page = (repository / "docs" / "checkpoints.md").read_text()
    code = re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0]
    command = [sys.executable, "-c", code + PROOF, str(tmp_path / "checkpoints" / "8")]
    # From another folder, so that nothing of the project can be imported by chance.
    done = subprocess.run(
        [*command, str(tmp_path / "out.npz")], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "params/kernel float32 (4, 2)" in done.stdout
    with np.load(tmp_path / "out.npz") as found:
        np.testing.assert_array_equal(found["params|kernel"], np.arange(8.0).reshape(4, 2))
        assert found["step"] == 3

"""The command that compiles for chips that are not here: mistakes, figures, and a real program."""

import dataclasses
import gzip
import json
import os
import subprocess
import sys

import pytest

from evac_jax.errors import ConfigError, DataError
from evac_jax.tools.memory import compile as ahead
from evac_jax.tools.memory.topology import Topology
from policies.openvla_oft.config import OpenVLAOFTConfig, VisionTowerConfig

PYTHON = ahead.ROOT / ahead.PYTHON
needs_compilers = pytest.mark.skipif(
    not PYTHON.exists(), reason="no .venv-aot; `make aot` installs it"
)
TOWER = VisionTowerConfig(width=64, depth=2, heads=2, mlp_width=128)
POLICY = OpenVLAOFTConfig(
    dinov2=TOWER,
    siglip=TOWER,
    image_size=28,
    hidden_size=256,
    intermediate_size=512,
    num_layers=3,
    num_heads=2,
    num_kv_heads=2,
)
HLO = """HloModule jit_sample, is_scheduled=true, num_partitions=2

ENTRY %main (x: bf16[4,8]) -> bf16[8,8] {
  %x = bf16[4,8]{1,0} parameter(0)
  %g = bf16[8,8]{1,0} all-gather(%x), replica_groups={{0,1}}, dimensions={0}
  ROOT %d = bf16[8,8]{1,0} dot(%g, %g), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
"""
TOLD = {"seconds": 3.0, "arguments": 2e9, "temporaries": 1e9, "peak": 2.5e9, "hlo": HLO}


@pytest.fixture
def found(tmp_path, monkeypatch):
    """Let the compiling process find a file; return the process's own arguments."""

    def write(told):
        (tmp_path / "found.json.gz").write_bytes(gzip.compress(json.dumps(told).encode()))
        return calls

    def answer(command, **more):
        calls.append((command, more["env"]))
        return subprocess.CompletedProcess(command, 0, f"{tmp_path}/found.json.gz\n")

    calls = []
    monkeypatch.setattr(subprocess, "run", answer)
    return write


def _run(*more):
    ahead.run(["--config=configs/grpo.py:lora", f"--python={sys.executable}", *more])


def test_without_the_environment_one_message_names_the_command(tmp_path):
    with pytest.raises(ConfigError, match="`make aot` installs it"):
        ahead.run(["--topology=h100:1x8", f"--python={tmp_path}/none"])


def test_mistakes_are_told_before_anything_is_compiled(found):
    calls = found(TOLD)
    with pytest.raises(ConfigError, match="expected CHIP:SHAPE"):
        _run("--topology=h1:1x8")
    with pytest.raises(ConfigError, match="micro_bach"):
        _run("--topology=h100:1x8", "--config.algo.micro_bach=8")
    with pytest.raises(SystemExit):
        _run("--topology=h100:1x8", "--device=8")
    assert not calls


def test_figures_are_printed_and_written(found, tmp_path, capsys):
    calls = found(TOLD)
    _run("--topology=h100:1x2", "--programs", "sample", f"--out={tmp_path}/figures.json")
    printed = capsys.readouterr().out
    assert "sample, a chip of h100:1x2 (NVIDIA H100 80GB HBM3): fits, 2.50 of 84.94 GB" in printed
    assert "by all-gather, 0% of it while products run" in printed
    told = json.loads((tmp_path / "figures.json").read_text())["programs"]["sample"]
    assert told["received_bytes"]["all-gather"] == {"total": 64, "hidden": 0}
    assert (told["peak_bytes"], told["flops"], told["fits"]) == (2.5e9, 1024, True)
    (command, environment), *others = calls
    assert not others
    assert json.loads(command[3])["program"] == "sample"
    assert environment["JAX_PLATFORMS"] == "cpu"
    assert "triton_gemm=false" in environment["XLA_FLAGS"]


def test_a_program_that_is_too_large_is_said_to_be(found, capsys):
    found({**TOLD, "peak": 9e10})
    _run("--topology=h100:1x2", "--programs=sample")
    assert "does NOT fit, 90.00 of 84.94 GB" in capsys.readouterr().out
    found({"seconds": 1.0, "refused": "RESOURCE_EXHAUSTED: 19G of 15G"})
    _run("--topology=v5e:2x4", "--programs=sample")
    assert "does NOT fit, XLA refuses it after 1 s\nRESOURCE_EXHAUSTED" in capsys.readouterr().out


@needs_compilers
@pytest.mark.slow
@pytest.mark.parametrize("topology", ["h100:1x2", "v5e:2x2"])
def test_a_small_decision_compiles_for_chips_that_are_not_here(topology, tmp_path):
    sizes = dataclasses.replace(POLICY, vocab_size=2048)
    (tmp_path / "policy.json").write_text(json.dumps(sizes.to_hf()))
    asked = ahead.Request(
        "configs/grpo.py:libero_spatial", (), f"{tmp_path}/policy.json", "", topology, "sample"
    )
    told = ahead.compile_ahead(asked, PYTHON, tmp_path)
    assert told.fits(Topology.parse(topology).memory_bytes)
    assert told.arguments < told.peak
    assert told.account.fused_attention == topology.startswith("h100")
    # Three layers' weights are cut over the chips, and every layer gathers its own.
    layers = 3 * (4 * 256 * 256 + 3 * 256 * 512)
    chips = Topology.parse(topology).count
    assert told.account.total_received > 2 * layers * (chips - 1) / chips
    # Each token meets every weight of its layer once.
    tokens = 16 // chips * (128 + 4 + 56)
    assert told.account.flops > 2 * layers * tokens
    again = ahead.compile_ahead(asked, PYTHON, tmp_path)
    assert again == told
    assert len(os.listdir(tmp_path)) == 2  # sizes, and one file of what was compiled


def test_existing_file_of_figures_is_refused_before_anything_is_compiled(tmp_path):
    (tmp_path / "account.json").write_text("mine")
    with pytest.raises(DataError, match="account.json exists; choose another file"):
        ahead.run(["--topology=nothing", f"--out={tmp_path / 'account.json'}"])

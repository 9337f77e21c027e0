"""Names of topologies, and the data files of chips."""

import re

import pytest

from evac_jax.errors import ConfigError
from evac_jax.tools.memory.topology import CHIPS, Topology


@pytest.mark.parametrize(
    ("name", "count", "platform"),
    [("h100:1x8", 8, "cuda"), ("H200:2x8", 16, "cuda"), ("v5e:2x4", 8, "tpu")],
)
def test_a_name_tells_chip_and_shape(name, count, platform):
    topology = Topology.parse(name)
    assert (topology.count, topology.platform) == (count, platform)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("h10:1x8", "expected CHIP:SHAPE with a chip of a100, .* got 'h10:1x8'. Did you mean"),
        ("h100", "expected h100:SHAPE with HOSTSxGPUS"),
        ("h100:8", "expected h100:SHAPE with HOSTSxGPUS, such as 1x8, got 'h100:8'"),
        ("h100:0x8", "got 'h100:0x8'"),
        ("v5p:2,2,2", "expected v5p:SHAPE with 2x4 or 2x2x2, got 'v5p:2,2,2'"),
    ],
)
def test_wrong_names_get_one_message(name, message):
    with pytest.raises(ConfigError, match=message):
        Topology.parse(name)


@pytest.mark.parametrize("file", sorted(CHIPS.glob("*.toml")), ids=lambda file: file.stem)
def test_every_number_of_a_chip_names_its_source(file):
    lines = file.read_text().splitlines()
    sources = {mark for line in lines for mark in re.findall(r"^# (\(\d\)) \S", line)}
    numbers = [line for line in lines if re.match(r"\w+ = [\d\[]", line)]
    assert numbers
    for line in numbers:
        assert set(re.findall(r"# (\(\d\))", line)) & sources, line


def test_gpus_of_a_kind_differ_in_what_xla_is_told():
    targets = {chip: Topology.parse(f"{chip}:1x8").target() for chip in ("a100", "h100", "h200")}
    assert len(set(targets.values())) == 3
    assert "cuda_compute_capability { major: 9 minor: 0 }" in targets["h100"]
    assert 'device_description_str: "NVIDIA A100-SXM4-80GB"' in targets["a100"]
    assert targets["h100"].count("{") == targets["h100"].count("}")
    assert Topology.parse("v5p:2x2x1").target() == ""

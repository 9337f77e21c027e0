"""What imagination costs, counted on the meta device, against formulae and the page."""

from pathlib import Path

import pytest
import torch

from benchmarks import flops, imagination_cost
from benchmarks.public_weights import SIZES

ENVS, STEPS = 3, 5


def test_operations_are_those_of_the_formulae_times_the_environments():
    sizes = SIZES["tiny"]
    config = sizes.world_model
    found = imagination_cost.costs(config, sizes.classifier, ENVS, torch.bfloat16, STEPS)
    encode, decode = flops.autoencoder(config.autoencoder, config.image_size)
    frames = ENVS * config.chunk
    expected = {
        "start: encoder": ENVS * encode,
        "encoder, maps": frames * encode,
        # All environments share the embedding of the frame rate.
        "denoiser, a step": pytest.approx(ENVS * flops.unet(config), rel=1e-3),
        "keys and values": ENVS * flops.context(config),
        "decoder": frames * decode,
        "classifier": frames * flops.classifier(sizes.classifier, config.image_size),
    }
    assert {stage: found[stage].flops for stage in expected} == expected
    whole = sum(c.calls * c.flops for stage, c in found.items() if not stage.startswith("start"))
    formula = flops.chunk(config, STEPS, classifier_width=sizes.classifier)
    assert whole == pytest.approx(ENVS * formula, rel=1e-3)
    assert all(cost.traffic >= cost.peak > 0 for cost in found.values())


@pytest.mark.slow
def test_page_holds_what_the_command_prints(capsys):
    page = (Path(__file__).parents[3] / "docs" / "full_size.md").read_text()
    rows = page.split("| stage | calls |")[1].split("\n\n")[0].splitlines()[2:]
    shown = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    imagination_cost.main([])
    printed = capsys.readouterr().out.splitlines()
    width = 22  # of the names of stages
    assert shown == [[line[:width].strip(), *line[width:].split()] for line in printed[2:-1]]
    assert f"`{printed[-1]}`" in page

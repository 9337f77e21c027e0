"""UNet, decoder and classifier are traced whole: no part falls back to Python.

That is what `torch.compile`, `torch.export` and CUDA graphs need. No code is generated here.
"""

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_map

from evac_jax.sim.reward import RewardConfig, RewardNet
from tests.unit.evac.tiny import TINY, tiny_model


class _Decoder(nn.Module):
    """The decoder as imagination calls it."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, latents):
        return self.model.decode(latents)


def _unet(views):
    model = tiny_model(views)
    frames, (height, width) = TINY.frames, TINY.latent_size
    tokens = TINY.image_tokens + TINY.unet.action_tokens
    random = torch.Generator().manual_seed(0)
    context = torch.randn(2 * views, tokens, TINY.unet.context_dim, generator=random)
    with torch.no_grad():
        prepared = model.unet.prepare_context(context, views)
    arguments = (
        torch.randn(2 * views, TINY.unet.in_channels, frames, height, width, generator=random),
        torch.full((2 * views,), 500),
        prepared,
        torch.tensor([2]),
        torch.tensor([1]),
    )
    return model.unet, arguments, {"n_history": TINY.n_previous, "n_view": views}


def _decoder():
    random = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 3, 4, *TINY.latent_size, generator=random)
    return _Decoder(tiny_model()), (latents,), {}


def _classifier():
    torch.manual_seed(0)
    random = torch.Generator().manual_seed(0)
    network = RewardNet(RewardConfig(width=4)).eval()
    return network, (torch.randn(3, 3, 32, 32, generator=random),), {}


NETWORKS = {
    "unet": lambda: _unet(1),
    "unet of two views": lambda: _unet(2),
    "decoder": _decoder,
    "classifier": _classifier,
}


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] * n.endswith("two views")) for n in NETWORKS],
)
@torch.no_grad()
def test_network_is_one_graph_with_the_same_numbers(name):
    network, arguments, options = NETWORKS[name]()
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph.forward

    # With `fullgraph` a break is an error, which names the line.
    compiled = torch.compile(network, backend=keep, fullgraph=True, dynamic=False)
    found = compiled(*arguments, **options)
    torch.testing.assert_close(found, network(*arguments, **options), rtol=0, atol=0)
    assert len(graphs) == 1
    compiled(*arguments, **options)
    assert len(graphs) == 1  # the same shapes again


@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "unet of two views"])
@torch.no_grad()
def test_network_is_exported_as_accelerators_run_it(name):
    """On the meta device layers take the branches of other devices than CPUs."""
    network, arguments, options = NETWORKS[name]()
    expected = network(*arguments, **options).shape
    arguments = tree_map(_on_meta, arguments)
    exported = torch.export.export(network.to("meta", torch.bfloat16), arguments, options)
    (found,) = exported.graph.find_nodes(op="output")[0].args[0]
    assert (found.meta["val"].shape, found.meta["val"].dtype) == (expected, torch.bfloat16)


def _on_meta(value):
    if not isinstance(value, torch.Tensor):
        return value
    return value.to("meta", torch.bfloat16 if value.is_floating_point() else None)

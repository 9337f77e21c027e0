import json

import pytest
import torch
from torch import nn

from evac_jax.errors import ConfigError
from evac_jax.evac.model_folders import save_model
from evac_jax.sim.reward import RewardConfig, RewardEnsemble, RewardNet

FRAMES = torch.zeros(3, 3, 8, 8)


def test_reward_is_clamped_and_thresholded_when_frames_overshoot():
    torch.manual_seed(0)
    net, frames = RewardNet(RewardConfig(width=4)).eval(), torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        probability = net.probability(3 * frames)
        torch.testing.assert_close(probability, net.probability((3 * frames).clamp(-1, 1)))
        between = float(probability.sort().values[:2].mean())
        assert net.predict(3 * frames, threshold=between).sum() == 2
        assert net.predict(3 * frames, threshold=1.0).sum() == 0


def test_reward_depends_on_the_instruction_when_there_are_several():
    torch.manual_seed(0)
    net = RewardNet(RewardConfig(width=4, num_instructions=2)).eval()
    for table in net.instruction:
        nn.init.normal_(table.weight)
    frames = torch.rand(1, 3, 32, 32).expand(2, -1, -1, -1)
    with torch.no_grad():
        first, second = net(frames, torch.tensor([0, 1]))
        assert not torch.isclose(first, second)
        torch.testing.assert_close(net(frames, torch.tensor([1, 1]))[0], second)
    with pytest.raises(ValueError, match="2 instructions"):
        net(frames)


class Sure(nn.Module):
    """A classifier that always says the same."""

    def __init__(self, *chances, instructions=3):
        super().__init__()
        self.config = RewardConfig(width=4, num_instructions=instructions)
        self._chances = torch.tensor(chances)

    def probability(self, frames, instruction=None):
        return self._chances


def test_ensemble_of_one_is_that_one():
    torch.manual_seed(0)
    member = RewardNet(RewardConfig(width=4)).eval()
    frames = torch.rand(5, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(
            RewardEnsemble([member]).probability(frames), member.probability(frames)
        )


def test_mean_counts_and_disagreement_beyond_the_veto_is_failure():
    members = [Sure(0.9, 0.9, 0.2), Sure(0.8, 0.3, 0.1)]
    plain = RewardEnsemble(members).probability(FRAMES)
    torch.testing.assert_close(plain, torch.tensor([0.85, 0.6, 0.15]))
    vetoed = RewardEnsemble(members, veto=0.5).probability(FRAMES)
    torch.testing.assert_close(vetoed, torch.tensor([0.85, 0.0, 0.15]))


def test_members_must_know_the_same_instructions():
    with pytest.raises(ConfigError, match=r"got \[0, 3\]"):
        RewardEnsemble([Sure(0.5), Sure(0.5, instructions=0)])


def test_nobody_to_disagree_is_refused():
    with pytest.raises(ConfigError, match="at least, got 1"):
        RewardEnsemble([Sure(0.5)], veto=0.3)


def _saved(folder, instructions, seed=0):
    torch.manual_seed(seed)
    save_model(folder, RewardNet(RewardConfig(width=4, num_instructions=len(instructions))))
    (folder / "card.json").write_text(json.dumps({"instructions": instructions}))
    return str(folder)


def test_folders_joined_by_commas_become_members(tmp_path):
    folders = [_saved(tmp_path / str(seed), ["red", "blue"], seed) for seed in range(2)]
    ensemble = RewardEnsemble.load(",".join(folders), veto=1.0)
    frames, task = torch.rand(4, 3, 32, 32), torch.tensor([0, 1, 0, 1])
    with torch.no_grad():
        alone = [RewardEnsemble.load(f).probability(frames, task) for f in folders]
        torch.testing.assert_close(ensemble.probability(frames, task), sum(alone) / 2)
    assert not torch.equal(*alone)


def test_same_instructions_in_another_order_are_refused(tmp_path):
    a = _saved(tmp_path / "a", ["red", "blue"])
    b = _saved(tmp_path / "b", ["blue", "red"])
    with pytest.raises(ConfigError, match=r"(?s)same order.*\['blue', 'red'\]") as error:
        RewardEnsemble.load(f"{a},{b}")
    assert a in str(error.value)


def test_classifier_without_a_card_is_taken_as_it_is(tmp_path):
    a = _saved(tmp_path / "a", ["red", "blue"])
    b = _saved(tmp_path / "b", ["red", "blue"])
    (tmp_path / "b" / "card.json").unlink()
    assert len(RewardEnsemble.load(f"{a},{b}").members) == 2

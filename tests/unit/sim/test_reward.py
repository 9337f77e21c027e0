import json

import pytest
import torch
from torch import nn

from evac_jax.errors import CheckpointError, ConfigError
from evac_jax.evac.model_folders import save_model
from evac_jax.sim.reward import RewardConfig, RewardEnsemble, RewardNet

FRAMES = torch.zeros(3, 3, 8, 8)


def test_frames_are_clamped_when_they_overshoot():
    torch.manual_seed(0)
    net, frames = RewardNet(RewardConfig(width=4)).eval(), torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        probability = net.probability(3 * frames)
        torch.testing.assert_close(probability, net.probability((3 * frames).clamp(-1, 1)))
        assert not torch.isclose(probability, net.probability(frames)).any()


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


def test_nobody_to_disagree_is_refused():
    with pytest.raises(ConfigError, match="at least, got 1"):
        RewardEnsemble([Sure(0.5)], veto=0.3)


def _saved(folder, instructions, seed=0):
    torch.manual_seed(seed)
    net = RewardNet(RewardConfig(width=4, num_instructions=len(instructions)))
    for table in net.instruction:
        nn.init.normal_(table.weight)
    save_model(folder, net)
    (folder / "card.json").write_text(json.dumps({"instructions": instructions}))
    return str(folder)


TASKS = ("red", "blue")
PICTURES = torch.linspace(-1, 1, 4 * 3 * 32 * 32).reshape(4, 3, 32, 32)


def _told(folder, instructions, texts):
    """Probabilities of PICTURES from a classifier that is asked about `texts`."""
    numbers = torch.tensor([instructions.index(text) for text in texts])
    with torch.no_grad():
        return RewardEnsemble.load(folder, instructions).probability(PICTURES, numbers)


def test_folders_joined_by_commas_become_members(tmp_path):
    folders = [_saved(tmp_path / str(seed), TASKS, seed) for seed in range(2)]
    asked = ("red", "blue", "red", "blue")
    one, other = (_told(folder, TASKS, asked) for folder in folders)
    torch.testing.assert_close(_told(",".join(folders), TASKS, asked), (one + other) / 2)
    assert not torch.equal(one, other)


def test_tasks_are_matched_by_text_when_a_world_lists_them_in_another_order(tmp_path):
    folder = _saved(tmp_path / "a", TASKS)
    asked = ("red", "blue", "blue", "blue")
    same = _told(folder, TASKS, asked)
    assert torch.equal(_told(folder, TASKS[::-1], asked), same)
    assert not torch.equal(_told(folder, TASKS, asked[::-1]), same)


def test_world_with_one_of_two_tasks_is_judged(tmp_path):
    folder = _saved(tmp_path / "a", TASKS)
    of_two, of_one = (_told(folder, tasks, ("blue",) * 4) for tasks in (TASKS, ("blue",)))
    assert torch.equal(of_two, of_one)


def test_each_classifier_has_numbers_of_its_own_when_their_orders_differ(tmp_path):
    a, b = _saved(tmp_path / "a", TASKS), _saved(tmp_path / "b", (*TASKS[::-1], "green"), 1)
    asked = ("red", "blue", "red", "blue")
    alone = [_told(folder, TASKS, asked) for folder in (a, b)]
    torch.testing.assert_close(_told(f"{a},{b}", TASKS, asked), sum(alone) / 2)


def test_unknown_instruction_is_refused_by_name(tmp_path):
    folder = _saved(tmp_path / "a", TASKS)
    with pytest.raises(ConfigError, match=r"(?s)card\.json.*'red', 'blue'.*'blau'") as error:
        RewardEnsemble.load(folder, ("red", "blau"))
    assert folder in str(error.value)
    assert "'red'." not in str(error.value)


def test_classifier_without_a_card_is_taken_in_the_order_of_the_world_and_says_so(tmp_path):
    folder = _saved(tmp_path / "a", TASKS)
    asked = ("blue", "red", "red", "red")
    with_card = _told(folder, TASKS, asked)
    assert RewardEnsemble.load(folder, TASKS).notes == ()
    (tmp_path / "a" / "card.json").unlink()
    assert torch.equal(_told(folder, TASKS, asked), with_card)
    (note,) = RewardEnsemble.load(folder, TASKS).notes
    assert folder in note
    assert str(list(TASKS)) in note


def test_classifier_without_a_card_is_refused_when_its_tasks_cannot_be_told(tmp_path):
    folder = _saved(tmp_path / "a", TASKS)
    (tmp_path / "a" / "card.json").unlink()
    with pytest.raises(ConfigError, match=r"knows 2 instructions and has no card.*have 1"):
        RewardEnsemble.load(folder, ("blue",))


def test_card_of_another_training_is_refused(tmp_path):
    folder = _saved(tmp_path / "a", TASKS)
    (tmp_path / "a" / "card.json").write_text(json.dumps({"instructions": ["red"]}))
    with pytest.raises(CheckpointError, match=r"lists 1 instructions, .* knows 2"):
        RewardEnsemble.load(folder, ("red",))


def test_classifier_that_is_told_no_instruction_judges_what_it_was_trained_on(tmp_path):
    folder = _saved(tmp_path / "a", ())
    card = tmp_path / "a" / "card.json"
    card.write_text(json.dumps({"instructions": ["open the drawer", "close the drawer"]}))
    assert len(_told(folder, ("open the drawer",), ["open the drawer"] * 4)) == 4
    assert RewardEnsemble.load(folder, ("close the drawer",)).notes == ()
    with pytest.raises(ConfigError, match=r"unknown to it are\n  'push the block'"):
        RewardEnsemble.load(folder, ("open the drawer", "push the block"))
    card.unlink()
    (note,) = RewardEnsemble.load(folder, ("push the block",)).notes
    assert "verdict is taken to count for ['push the block']" in note

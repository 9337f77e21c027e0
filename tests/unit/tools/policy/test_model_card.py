import huggingface_hub
import pytest

from evac_jax.config import hub
from evac_jax.config.build import default_config, to_dict
from evac_jax.telemetry import report
from evac_jax.tools.policy import model_card
from evac_jax.tools.policy.model_card import Story, Told

NOTHING = Told()
CARD = {"command": "python launch.py --mode=export", "versions": {"jax": "0.10.2"}}


@pytest.fixture
def start(tmp_path):
    folder = tmp_path / "private" / "start"
    folder.mkdir(parents=True)
    return folder


def trained(start, **changes):
    saved = to_dict(default_config("grpo"))
    saved["world_model"]["checkpoint"] = str(start.parent / "my_world")
    saved["eval"]["ground_truth"] = "miniature"
    before = {"imagined": (8, 64), "ground_truth": (34, 256)}
    after = {"imagined": (61, 64), "ground_truth": (231, 256)}
    facts = {"saved": saved, "iteration": 8, "before": before, "after": after}
    return Story(start, CARD, **(facts | changes))


def written(story, told=NOTHING):
    """The card as the Hub's own library reads it."""
    return huggingface_hub.ModelCard(model_card.text("my_policy", story, told))


def test_success_stands_in_the_card_with_intervals(start):
    card = written(trained(start))
    assert "| ground truth | 13.3% [9.7%, 18.0%], n = 256 | 90.2% [86.0%, 93.3%], n = 256 |" in (
        card.text
    )
    assert "8 iterations of `grpo` in the world model `my_world`" in card.text
    assert "optimistic" not in card.text
    assert "optimistic" in written(trained(start, chosen=True)).text
    assert str(start.parent) not in card.content


def test_policy_without_an_evaluation_is_called_so(start):
    assert "This policy was not evaluated." in written(trained(start, after={})).text
    only = written(trained(start, before={}, after={"imagined": (0, 4)})).text
    assert "| imagined | not evaluated | 0.0% [0.0%, 49.0%], n = 4 |" in only
    assert "does not prove success in reality" in only
    assert "It was not trained." in written(Story(start, CARD)).text


def test_metadata_is_what_the_hub_wants(start):
    data = written(trained(start), Told("mit", "me/base", ("me/data",))).data.to_dict()
    assert data["license"] == "mit"
    assert (data["base_model"], data["base_model_relation"]) == ("me/base", "finetune")
    assert data["datasets"] == ["me/data"]
    assert (data["pipeline_tag"], data["library_name"]) == ("robotics", "transformers")
    assert {"robotics", "reinforcement-learning", "grpo", "evac_jax"} <= set(data["tags"])
    adapter = written(trained(start, adapter=True), Told(base="me/base")).data
    assert (adapter.library_name, adapter.base_model_relation) == ("peft", "adapter")


def test_licence_and_base_come_from_the_card_of_the_start_policy(start):
    front = "---\nlicense: other\nlicense_name: tri\nlicense_link: LICENSE\nbase_model: a/b\n---\n"
    (start / "README.md").write_text(front + "# Start\n")
    card = written(trained(start))
    assert (card.data.license, card.data.license_name, card.data.base_model) == (
        *("other", "tri", "a/b"),
    )
    assert "Licence: other, as the card of the start policy says." in card.text
    told = written(trained(start), Told(license="apache-2.0")).data
    assert told.license == "apache-2.0"
    assert "license_name" not in told.to_dict()


@pytest.mark.parametrize("text", [None, "no front matter", "---\nlicense: [\n---\n"])
def test_licence_that_nobody_tells_is_called_unknown(start, text):
    if text is not None:
        (start / "README.md").write_text(text)
    card = written(trained(start))
    assert card.data.license == "unknown"
    assert "Licence: unknown. Ask the owner" in card.text
    assert "Base on the Hub: unknown." in card.text


def test_start_policy_of_the_hub_is_the_base(start, monkeypatch):
    monkeypatch.setattr(hub, "address_of", lambda path: "hf://me/start@" + 40 * "0")
    assert written(Story(start, CARD)).data.base_model == "me/start"


def test_own_algorithm_and_judge_are_named_as_they_were_given(start):
    story = trained(start)
    story.saved["algorithm"] = "mine.rloo:RLOO"
    story.saved["reward"]["judge"] = "mine.judge:make"
    card = written(story)
    assert "of `mine.rloo:RLOO` in the world model `my_world`, judged by `mine.judge:make`" in (
        card.text
    )
    assert "rloo" in card.data.tags


def test_evaluation_of_an_iteration_is_read_from_the_metrics(tmp_path):
    lines = (
        '{"iteration": 0, "eval/imagined/success_rate": 0.25, "eval/imagined/num_trajectories": 4}',
        '{"iteration": 1, "actor/loss": 0.5}',
        '{"iteration": 2, "eval/ground_truth/success_rate": 1.0, '
        '"eval/ground_truth/num_trajectories": 3.0}',
    )
    (tmp_path / report.METRICS_FILE).write_text("\n".join(lines))
    assert report.evaluated(tmp_path, 0) == {"imagined": (1, 4)}
    assert report.evaluated(tmp_path, 1) == {}
    assert report.evaluated(tmp_path, 2) == {"ground_truth": (3, 3)}
    assert report.evaluated(tmp_path / "none", 0) == {}

import json

import numpy as np
import pytest

from policies.openvla_oft.export_hf import make_tokenizer
from policies.openvla_oft.prompt import PromptTokenizer
from tests.unit.policies.tiny import CONFIG, TASKS


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(TASKS, CONFIG).save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"pad_token_id": CONFIG.pad_token_id}))
    return folder


def test_padding_follows_bos_when_prompts_are_short(folder):
    tokenizer = PromptTokenizer(folder, max_length=30)
    tokens, mask = tokenizer.encode(["Open the DRAWER", *TASKS])
    for row, valid in zip(tokens, mask, strict=True):
        pads = int((~valid).sum())
        assert pads > 0
        assert row[0] == 1
        assert (row[1 : 1 + pads] == CONFIG.pad_token_id).all()
        assert not valid[1 : 1 + pads].any()
        assert row[-1] == tokenizer.space_id
        assert (row[-20:] < CONFIG.first_action_token)[valid[-20:]].all()
    np.testing.assert_array_equal(tokens[0], tokens[2])  # the case of a task does not matter


def test_prompt_fills_the_row_when_it_has_exactly_the_length(folder):
    length = len(PromptTokenizer(folder, max_length=60).prompt_ids(TASKS[0]))
    tokens, mask = PromptTokenizer(folder, max_length=length).encode(TASKS[:1])
    assert mask.all()
    with pytest.raises(ValueError, match="max_prompt_length"):
        PromptTokenizer(folder, max_length=length - 1).encode(TASKS[:1])


def test_unknown_characters_become_bytes_when_the_vocabulary_lacks_them(folder):
    ids = PromptTokenizer(folder, max_length=60).prompt_ids("öffne")
    assert 0 not in ids
    assert 3 + 0xC3 in ids


def test_error_names_the_file_when_there_is_no_tokenizer(tmp_path):
    with pytest.raises(FileNotFoundError, match="tokenizer.json"):
        PromptTokenizer(tmp_path, max_length=10)

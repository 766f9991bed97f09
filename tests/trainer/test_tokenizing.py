"""What exactly is scored, for chat templates of every kind."""

import pytest
from conftest import make_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from mpo.config import DataConfig
from mpo.data import Message, Pair, Row
from mpo.errors import UserError
from mpo.tokenizing import decode_view, tokenize_rows


def row(prompt="hello", chosen="no thanks", rejected="sure", system=None) -> Row:
    turns = (*((Message(role="system", content=system),) if system else ()), Message(role="user", content=prompt))
    pair = Pair(prompt=turns, chosen=chosen, rejected=rejected)
    return Row("rows.jsonl:1", "sw", pair, pair)


def config(**options) -> DataConfig:
    return DataConfig(train=("x",), **options)


@pytest.mark.parametrize(
    ("template", "prompt", "scored"),
    [
        ("chatml", "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n", "no thanks<|im_end|>"),
        ("llama3", "<|begin|><|header|>user<|/header|>\n\nhello<|eot|><|header|>assistant<|/header|>\n\n", "no thanks<|eot|>"),
        ("gemma", "<bos><start_of_turn>user\nhello<end_of_turn>\n<start_of_turn>model\n", "no thanks<end_of_turn>"),
        ("no_end", "user: hello\nassistant: ", "no thanks\n"),
    ],
)
def test_the_response_and_its_end_of_turn_are_scored(template, prompt, scored):
    tokenizer = make_tokenizer(template)
    (example,), bad = tokenize_rows([row()], tokenizer, config())
    assert not bad
    assert decode_view(example.target_chosen, tokenizer) == (prompt, scored)


@given(st.text(alphabet=st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1).filter(lambda s: s.strip()))
def test_any_answer_is_scored_whole(text):
    """Texts in any script; the prompt's ids are untouched by what follows, and no begin-of-sequence token is added."""
    tokenizer = make_tokenizer("llama3")
    if any(token in text for token in tokenizer.all_special_tokens):
        return
    (example,), _ = tokenize_rows([row(chosen=text, rejected="z" + text)], tokenizer, config(max_length=100_000))
    ids = example.target_chosen.input_ids
    assert tokenizer.decode(ids[example.target_chosen.response_start :]) == text + "<|eot|>"
    assert ids.count(tokenizer.convert_tokens_to_ids("<|begin|>")) == 1


def test_truncation_cuts_the_response_and_keeps_at_least_one_token():
    tokenizer = make_tokenizer()
    (whole,), _ = tokenize_rows([row()], tokenizer, config())
    start = whole.target_chosen.response_start
    (cut,), _ = tokenize_rows([row()], tokenizer, config(max_length=start + 1))
    assert cut.target_chosen.input_ids == whole.target_chosen.input_ids[: start + 1]
    with pytest.raises(UserError, match="response_truncated_away: the target prompt has"):
        tokenize_rows([row()], tokenizer, config(max_length=start))
    examples, bad = tokenize_rows([row(), row(prompt="h")], tokenizer, config(max_length=start, on_bad_row="drop"))
    assert len(examples) == 1 and [b.reason for b in bad] == ["response_truncated_away"]


def test_a_pad_token_that_is_the_end_of_turn_is_still_scored():
    tokenizer = make_tokenizer()
    tokenizer.pad_token = "<|im_end|>"
    (example,), _ = tokenize_rows([row()], tokenizer, config())
    assert tokenizer.decode(example.target_chosen.input_ids[-1:]) == "<|im_end|>"


def test_equal_content_is_equal_so_that_shared_pairs_are_found():
    (one, two), _ = tokenize_rows([row(), row()], make_tokenizer(), config())
    assert one.dominant_chosen == two.dominant_chosen and hash(one.dominant_chosen) == hash(two.dominant_chosen)
    assert one.dominant_chosen != one.dominant_rejected


def test_refused_templates():
    with pytest.raises(UserError, match="has no chat template"):
        tokenize_rows([row()], make_tokenizer("none"), config())
    with pytest.raises(UserError, match="not prefix-stable"):
        tokenize_rows([row()], make_tokenizer("not_prefix_stable"), config())
    with pytest.raises(UserError, match=r"refused_by_template: .*System role not supported"):
        tokenize_rows([row(system="be nice")], make_tokenizer("gemma"), config())
    examples, bad = tokenize_rows([row(system="be nice"), row()], make_tokenizer("gemma"), config(on_bad_row="drop"))
    assert len(examples) == 1 and bad[0].reason == "refused_by_template"


def test_system_prompts_are_part_of_the_prompt():
    tokenizer = make_tokenizer()
    (example,), _ = tokenize_rows([row(system="be nice")], tokenizer, config())
    assert decode_view(example.target_chosen, tokenizer)[0].startswith("<|im_start|>system\nbe nice<|im_end|>")

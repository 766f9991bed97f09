"""What exactly is scored, for chat templates of every kind."""

import pytest
from conftest import SPECIAL, make_tokenizer
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mpo.config import DataConfig
from mpo.data.examples import decode_view, tokenize_rows
from mpo.data.rows import Message, Pair, Row
from mpo.runtime.errors import UserError


def row(prompt="hello", chosen="no thanks", rejected="sure", system=None) -> Row:
    turns = (
        *((Message(role="system", content=system),) if system else ()),
        Message(role="user", content=prompt),
    )
    pair = Pair(prompt=turns, chosen=chosen, rejected=rejected)
    return Row("rows.jsonl:1", "sw", pair, pair)


def config(**options) -> DataConfig:
    return DataConfig(train=("x",), **options)


@pytest.mark.parametrize(
    ("template", "prompt", "scored"),
    [
        (
            "chatml",
            "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n",
            "no thanks<|im_end|>",
        ),
        (
            "llama3",
            "<|begin|><|header|>user<|/header|>\n\nhello<|eot|><|header|>assistant<|/header|>\n\n",
            "no thanks<|eot|>",
        ),
        (
            "gemma",
            "<bos><start_of_turn>user\nhello<end_of_turn>\n<start_of_turn>model\n",
            "no thanks<end_of_turn>",
        ),
        ("no_end", "user: hello\nassistant: ", "no thanks\n"),
    ],
)
def test_the_response_and_its_end_of_turn_are_scored(template, prompt, scored):
    tokenizer = make_tokenizer(template)
    (example,), bad = tokenize_rows([row()], tokenizer, config())
    assert not bad
    assert decode_view(example.target.chosen, tokenizer) == (prompt, scored)


PIECES = st.one_of(
    st.sampled_from(
        [
            "\n",
            "\n\n",
            " ",
            "  ",
            "\t",
            "n",
            "No.",
            "<think>",
            "</think>",
            "<think>\nwell\n</think>\n\n",
            *SPECIAL[:6],
        ]
    ),
    st.text(alphabet=st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=6),
)
FRAMES = {
    "chatml": ("<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>"),
    "llama3": (
        "<|begin|><|header|>user<|/header|>\n\nhello<|eot|><|header|>assistant<|/header|>\n\n",
        "<|eot|>",
    ),
    "gemma": (
        "<bos><start_of_turn>user\nhello<end_of_turn>\n<start_of_turn>model\n",
        "<end_of_turn>",
    ),
    "no_end": ("user: hello\nassistant: ", "\n"),
    "thinking": (
        "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
        "<|im_end|>",
    ),
    "stripping": (
        "<|begin|><|header|>user<|/header|>\n\nhello<|eot|><|header|>assistant<|/header|>\n\n",
        "<|eot|>",
    ),
    "spaced": ("<bos>[INST] hello [/INST] ", "<|eot|>"),
    "two_ends": ("<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>"),
    "unasked": ("<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>"),
    "channels": (
        "<|begin|>user<|/header|>hello<|im_end|><|begin|>assistant<|header|>final<|/header|>",
        "<|eot|>",
    ),
    "no_system": ("<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>"),
}
"""What a template writes before an answer without a think block of its own, and its end of turn."""


@pytest.mark.parametrize("kind", ["bytes", "joining", "pieces"])
@pytest.mark.parametrize("template", FRAMES)
def test_scored_is_the_answer_and_its_end_of_turn_and_nothing_else(template, kind):
    """For any answer. What cannot be scored so is a bad row, and only an answer with white space
    around it or a think block may be one."""
    tokenizer = make_tokenizer(template, kind)
    before, end = FRAMES[template]

    @settings(max_examples=25, deadline=None)
    @given(st.lists(PIECES, min_size=1, max_size=5).map("".join).filter(str.strip))
    @example("no thanks")
    @example("\n\nno thanks")
    @example("\nno thanks ")
    @example("think")
    @example("<|im_end|>no<|eot|>")
    @example("<think>\nwell\n</think>\n\nno thanks")
    @example("<think>\n\n</think>\n\nno thanks")
    def check(answer):
        # the second keeps the list from being empty
        rows = [row(chosen=answer, rejected="z"), row(chosen="Well.")]
        examples, bad = tokenize_rows(
            rows, tokenizer, config(max_length=100_000, on_bad_row="drop")
        )
        if bad:
            # its generation prompt ends with a space
            beginnings = " n" if template == "no_end" else "\n "
            joined = (
                kind != "bytes"
                and answer[0] in beginnings
                and template not in ("stripping", "channels")
            )
            rewritten = template == "thinking" and "</think>" in answer
            assert [b.reason for b in bad] == [
                "answer_rewritten" if rewritten else "answer_joined_with_template"
            ]
            assert joined or rewritten
            return
        prompt, scored = decode_view(examples[0].target.chosen, tokenizer)
        # The space before an answer is in its first token, as the model writes it, where the
        # tokenizer has such a token.
        space = (
            " "
            if template == "spaced"
            and kind != "bytes"
            and answer[0] in "n \n"
            and prompt + " " == before
            else ""
        )
        text = scored.removeprefix(space).removesuffix(end)
        assert scored == space + text + end
        if template in ("stripping", "thinking"):
            assert text.strip() == answer.strip()
        else:
            assert text == answer
        own_thoughts = template == "thinking" and "</think>" in answer
        assert prompt + space == (
            before.removesuffix("<think>\n\n</think>\n\n") if own_thoughts else before
        )

    check()


def test_an_answer_that_cannot_be_told_from_the_template_is_a_bad_row_with_its_place():
    tokenizer = make_tokenizer("chatml", "joining")
    message = (
        r"rows.jsonl:1: answer_joined_with_template: the target chosen answer begins with '\\n\\nno"
        r" thanks', which the tokenizer joins"
    )
    with pytest.raises(UserError, match=message):
        tokenize_rows([row(chosen="\n\nno thanks"), row()], tokenizer, config())
    examples, bad = tokenize_rows(
        [row(chosen="\n\nno thanks"), row()], tokenizer, config(on_bad_row="drop")
    )
    assert len(examples) == 1 and [b.reason for b in bad] == ["answer_joined_with_template"]
    one = row(chosen="\nno thanks")  # "assistant", "\n", "\n", "no": told apart
    assert (
        decode_view(tokenize_rows([one], tokenizer, config())[0][0].target.chosen, tokenizer)[1]
        == "\nno thanks<|im_end|>"
    )


def test_a_prompt_has_the_tokens_that_the_model_is_asked_with():
    """Here two line breaks are one token at the end of a prompt, and two before a word."""
    tokenizer = make_tokenizer("llama3", "joining")
    (example,), _ = tokenize_rows([row()], tokenizer, config())
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hello"}], add_generation_prompt=True
    )["input_ids"]
    response = example.target.chosen
    assert list(response.input_ids[: response.response_start]) == asked
    assert tokenizer.decode(response.input_ids[response.response_start :]) == "no thanks<|eot|>"


def test_a_template_that_rewrites_or_drops_an_answer_makes_bad_rows():
    for change, message in (
        ("| upper", "writes something else than the target chosen answer"),
        ("[:3]", "leaves the answer"),
        ("+ 1", "refuses"),
    ):
        tokenizer = make_tokenizer()
        tokenizer.chat_template = tokenizer.chat_template.replace(
            "m['content'] }}", f"m['content'] {change} }}}}"
        )
        with pytest.raises(UserError, match=message):
            tokenize_rows([row()], tokenizer, config())


@pytest.mark.parametrize(
    ("template", "chosen", "rejected", "short"),
    [
        ("chatml", "sure, here it is", "sure, never", 6),  # equal where max_length cuts
        ("stripping", "no", "no \u2028", None),
        ("thinking", "\nno", "no", None),
    ],
)
def test_answers_that_are_equal_as_tokens_are_a_bad_row(template, chosen, rejected, short):
    tokenizer = make_tokenizer(template)
    limit = len(tokenizer(FRAMES[template][0])["input_ids"]) + (short or 100)
    same = row(chosen=chosen, rejected=rejected)
    with pytest.raises(
        UserError,
        match=(
            r"rows.jsonl:1: chosen_equals_rejected: the target pair has no gap: both answers are"
            r" the same"
        ),
    ):
        tokenize_rows([same], tokenizer, config(max_length=limit))
    examples, bad = tokenize_rows(
        [same, row()], tokenizer, config(max_length=limit, on_bad_row="drop")
    )
    assert len(examples) == 1 and [b.reason for b in bad] == ["chosen_equals_rejected"]


def test_truncation_cuts_the_response_and_keeps_at_least_one_token():
    tokenizer = make_tokenizer()
    (whole,), _ = tokenize_rows([row()], tokenizer, config())
    start = whole.target.chosen.response_start
    (cut,), _ = tokenize_rows([row()], tokenizer, config(max_length=start + 1))
    assert cut.target.chosen.input_ids == whole.target.chosen.input_ids[: start + 1]
    with pytest.raises(UserError, match="response_truncated_away: the target prompt has"):
        tokenize_rows([row()], tokenizer, config(max_length=start))
    examples, bad = tokenize_rows(
        [row(), row(prompt="h")], tokenizer, config(max_length=start, on_bad_row="drop")
    )
    assert len(examples) == 1 and [b.reason for b in bad] == ["response_truncated_away"]


def test_a_pad_token_that_is_the_end_of_turn_is_still_scored():
    tokenizer = make_tokenizer()
    tokenizer.pad_token = "<|im_end|>"
    (example,), _ = tokenize_rows([row()], tokenizer, config())
    assert tokenizer.decode(example.target.chosen.input_ids[-1:]) == "<|im_end|>"


def test_equal_content_is_equal_so_that_shared_pairs_are_found():
    (one, two), _ = tokenize_rows([row(), row()], make_tokenizer(), config())
    assert one.dominant.chosen == two.dominant.chosen
    assert hash(one.dominant.chosen) == hash(two.dominant.chosen)
    assert one.dominant.chosen != one.dominant.rejected


def test_refused_templates():
    with pytest.raises(UserError, match="has no chat template"):
        tokenize_rows([row()], make_tokenizer("none"), config())
    with pytest.raises(UserError, match="not prefix-stable"):
        tokenize_rows([row()], make_tokenizer("not_prefix_stable"), config())
    with pytest.raises(UserError, match=r"refused_by_template: .*System role not supported"):
        tokenize_rows([row(system="be nice")], make_tokenizer("gemma"), config())
    examples, bad = tokenize_rows(
        [row(system="be nice"), row()], make_tokenizer("gemma"), config(on_bad_row="drop")
    )
    assert len(examples) == 1 and bad[0].reason == "refused_by_template"


def test_a_template_that_is_not_prefix_stable_for_some_conversations_makes_bad_rows_of_them():
    tokenizer = make_tokenizer()
    tokenizer.chat_template += (
        "{% if add_generation_prompt and messages[0]['role'] == 'system' %}<think>{% endif %}"
    )
    with pytest.raises(
        UserError,
        match=(
            r"(?s)1 of 2 rows.*rows.jsonl:1: template_not_prefix_stable: its generation prompt is"
            r" no beginning"
        ),
    ):
        tokenize_rows([row(system="be nice"), row()], tokenizer, config())
    examples, bad = tokenize_rows(
        [row(system="be nice"), row()], tokenizer, config(on_bad_row="drop")
    )
    assert len(examples) == 1 and [b.reason for b in bad] == ["template_not_prefix_stable"]


def test_system_prompts_are_part_of_the_prompt():
    tokenizer = make_tokenizer()
    (example,), _ = tokenize_rows([row(system="be nice")], tokenizer, config())
    assert decode_view(example.target.chosen, tokenizer)[0].startswith(
        "<|im_start|>system\nbe nice<|im_end|>"
    )

"""`mpo data build` with chosen answers of the model itself."""
# ruff: noqa: F811  (fixtures come from builds.py)

import pytest
from builds import (
    ANSWERS,
    TRANSLATIONS,
    answerer,  # noqa: F401  (a fixture)
    dropped_of,
    folder,  # noqa: F401  (a fixture)
    make_bert,
    preferences,
    read,
    rows_of,
    run,
    server,  # noqa: F401  (a fixture)
    through,
)
from tiny import write_rows

from mpo.data.rows import Message
from mpo.data_build.answers import Answerer
from mpo.data_build.config import AnswersConfig
from mpo.runtime.errors import UserError


def test_chosen_answers_of_the_model_itself(folder, server, answerer):
    rows = preferences(3)
    write_rows(
        folder / "prefs.jsonl",
        [{k: v for k, v in row.items() if k != "chosen" or i != 1} for i, row in enumerate(rows)],
    )
    spoken = dict(
        zip(ANSWERS.values(), ("Hapana, uliza dukani.", "Sitaandika barua hiyo."), strict=True)
    )
    server.translations = {
        **TRANSLATIONS,
        **{(answer, "sw"): translation for answer, translation in spoken.items()},
    }
    through(server, folder)
    options = {"path": answerer, "max_new_tokens": 40, "dtype": "float32"}
    asked = [
        "languages=[sw]",
        *(f"chosen_from_model.{name}={value}" for name, value in options.items()),
    ]
    report = run(folder, *asked)
    made = rows_of(folder)
    # not those of the input, padded or not
    assert [row["dominant"]["chosen"] for row in made] == list(ANSWERS.values())
    assert [row["target"]["chosen"] for row in made] == list(spoken.values())
    # a prompt that it never saw
    assert [row["reason"] for row in dropped_of(folder)] == ["answer_truncated"]
    # no translation for nothing
    assert report["rows_in"] == 3 and rows[2]["prompt"] not in {text for text, _ in server.asked}
    assert [line["answer"] for line in read(folder / "out/rows.jsonl.answers.jsonl")] == list(
        ANSWERS.values()
    )
    write_rows(folder / "prefs.jsonl", rows[:2])
    assert run(folder, *asked)["translated"] == 0  # answers and translations from the journals
    with pytest.raises(
        UserError, match=r"another build: chosen_from_model is '.*answerer.*' there and None here"
    ):
        run(folder, "languages=[sw]")
    with pytest.raises(
        UserError, match=r"No row is left: prompt_too_long .*more than the model's 512"
    ):
        run(
            folder,
            *asked[:2],
            "chosen_from_model.max_new_tokens=500",
            f"output={folder / 'other.jsonl'}",
        )
    with pytest.raises(UserError, match="supported are"):
        run(
            folder,
            f"chosen_from_model.path={make_bert(folder)}",
            f"output={folder / 'other.jsonl'}",
        )


def test_answers_may_be_sampled(answerer):
    def answers(temperature):
        options = {
            "max_new_tokens": 40,
            "dtype": "float32",
            "batch_size": 1,
            "temperature": temperature,
        }
        model = Answerer(AnswersConfig(path=str(answerer), **options), print)
        prompts = [(Message(role="user", content=prompt),) for prompt in ANSWERS]
        return model.key(prompts[0]), {
            prompt[0].content: answer for batch in model.answer(prompts) for prompt, answer in batch
        }

    greedy, cool, hot = answers(0), answers(0.05), answers(5)
    assert greedy[1] == cool[1] == ANSWERS and hot[1] != ANSWERS
    assert len({greedy[0], cool[0], hot[0]}) == 3 and answers(5) == hot

"""`mpo data build` with a server that translates."""
# ruff: noqa: F811  (fixtures come from builds.py)

import json
import threading

import pytest
from builds import (
    TRANSLATIONS,
    dropped_of,
    expected,
    folder,  # noqa: F401  (a fixture)
    preferences,
    rows_of,
    run,
    server,  # noqa: F401  (a fixture)
    through,
)
from tiny import write_rows
from tiny_translator import completion

from mpo.data_build import server_translator
from mpo.runtime.errors import UserError


def test_the_server_is_asked_politely_and_only_the_translation_is_taken(folder, server):
    through(server, folder, concurrency=3, max_tokens=77)
    server.delay = 0.03
    server.translations = {
        job: f"<think>\nEasy.\n</think>\n\n<text>\n{text}\n</text>\n"
        for job, text in TRANSLATIONS.items()
    }
    run(folder)
    assert rows_of(folder) == expected()
    assert 2 <= server.most_under_way <= 3
    body = server.bodies[0]
    assert body["temperature"] == 0
    assert body["model"] == "tiny"
    assert body["max_tokens"] == 77
    assert len(body["messages"]) == 1
    assert "from English into Swahili" in body["messages"][0]["content"]
    assert not any("Authorization" in headers for headers in server.headers)


def test_a_server_in_trouble_is_asked_again(folder, server):
    through(server, folder, timeout=2)
    troubles = [
        (429, {"error": "slow down"}, {"Retry-After": "0.1"}),
        (500, "oops", {}),
        (503, "", {"Retry-After": "tomorrow"}),
        (200, "no JSON at all", {}),
        (200, {"choices": []}, {}),
        (200, {"choices": [{"message": {"content": 7}}]}, {}),
        (0, b"", {}),
        (200, b"short", {"Content-Length": "500"}),
    ]
    order = list(dict.fromkeys(source for source, _ in TRANSLATIONS))

    def misbehave(text, attempt):
        return troubles[order.index(text) % len(troubles)] if text and attempt == 1 else None

    server.misbehave = misbehave
    run(folder)
    assert rows_of(folder) == expected()
    assert set(server.asked.values()) == {2}


@pytest.mark.parametrize(
    ("asked", "waits"),
    [
        ([None] * 4, [0.5, 1, 2, 4]),  # doubled each time
        # what the server asks for, where that is longer
        (["1.2", "0.1", "30", "0"], [1.2, 1, 30, 4]),
        (["1000", "60.5", "59", "-5"], [60, 60, 59, 4]),  # a minute at most
        # no number
        (["Fri, 31 Dec 1999 23:59:59 GMT", "soon", "nan", "", "inf"], [0.5, 1, 2, 4, 60]),
        ([None] * 9, [0.5, 1, 2, 4, 8, 16, 32, 60, 60]),
    ],
)
def test_the_wait_before_another_attempt(folder, server, monkeypatch, asked, waits):
    """Not measured: the waits are recorded and not waited."""
    waited = []

    class Event(threading.Event):
        def wait(self, timeout=None):
            if threading.current_thread() is threading.main_thread() or timeout is None:
                return super().wait(timeout)
            waited.append(timeout)
            return self.is_set()

    monkeypatch.setattr(server_translator.threading, "Event", Event)
    write_rows(folder / "prefs.jsonl", preferences(1))
    through(server, folder, concurrency=1, retries=len(asked))
    first = preferences(1)[0]["prompt"]

    def misbehave(text, attempt):
        if text != first or attempt > len(asked):
            return None
        return 429, "", {} if asked[attempt - 1] is None else {"Retry-After": asked[attempt - 1]}

    server.misbehave = misbehave
    run(folder, "languages=[sw]")
    assert waited == waits and server.asked[first, "sw"] == len(asked) + 1


def test_a_secret_key_is_sent_and_kept_nowhere(folder, server, monkeypatch, capfd):
    secret = "no-real-key-of-anyone"
    through(server, folder, api_key_env="TINY_KEY")
    with pytest.raises(UserError, match="environment variable TINY_KEY is not set"):
        run(folder)
    monkeypatch.setenv("TINY_KEY", secret)
    server.misbehave = lambda text, attempt: (
        (400, f"bad request by {secret}", {}) if "shop" in text else None
    )
    run(folder)
    assert {headers["Authorization"] for headers in server.headers} == {f"Bearer {secret}"}
    assert "bad request by ***" in json.dumps(dropped_of(folder))
    server.misbehave = lambda text, attempt: (401, f"wrong key {secret}", {})
    with pytest.raises(
        UserError, match=r"refuses access \(status 401\). Check the key in TINY_KEY"
    ) as error:
        run(folder)
    assert secret not in str(error.value) and secret not in "".join(capfd.readouterr())
    for path in folder.rglob("*"):
        assert path.is_dir() or secret not in path.read_text(encoding="utf-8"), path


SERVER_FAULTS = [
    (
        (401, "", {}),
        {},
        (
            r"status 401\). Name the environment variable with its key in"
            r" translator.server.api_key_env"
        ),
    ),
    ((403, "", {}), {}, r"status 403"),
    (
        (404, "no such model", {}),
        {},
        r"model 'tiny' does not \(status 404: no such model\). Check translator.server.base_url",
    ),
    (
        (302, "", {"Location": "/v1/models"}),
        {"retries": 0},
        r"redirects to /v1/models .*Set translator.server.base_url to there",
    ),
    (
        (500, "down", {}),
        {"retries": 0},
        r"no translation in 1 attempts; at the last: status 500: down. What is translated is kept",
    ),
    ((200, "<html>", {}), {"retries": 0}, r"at the last: the reply is no JSON"),
    ((0, b"", {}), {"retries": 0}, r"at the last: (the connection broke|no connection)"),
    (None, {"base_url": "localhost:8000"}, "is no http or https address such as"),
    (None, {"base_url": "ftp://localhost/v1"}, "is no http or https address such as"),
    (None, {"base_url": "http://me:hunter2@localhost/v1"}, "holds a user, a password or a query"),
    (
        None,
        {"base_url": "http://127.0.0.1:9/v1"},
        r"does not answer \(no connection: .*Start the server, or set",
    ),
]


@pytest.mark.parametrize(
    ("answer", "options", "message"),
    SERVER_FAULTS,
    ids=[message[:25] for *_, message in SERVER_FAULTS],
)
def test_server_faults(folder, server, answer, options, message):
    through(server, folder, **options)
    server.misbehave = lambda text, attempt: answer if text else None
    with pytest.raises(UserError, match=message) as error:
        run(folder)
    assert "hunter2" not in str(error.value)
    assert sum(server.asked.values()) <= 8 and not (folder / "out/rows.jsonl").exists()


def test_texts_that_a_server_will_not_translate_drop_their_rows(folder, server):
    through(server, folder)
    rows = preferences()
    answers = {
        rows[0]["prompt"]: (400, {"error": "content policy"}, {}),
        rows[1]["chosen"]: (200, completion("nusu", "length"), {}),
        rows[2]["rejected"]: (200, completion(None, "content_filter"), {}),
    }
    server.misbehave = lambda text, attempt: answers.get(text)
    report = run(folder)
    assert report["languages"]["sw"] == {"rows": 1, "dropped": {"refused": 2, "truncated": 1}}
    assert [
        (row["id"], row["reason"]) for row in dropped_of(folder) if row["language"] == "zh"
    ] == [
        (f"{rows[i]['id']}-zh", reason)
        for i, reason in ((0, "refused"), (1, "truncated"), (2, "refused"))
    ]
    server.misbehave = lambda text, attempt: None
    # what failed is tried again
    assert run(folder)["translated"] == 6 and rows_of(folder) == expected()


def test_a_server_that_refuses_everything_stops_the_build(folder, server):
    write_rows(folder / "prefs.jsonl", preferences(18))
    through(server, folder, concurrency=2)
    server.misbehave = lambda text, attempt: (
        (422, "unknown field temperature", {}) if text else None
    )
    # Two requests are under way, whose answers may come together.
    with pytest.raises(
        UserError, match=r"refused the first 2[01] texts: status 422: unknown field temperature"
    ):
        run(folder)
    assert sum(server.asked.values()) <= 22

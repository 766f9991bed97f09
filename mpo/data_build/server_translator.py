"""Translation by a server with the OpenAI chat completions interface, with the standard library
alone."""

from __future__ import annotations

import http.client
import json
import os
import re
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import islice
from typing import Any, NoReturn
from urllib.parse import urlsplit

from mpo.data_build.config import ServerConfig
from mpo.data_build.translation import Failure, Finished, Result
from mpo.languages import name_of
from mpo.runtime.errors import UserError
from mpo.runtime.files import to_json

FIRST_DELAY, LONGEST_DELAY = 0.5, 60.0
"""Seconds before the first further attempt, doubled before each next one, and the longest wait,
also if Retry-After asks for more."""
REFUSALS = 20
"""So many refused texts before the first translation mean that the request is wrong, not the
texts."""
TRANSIENT = {408, 409, 425, 429, 500, 502, 503, 504, 529}
LARGEST_REPLY = 1 << 24
"""Bytes read of a reply."""


class _Again(Exception):
    """Worth another attempt, after `delay` seconds at least."""

    def __init__(self, why: str, delay: float = 0.0) -> None:
        super().__init__(why)
        self.delay = delay


class _Stopped(Exception):
    """The build stops, so nobody waits for this answer."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would turn the POST into a GET and show the key to another host."""

    def redirect_request(self, *arguments: Any) -> None:
        return None


class ServerTranslator:
    """Asks for each text once, several at a time, at temperature 0.

    Raises:
        UserError: the address is none, the variable with the key is not set, no server answers, or
            it refuses the key.
    """

    def __init__(self, config: ServerConfig, dominant: str) -> None:
        self._config, self._source = config, name_of(dominant)
        address = urlsplit(config.base_url)
        if address.username or address.password or address.query:
            raise UserError(
                "translator.server.base_url holds a user, a password or a query, which may be"
                " secret. Put the key into an environment variable and name that in"
                " translator.server.api_key_env."
            )
        self._address = config.base_url.rstrip("/")
        self._key = os.environ.get(config.api_key_env, "").strip() if config.api_key_env else ""
        if config.api_key_env and not self._key:
            raise UserError(
                f"The environment variable {config.api_key_env} is not set;"
                " translator.server.api_key_env names it for the key."
            )
        self._opener = urllib.request.build_opener(_NoRedirect)
        self._ping()

    def identity(self, language: str) -> list[str]:
        """Not the address: the same model may be served elsewhere the next time."""
        config = self._config
        return [
            "server",
            config.model,
            config.prompt,
            self._source,
            name_of(language),
            str(config.max_tokens),
        ]

    def translate(self, texts: Sequence[str], language: str) -> Iterator[Finished]:
        """Each text as soon as its answer is there, and those that came at the same time
        together."""
        stop = threading.Event()
        waiting = iter(texts)
        running: dict[Future[Result], str] = {}
        refusals: list[Failure] = []
        done = 0
        with ThreadPoolExecutor(self._config.concurrency) as pool:
            try:
                while True:
                    for text in islice(waiting, self._config.concurrency - len(running)):
                        running[pool.submit(self._translate, text, language, stop)] = text
                    if not running:
                        return
                    ready, _ = wait(running, return_when=FIRST_COMPLETED)
                    text_of = {future: running.pop(future) for future in ready}
                    good = [
                        (text, future.result())
                        for future, text in text_of.items()
                        if future.exception() is None
                    ]
                    yield good
                    for future in ready:
                        future.result()  # raises what went wrong, now that the others are safe
                    done += len(good)
                    refusals += [
                        result
                        for _, result in good
                        if isinstance(result, Failure) and result.reason == "refused"
                    ]
                    if len(refusals) == done >= REFUSALS:
                        raise UserError(
                            f"{self._address} refused the first {done} texts: {refusals[-1].detail}"
                        )
            finally:
                stop.set()

    def _translate(self, text: str, language: str, stop: threading.Event) -> Result:
        config = self._config
        # The text last: it may hold the other names in braces itself.
        request = (
            config.prompt.replace("{source}", self._source)
            .replace("{target}", name_of(language))
            .replace("{text}", text)
        )
        body: dict[str, Any] = {
            "model": config.model,
            "temperature": 0,
            "messages": [{"role": "user", "content": request}],
        }
        if config.max_tokens is not None:
            body["max_tokens"] = config.max_tokens
        for attempt in range(config.retries + 1):
            if stop.is_set():
                raise _Stopped
            try:
                return _translation_in(self._send("/chat/completions", body))
            except urllib.error.HTTPError as error:
                return Failure("refused", f"status {error.code}: {self._excerpt(error)}")
            except _Again as again:
                last = again
            if attempt < config.retries:
                stop.wait(min(LONGEST_DELAY, max(last.delay, FIRST_DELAY * 2**attempt)))
        raise UserError(
            f"{self._address} gave no translation in {config.retries + 1} attempts; at the last:"
            f" {last}. What is translated is kept: the same command goes on when the server does"
            " (its patience: translator.server.retries, timeout and concurrency)."
        )

    def _ping(self) -> None:
        """Whether somebody answers, and takes the key. A server need not list its models, so a 404
        says no more than that it is there."""
        try:
            self._send("/models", None)
        except urllib.error.HTTPError:
            pass
        except _Again as again:
            if again.args[0].startswith("no connection"):
                raise UserError(
                    f"{self._address} does not answer ({again}). Start the server, or set"
                    " translator.server.base_url to where it listens."
                ) from again

    def _send(self, path: str, body: dict[str, Any] | None) -> Any:
        """The JSON of a reply.

        Raises:
            _Again: it may work later.
            HTTPError: the server refuses this request.
            UserError: it refuses all of them.
        """
        headers = {"Content-Type": "application/json", "User-Agent": "mpo-kernels"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        data = None if body is None else to_json(body).encode()
        request = urllib.request.Request(self._address + path, data=data, headers=headers)
        try:
            with self._opener.open(request, timeout=self._config.timeout) as reply:
                return json.loads(reply.read(LARGEST_REPLY))
        except urllib.error.HTTPError as error:
            if error.code in TRANSIENT:
                raise _Again(
                    f"status {error.code}: {self._excerpt(error)}", _retry_after(error)
                ) from error
            if (
                error.code in (401, 403)
                or 300 <= error.code < 400
                or (error.code == 404 and body is not None)
            ):
                self._refuse(error)
            raise
        except TimeoutError as error:
            raise _Again(f"no answer within {self._config.timeout:g} s") from error
        except urllib.error.URLError as error:
            raise _Again(f"no connection: {error.reason}") from error
        except (http.client.HTTPException, OSError) as error:
            raise _Again(f"the connection broke: {type(error).__name__}: {error}") from error
        except (ValueError, RecursionError) as error:
            raise _Again("the reply is no JSON") from error

    def _refuse(self, error: urllib.error.HTTPError) -> NoReturn:
        if error.code in (401, 403):
            variable = self._config.api_key_env
            advice = (
                f"Check the key in {variable}"
                if variable
                else "Name the environment variable with its key in translator.server.api_key_env"
            )
            raise UserError(
                f"{self._address} refuses access (status {error.code}). {advice}."
            ) from error
        if error.code == 404:
            raise UserError(
                f"{self._address}/chat/completions does not exist there, or the model"
                f" {self._config.model!r} does not (status 404: {self._excerpt(error)}). Check"
                " translator.server.base_url, which usually ends with /v1, and"
                " translator.server.model."
            ) from error
        raise UserError(
            f"{self._address} redirects to {error.headers.get('Location')} (status {error.code})."
            " Set translator.server.base_url to there."
        ) from error

    def _excerpt(self, error: urllib.error.HTTPError) -> str:
        """The beginning of an error's body, without the key, which some servers repeat."""
        try:
            text = " ".join(error.read(LARGEST_REPLY).decode("utf-8", "replace").split())
        except (http.client.HTTPException, OSError):
            text = ""
        return (text.replace(self._key, "***") if self._key else text)[:200] or error.reason


def _translation_in(reply: Any) -> Result:
    """The text of a chat completion without what models like to put around it."""
    try:
        choice = reply["choices"][0]
        text = choice["message"]["content"] or ""
        finish = choice.get("finish_reason")
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise _Again(
            f"the reply holds no choices[0].message.content: {to_json(reply)[:200]}"
        ) from error
    if not isinstance(text, str):
        raise _Again(f"the reply's content is no text: {to_json(text)[:200]}")
    if finish == "length":
        return Failure(
            "truncated",
            "the reply met the server's limit of tokens; see translator.server.max_tokens",
        )
    if finish == "content_filter":
        return Failure("refused", "the server's content filter stopped the reply")
    text = re.sub(r"\A\s*<think>.*?</think>", "", text, flags=re.DOTALL)
    text = re.sub(r"\A\s*<text>\n?|\n?</text>\s*\Z", "", text)
    # Escapes of half a surrogate pair are valid JSON, but no text.
    return text.strip().encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _retry_after(error: urllib.error.HTTPError) -> float:
    """Seconds that the server asks for; 0 where it does not say, or gives a date."""
    try:
        return max(0.0, float(error.headers.get("Retry-After", 0)))
    except ValueError:
        return 0.0

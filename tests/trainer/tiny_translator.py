"""A tiny NLLB model that knows a few sentences by heart, and a server that answers as
OpenAI-compatible ones do, well or badly."""

from __future__ import annotations

import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
from transformers import M2M100Config, M2M100ForConditionalGeneration, NllbTokenizer

CODES = {"en": "eng_Latn", "sw": "swh_Latn", "zh": "zho_Hans"}


def make_nllb_tokenizer(texts: list[str]) -> NllbTokenizer:
    """The real class with whole words as tokens, so that sequences are short."""
    vocab = {token: i for i, token in enumerate(["<s>", "<pad>", "</s>", "<unk>", "▁"])}
    merges: dict[tuple[str, str], None] = {}
    for word in dict.fromkeys(word for text in texts for word in text.split()):
        for i, character in enumerate(word):
            begun = "▁" + word[:i]
            merges[begun, character] = None
            for token in (character, begun + character):
                vocab.setdefault(token, len(vocab))
    return NllbTokenizer(
        vocab=vocab, merges=list(merges), additional_special_tokens=list(CODES.values())
    )


def save_nllb(folder: Path, translations: dict[tuple[str, str], str], steps: int = 250) -> Path:
    """Trains the real architecture on {(source, language): translation} until it says them by
    heart, and writes a model folder."""
    tokenizer = make_nllb_tokenizer(
        [text for (source, _), target in translations.items() for text in (source, target)]
    )
    torch.manual_seed(0)
    model = M2M100ForConditionalGeneration(
        M2M100Config(
            vocab_size=len(tokenizer),
            d_model=48,
            encoder_layers=1,
            decoder_layers=1,
            encoder_ffn_dim=96,
            decoder_ffn_dim=96,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            max_position_embeddings=128,
            dropout=0.0,
            attention_dropout=0.0,
            activation_dropout=0.0,
            encoder_layerdrop=0.0,
            decoder_layerdrop=0.0,
            decoder_start_token_id=2,
        )
    )
    inputs = tokenizer([source for source, _ in translations], return_tensors="pt", padding=True)
    targets = [
        [
            tokenizer.convert_tokens_to_ids(CODES[language]),
            *tokenizer(text, add_special_tokens=False)["input_ids"],
            2,
        ]
        for (_, language), text in translations.items()
    ]
    longest = max(map(len, targets))
    labels = torch.tensor([[*ids, *[-100] * (longest - len(ids))] for ids in targets])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(steps):
        loss = model(**inputs, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if loss < 0.01:
            break
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


Answer = tuple[int, "bytes | str | dict", dict[str, str]]
Misbehaviour = Callable[[str, int], "Answer | None"]


class TranslationServer:
    """POST /v1/chat/completions answers from a table. `misbehave(text, attempt)` may answer in its
    place, and None drops the connection where it returns status 0.
    """

    def __init__(self, translations: dict[tuple[str, str], str]) -> None:
        self.translations = translations
        self.names = {"Swahili": "sw", "Chinese": "zh"}
        self.misbehave: Misbehaviour = lambda text, attempt: None
        self.delay = 0.0
        self.reset()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.respond(self, None)

            def do_POST(self) -> None:
                outer.respond(
                    self, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                )

            def log_message(self, *arguments: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def reset(self) -> None:
        """Forgets what was asked."""
        self.asked: Counter[tuple[str, str]] = Counter()
        self.bodies: list[dict] = []
        self.headers: list[dict[str, str]] = []
        self.under_way = self.most_under_way = 0
        self._lock = threading.Lock()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def respond(self, handler: BaseHTTPRequestHandler, body: dict | None) -> None:
        if body is None:
            text, attempt = "", 0
        else:
            request = body["messages"][0]["content"]
            text = re.search(r"<text>\n(.*)\n</text>", request, re.DOTALL).group(1)
            language = self.names[re.search(r"into (\w+)\.", request).group(1)]
            with self._lock:
                self.asked[text, language] += 1
                attempt = self.asked[text, language]
                self.bodies.append(body)
                self.headers.append(dict(handler.headers))
                self.under_way += 1
                self.most_under_way = max(self.most_under_way, self.under_way)
            time.sleep(self.delay)
        answer = self.misbehave(text, attempt)
        if answer is None:
            reply = (
                {"data": []}
                if body is None
                else completion(self.translations.get((text, language), f"{language} of {text}"))
            )
            answer = (200, reply, {})
        if body is not None:
            with self._lock:
                self.under_way -= 1
        status, content, headers = answer
        if status == 0:
            handler.close_connection = True
            handler.connection.close()
            return
        raw = (
            content
            if isinstance(content, bytes)
            else (content if isinstance(content, str) else json.dumps(content)).encode()
        )
        handler.send_response(status)
        for name, value in {"Content-Length": str(len(raw)), **headers}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(raw)


def completion(text: str | None, finish: str = "stop") -> dict:
    """The reply of a chat completion."""
    return {
        "choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": finish}]
    }

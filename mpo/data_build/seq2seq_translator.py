"""Translation here, by a model of transformers that is told source and target language by tokens of
its own: NLLB, M2M100, MBart-50."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoTokenizer, GenerationConfig
from transformers.utils.logging import disable_progress_bar

from mpo.data_build.config import Seq2SeqConfig
from mpo.data_build.translation import Failure, Finished, Result
from mpo.languages import flores_of
from mpo.models.weights import check_weights, damaged, first_line, refuse_partial
from mpo.runtime.errors import UserError

_SENTENCE_END = re.compile(r"(?<=[.!?…])\s+|(?<=[。！？।።။])\s*")


class Seq2SeqTranslator:
    """Translates line by line; a line that is too long for the model is cut between sentences.

    The weights are loaded with the first text.

    Raises:
        UserError: no model or tokenizer there, another kind of model, or a language that it does
            not know.
    """

    def __init__(self, config: Seq2SeqConfig, dominant: str, languages: Sequence[str]) -> None:
        self._config, self._dominant = config, dominant
        try:
            model = AutoConfig.from_pretrained(config.path, revision=config.revision)
            self._tokenizer: Any = AutoTokenizer.from_pretrained(
                config.path, revision=config.revision
            )
        # a damaged file makes the libraries raise whatever they happen to trip over
        except Exception as error:
            raise UserError(
                f"translator.seq2seq.path {config.path} is neither a model folder nor a hub id that"
                f" can be read: {first_line(error)}.{damaged(Path(config.path))}"
            ) from error
        if not model.is_encoder_decoder:
            raise UserError(
                f"translator.seq2seq.path {config.path} is of type {model.model_type!r}, which does"
                " not translate from one sequence to another. Serve a chat model and use"
                " translator.server."
            )
        if Path(config.path).exists():
            check_weights(config.path, kind=AutoModelForSeq2SeqLM)
        room = getattr(model, "max_position_embeddings", None) or config.max_source_tokens
        if config.max_source_tokens > room:
            raise UserError(
                f"translator.seq2seq.max_source_tokens={config.max_source_tokens} is more than the"
                f" model's {room}; lower it."
            )
        self._codes = {language: self._code_of(language) for language in (dominant, *languages)}
        self._model: Any = None

    def identity(self, language: str) -> list[str]:
        """Model, codes, and what shapes the search; not what only makes it faster."""
        c = self._config
        codes = [self._codes[self._dominant][0], self._codes[language][0]]
        return [
            "seq2seq",
            c.path,
            str(c.revision),
            c.dtype,
            *codes,
            *map(str, (c.num_beams, c.max_source_tokens, c.max_new_tokens)),
        ]

    def translate(self, texts: Sequence[str], language: str) -> Iterator[Finished]:
        """Shortest texts first, so that those of one batch are of about one length."""
        if self._model is None:
            self._model = self._load()
        self._tokenizer.src_lang = self._codes[self._dominant][0]
        ordered = sorted(texts, key=len)
        for start in range(0, len(ordered), self._config.batch_size):
            batch = ordered[start : start + self._config.batch_size]
            parts = {
                text: split(text, self._count, self._config.max_source_tokens) for text in batch
            }
            done = self._translate_pieces(
                dict.fromkeys(
                    piece
                    for found in parts.values()
                    if not isinstance(found, Failure)
                    for piece, _ in found
                    if piece
                ),
                language,
            )
            yield [
                (text, found if isinstance(found, Failure) else _join(found, done))
                for text, found in parts.items()
            ]

    def _translate_pieces(self, pieces: Iterable[str], language: str) -> dict[str, Result]:
        """Of pieces that are all different, those of about one length together."""
        ordered = sorted(pieces, key=len)
        results: list[Result] = []
        for start in range(0, len(ordered), self._config.batch_size):
            batch = ordered[start : start + self._config.batch_size]
            results += self._generate(batch, self._codes[language][1])
        return dict(zip(ordered, results, strict=True))

    @torch.inference_mode()
    def _generate(self, pieces: Sequence[str], first_token: int) -> list[Result]:
        model, limit = self._model, self._config.max_new_tokens
        own = model.generation_config
        # The checkpoint's own limits and forced end are left out: a cut translation must show.
        settings = GenerationConfig(
            max_new_tokens=limit,
            num_beams=self._config.num_beams,
            do_sample=False,
            forced_bos_token_id=first_token,
            decoder_start_token_id=own.decoder_start_token_id,
            bos_token_id=own.bos_token_id,
            eos_token_id=own.eos_token_id,
            pad_token_id=own.pad_token_id,
        )
        inputs = self._tokenizer(list(pieces), return_tensors="pt", padding=True).to(model.device)
        # without the token that starts the decoder, which may be EOS
        output = model.generate(**inputs, generation_config=settings)[:, 1:]
        end = torch.tensor(own.eos_token_id, device=output.device)
        ends = torch.isin(output, end).any(dim=1).tolist()
        texts = self._tokenizer.batch_decode(output, skip_special_tokens=True)
        cut = Failure(
            "truncated",
            f"no end within {limit} tokens; raise translator.seq2seq.max_new_tokens or lower"
            " max_source_tokens",
        )
        return [text.strip() if ended else cut for text, ended in zip(texts, ends, strict=True)]

    def _load(self) -> Any:
        config = self._config
        if not sys.stderr.isatty():
            disable_progress_bar()  # none in a log
        try:
            # refused below, with their names
            options: dict[str, Any] = {"output_loading_info": True, "ignore_mismatched_sizes": True}
            dtype = getattr(torch, config.dtype)
            model, found = AutoModelForSeq2SeqLM.from_pretrained(
                config.path, revision=config.revision, dtype=dtype, **options
            )
        # a damaged file makes the libraries raise whatever they happen to trip over
        except Exception as error:
            raise UserError(
                f"The model at {config.path} could not be loaded: {first_line(error)}."
            ) from error
        refuse_partial(config.path, found)
        return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()

    def _count(self, text: str) -> int:
        """Tokens of a text as the model gets it."""
        return len(self._tokenizer(text, verbose=False)["input_ids"])

    def _code_of(self, language: str) -> tuple[str, int]:
        """(the name by which the tokenizer knows the language, the id of its token)."""
        own = self._config.codes.get(language)
        known = self._known_codes()
        # FLORES codes are NLLB's, plain ones M2M100's, and MBart-50 adds a country.
        usual = [
            str(flores_of(language)),
            language,
            *(code for code in known if code.startswith(f"{language}_")),
        ]
        for name in [own] if own else usual:
            if name in known:
                return name, known[name]
        none = (
            "none; it has no tokens of languages, so it is of another kind than NLLB, M2M100 and"
            " MBart-50"
        )
        raise UserError(
            f"The model at {self._config.path} knows no language {own or language!r}. Set"
            f" translator.seq2seq.codes.{language} to one of: {', '.join(known) or none}."
        )

    def _known_codes(self) -> dict[str, int]:
        """Codes of languages, and the ids of their tokens."""
        tokenizer = self._tokenizer
        if hasattr(tokenizer, "lang_code_to_id"):  # M2M100, whose tokens are not the codes
            return dict(sorted(tokenizer.lang_code_to_id.items()))
        special = [
            *tokenizer.all_special_tokens,
            *(token.content for token in tokenizer.added_tokens_decoder.values() if token.special),
        ]
        codes = {token for token in special if re.fullmatch(r"[a-z]{2,3}_[A-Za-z]{2,4}", token)}
        return {code: int(tokenizer.convert_tokens_to_ids(code)) for code in sorted(codes)}


Part = tuple[str, str]
"""(a piece to translate, which may be empty; what stands behind it and stays as it is)."""


def split(text: str, count: Callable[[str], int], limit: int) -> list[Part] | Failure:
    """Pieces of at most `limit` tokens; with what stands behind each, they make up the text.

    Line breaks stay with the white space around them, and so do lines without a letter: a list or a
    rule keeps its form.
    """
    parts: list[Part] = []
    lines = re.split(r"(\s*\n\s*)", text)
    for line, gap in zip(lines[::2], [*lines[1::2], ""], strict=True):
        if not any(map(str.isalpha, line)):
            parts.append(("", line + gap))
            continue
        packed = [(line, "")] if count(line) <= limit else list(_packed(line, count, limit))
        if any(count(piece) > limit for piece, _ in packed):
            return Failure(
                "too_long",
                f"a sentence has more than the {limit} tokens of"
                " translator.seq2seq.max_source_tokens",
            )
        parts += [*packed[:-1], (packed[-1][0], gap)]
    return parts


def _packed(line: str, count: Callable[[str], int], limit: int) -> Iterator[Part]:
    """As many whole sentences as fit, with the white space behind them, until the line is used up.
    One sentence may be too long."""
    spans = [match.span() for match in _SENTENCE_END.finditer(line) if match.start() < len(line)]
    ends = [*spans, (len(line), len(line))]
    begin = 0
    for (stop, after), (next_stop, _) in zip(ends, [*ends[1:], (None, None)], strict=True):
        if next_stop is None or count(line[begin:next_stop]) > limit:
            yield line[begin:stop], line[stop:after]
            begin = after


def _join(parts: Sequence[Part], done: dict[str, Result]) -> Result:
    """The parts with each piece translated; where one failed, why."""
    texts = [(done[piece] if piece else "", gap) for piece, gap in parts]
    failure = next((text for text, _ in texts if isinstance(text, Failure)), None)
    return failure or "".join(f"{text}{gap}" for text, gap in texts)

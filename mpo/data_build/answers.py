"""Chosen answers from a model itself, in the dominant language."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from jinja2.exceptions import TemplateError
from transformers import GenerationConfig
from transformers.utils.logging import disable_progress_bar

from mpo.config import ModelConfig
from mpo.data.rows import Prompt
from mpo.data_build.config import AnswersConfig
from mpo.data_build.journal import key_of
from mpo.data_build.translation import Failure, Result
from mpo.models.loading import (
    check_model,
    load_model,
    load_tokenizer,
    refuse_foreign_ids,
    resolve_model,
)
from mpo.runtime.errors import UserError


class Answerer:
    """A chat model that answers prompts. The weights are loaded with the first prompt.

    Raises:
        UserError: no model there, or one of another kind; no chat template.
    """

    def __init__(self, config: AnswersConfig, log: Callable[[str], None]) -> None:
        self._config = config
        # Eager attention serves every architecture, and padding on the left.
        try:
            path = resolve_model(config.path, log)
            self._source = ModelConfig(
                path=path, revision=config.revision, dtype=config.dtype, attention="eager"
            )
            check_model(self._source)
            self._tokenizer: Any = load_tokenizer(self._source)
        except UserError as error:
            raise UserError(f"chosen_from_model: {error}") from error
        if not self._tokenizer.chat_template:
            raise UserError(
                f"The tokenizer of chosen_from_model.path {config.path} has no chat template. Use"
                " the instruction-tuned model."
            )
        self._tokenizer.padding_side = "left"
        if self._tokenizer.pad_token_id is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        self._model: Any = None

    def key(self, prompt: Prompt) -> str:
        """What an answer depends on."""
        c = self._config
        identity = [c.path, c.revision, c.dtype, c.max_new_tokens, c.temperature]
        return key_of("answer", identity, [message.model_dump() for message in prompt])

    def answer(self, prompts: Sequence[Prompt]) -> Iterator[list[tuple[Prompt, Result]]]:
        """Answers prompts that are all different, shortest first, in batches. Those that the model
        cannot be asked come before."""
        self._load()
        rendered: list[tuple[Prompt, str]] = []
        failed: list[tuple[Prompt, Result]] = []
        for prompt in prompts:
            text = self._rendered(prompt)
            if isinstance(text, Failure):
                failed.append((prompt, text))
            else:
                rendered.append((prompt, text))
        if failed:
            yield failed
        rendered.sort(key=lambda item: len(item[1]))
        for start in range(0, len(rendered), self._config.batch_size):
            batch = rendered[start : start + self._config.batch_size]
            seed = int(self.key(batch[0][0])[:15], 16)
            answers = self._generate([text for _, text in batch], seed)
            yield [(prompt, answer) for (prompt, _), answer in zip(batch, answers, strict=True)]

    def _load(self) -> None:
        if self._model is None:
            if not sys.stderr.isatty():
                disable_progress_bar()  # none in a log
            device: Any = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            self._model = load_model(self._source).to(device).eval()

    def _rendered(self, prompt: Prompt) -> Result:
        """The prompt's text, or why the model cannot be asked it."""
        try:
            text: str = self._tokenizer.apply_chat_template(
                [m.model_dump() for m in prompt], tokenize=False, add_generation_prompt=True
            )
        except TemplateError as error:
            return Failure("refused_by_template", f"the chat template refuses it: {error}")
        length = len(self._tokenizer(text, add_special_tokens=False)["input_ids"])
        room = getattr(self._model.config, "max_position_embeddings", None)
        limit = self._config.max_new_tokens
        if room is not None and length + limit > room:
            return Failure(
                "prompt_too_long",
                f"its {length} tokens and chosen_from_model.max_new_tokens={limit} are more than"
                f" the model's {room}",
            )
        return text

    @torch.inference_mode()
    def _generate(self, texts: Sequence[str], seed: int) -> list[Result]:
        model, limit, ends = self._model, self._config.max_new_tokens, self._ends()
        settings = GenerationConfig(
            max_new_tokens=limit,
            do_sample=self._config.temperature > 0,
            temperature=self._config.temperature or None,
            eos_token_id=ends,
            pad_token_id=self._tokenizer.pad_token_id,
        )
        torch.manual_seed(seed)
        inputs = self._tokenizer(
            list(texts), return_tensors="pt", padding=True, add_special_tokens=False
        ).to(model.device)
        inputs.pop("token_type_ids", None)
        refuse_foreign_ids(int(inputs["input_ids"].max()), "a prompt", self._source)
        whole = model.generate(**inputs, generation_config=settings)
        output = whole[:, inputs["input_ids"].shape[1] :]
        ended = torch.isin(output, torch.tensor(ends, device=output.device)).any(dim=1).tolist()
        answers = self._tokenizer.batch_decode(output, skip_special_tokens=True)
        cut = Failure(
            "answer_truncated",
            f"no end within {limit} tokens; raise chosen_from_model.max_new_tokens",
        )
        return [answer.strip() if end else cut for answer, end in zip(answers, ended, strict=True)]

    def _ends(self) -> list[int]:
        """Tokens that end an answer."""
        own = self._model.generation_config.eos_token_id
        ends = {*([own] if isinstance(own, int) else own or []), self._tokenizer.eos_token_id}
        return sorted(ends - {None})

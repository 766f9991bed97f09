"""One build, from the preference rows to the report. Every step that takes long can be interrupted
and goes on where it was."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from mpo.data.rows import Finding, Pair, findings_in_pair
from mpo.data_build.config import BuildConfig
from mpo.data_build.file_translator import FileTranslator
from mpo.data_build.filters import Filters, Problem
from mpo.data_build.journal import Journal, key_of
from mpo.data_build.output import Output
from mpo.data_build.preferences import Preference, map_texts, read_preferences
from mpo.data_build.report import make_report
from mpo.data_build.server_translator import ServerTranslator
from mpo.data_build.translation import Failure, Translator
from mpo.runtime.errors import UserError
from mpo.runtime.interruption import Interrupted, Interruption, interruptions
from mpo.runtime.progress import Progress

Translations = dict[tuple[str, str], str | Failure]
"""(source text, language): its translation, or why there is none."""


def build(config: BuildConfig, progress: Progress) -> dict[str, Any]:
    """Makes the rows of `config` and returns the report, which lies beside them too.

    Raises:
        UserError: something is wrong with configuration, input, output, model or server; or no row
            is left.
        Interrupted: after Ctrl-C or SIGTERM. What is finished is kept.
    """
    output = Output(Path(config.output))
    with (
        output.claimed(_identity(config)),
        interruptions() as stop,
        stop.deferred("after what is being made"),
    ):
        preferences, bad = read_preferences(config)
        filters = Filters(config.filters, config.languages, config.dominant_language)
        translator = _open_translator(config)
        answered, unanswered = _answer(preferences, config, output, progress, stop)
        translations, made, kept = _translate(answered, translator, config, output, progress, stop)
        rows, untranslated = _assemble(answered, translations, filters, config)
        dropped = [asdict(row) for row in bad] + unanswered + untranslated
        trimmed = sum(preference.trimmed for preference in preferences)
        work = {
            "output": config.output,
            "translated": made,
            "translations_kept": kept,
            "trimmed": trimmed,
            "build": _identity(config),
        }
        report = make_report(len(preferences) + len(bad), rows, dropped, config.languages, work)
        output.write(report, rows, dropped)
        if not rows:
            reasons = ", ".join(
                f"{reason} ({shown[0]['detail']})" for reason, shown in report["examples"].items()
            )
            raise UserError(
                f"No row is left: {reasons}. {output.dropped} has all of them, {output.report} the"
                " counts."
            )
    return report


def _identity(config: BuildConfig) -> dict[str, Any]:
    """What makes it this build, so that it may replace its own output: not the filters, and not
    what only changes speed."""
    kind, translator = next(
        (name, section) for name, section in config.translator if section is not None
    )
    return {
        "input": list(config.input),
        "dominant_language": config.dominant_language,
        "languages": list(config.languages),
        "translator": f"{kind} {translator.model if kind == 'server' else translator.path}",
        "chosen_from_model": config.chosen_from_model.path if config.chosen_from_model else None,
    }


def _open_translator(config: BuildConfig) -> Translator:
    section = config.translator
    if section.file is not None:
        return FileTranslator(section.file, config.languages)
    if section.server is not None:
        return ServerTranslator(section.server, config.dominant_language)
    from mpo.data_build.seq2seq_translator import Seq2SeqTranslator  # the others need no torch

    assert section.seq2seq is not None
    return Seq2SeqTranslator(section.seq2seq, config.dominant_language, config.languages)


def _answer(
    preferences: Sequence[Preference],
    config: BuildConfig,
    output: Output,
    progress: Progress,
    stop: Interruption,
) -> tuple[list[Preference], list[dict[str, Any]]]:
    """The rows with the model's answers as chosen ones, where that is asked, and the rows that this
    leaves without a usable pair."""
    if config.chosen_from_model is None:
        return list(preferences), []
    from mpo.data_build.answers import Answerer, Prompt  # transformers takes seconds to import

    answerer = Answerer(config.chosen_from_model, progress.log)
    prompts = list(dict.fromkeys(preference.pair.prompt for preference in preferences))
    answers: dict[Prompt, str | Failure] = {}
    with _journal(output.answers, "answer") as journal:
        for prompt in prompts:
            if (known := journal.get(answerer.key(prompt))) is not None:
                answers[prompt] = known
        pending = [prompt for prompt in prompts if prompt not in answers]
        if pending:
            with progress.task("Answering", len(pending), "prompts") as advance:
                for batch in answerer.answer(pending):
                    journal.add(
                        {
                            "key": answerer.key(prompt),
                            "prompt": [m.model_dump() for m in prompt],
                            "answer": answer,
                        }
                        for prompt, answer in batch
                        if isinstance(answer, str)
                    )
                    answers.update(batch)
                    advance(len(batch))
                    _heed(stop, output)
    good, dropped = [], []
    for preference in preferences:
        answer = answers[preference.pair.prompt]
        problem: Failure | Finding | None
        if isinstance(answer, Failure):
            problem = answer
        else:
            pair = preference.pair.model_copy(update={"chosen": answer})
            preference = replace(preference, pair=pair)
            problem = next(findings_in_pair(preference.source, "dominant", pair), None)
        if problem is None:
            good.append(preference)
        else:
            dropped += [
                _dropped(preference, language, problem, None) for language in config.languages
            ]
    return good, dropped


def _translate(
    preferences: Sequence[Preference],
    translator: Translator,
    config: BuildConfig,
    output: Output,
    progress: Progress,
    stop: Interruption,
) -> tuple[Translations, int, int]:
    """Translations of every text into every language, how many were made now, and how many the
    journal had."""
    texts = list(
        dict.fromkeys(
            text for preference in preferences for text in preference.pair.texts() if text.strip()
        )
    )
    translations: Translations = {}
    with _journal(
        output.translations,
        "translation",
        needed=translator.identity(config.languages[0]) is not None,
    ) as journal:
        keys = {
            (text, language): key_of(text, translator.identity(language))
            for language in config.languages
            for text in texts
        }
        for job, key in keys.items():
            if journal is not None and (known := journal.get(key)) is not None:
                translations[job] = known
        kept = len(translations)
        made = len(keys) - kept
        if made:
            with progress.task("Translating", made, "texts") as advance:
                for language in config.languages:
                    pending = [text for text in texts if (text, language) not in translations]
                    for batch in translator.translate(pending, language) if pending else ():
                        if journal is not None:
                            journal.add(
                                {
                                    "key": keys[text, language],
                                    "source": text,
                                    "language": language,
                                    "translation": translation,
                                }
                                for text, translation in batch
                                if isinstance(translation, str)
                            )
                        translations.update(((text, language), result) for text, result in batch)
                        advance(len(batch))
                        _heed(stop, output)
    return translations, made, kept


def _assemble(
    preferences: Sequence[Preference],
    translations: Translations,
    filters: Filters,
    config: BuildConfig,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Native rows, and those that are left out."""
    rows, dropped = [], []
    for preference in preferences:
        for language in config.languages:
            results = [translations.get((text, language), "") for text in preference.pair.texts()]
            failure = next((result for result in results if isinstance(result, Failure)), None)
            if failure is not None:
                dropped.append(_dropped(preference, language, failure, None))
                continue

            def translated(text: str, language: str = language) -> str:
                return filters.clean(str(translations.get((text, language), "")))

            target = map_texts(preference.pair, translated)
            problem = filters.problem_of(preference.pair, target, language)
            if problem is not None:
                dropped.append(_dropped(preference, language, problem, target))
            else:
                pairs = {"dominant": preference.pair.model_dump(), "target": target.model_dump()}
                rows.append({"id": f"{preference.id}-{language}", "language": language, **pairs})
    return rows, dropped


def _dropped(
    preference: Preference, language: str, problem: Failure | Problem | Finding, target: Pair | None
) -> dict[str, Any]:
    return {
        "id": f"{preference.id}-{language}",
        "source": preference.source,
        "language": language,
        "reason": problem.reason,
        "detail": problem.detail,
        "dominant": preference.pair.model_dump(),
        "target": None if target is None else target.model_dump(),
    }


@contextmanager
def _journal(path: Path, value: str, needed: bool = True) -> Iterator[Any]:
    """The journal at that path, or None."""
    if needed:
        with Journal(path, value) as journal:
            yield journal
    else:
        yield None


def _heed(stop: Interruption, output: Output) -> None:
    if stop.requested:
        raise Interrupted(
            f"Interrupted. What is finished is kept beside {output.rows}; the same command goes on"
            " from there."
        )

"""One build, from the preference rows to the report. Every step that takes long can be interrupted
and goes on where it was."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from mpo.data.rows import Finding, Pair, Prompt, findings_in_pair
from mpo.data_build.config import BuildConfig
from mpo.data_build.file_translator import FileTranslator
from mpo.data_build.filters import Filters
from mpo.data_build.journal import Journal, key_of
from mpo.data_build.output import Output
from mpo.data_build.preferences import Preference, map_texts, read_preferences
from mpo.data_build.report import BuildReport, Dropped, counted, counts_of, examples_of
from mpo.data_build.server_translator import ServerTranslator
from mpo.data_build.translation import Failure, Result, Translator
from mpo.data_build.work import Work
from mpo.runtime.errors import UserError
from mpo.runtime.interruption import interruptions
from mpo.runtime.progress import Progress

Translations = dict[tuple[str, str], Result]
"""(source text, language): its translation, or why there is none."""


def build(config: BuildConfig, progress: Progress) -> BuildReport:
    """Makes the rows of `config` and returns the report, which lies beside them too.

        build(load_build_config(Path("build.yaml")), Progress(enabled=True)).languages["sw"].rows

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
        work = Work(output, progress, stop)
        answered, unanswered = _answer(preferences, config, work)
        translations, made = _translate(answered, translator, config.languages, work)
        rows, untranslated = _assemble(answered, translations, filters, config.languages)
        dropped = unanswered + untranslated
        report = BuildReport(
            rows_in=len(preferences) + len(bad),
            bad_input=counted(bad),
            languages=counts_of(config.languages, rows, dropped),
            examples=examples_of(bad, dropped),
            output=config.output,
            translated=made,
            translations_kept=len(translations) - made,
            trimmed=sum(preference.trimmed for preference in preferences),
            build=_identity(config),
        )
        output.write(
            report.as_dict(), rows, [*map(asdict, bad), *(row.as_dict() for row in dropped)]
        )
    if not rows:
        raise _nothing_left(report, output)
    return report


def _nothing_left(report: BuildReport, output: Output) -> UserError:
    reasons = ", ".join(
        f"{reason} ({shown[0]['detail']})" for reason, shown in report.examples.items()
    )
    return UserError(
        f"No row is left: {reasons}. {output.dropped} has all of them, {output.report} the counts."
    )


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
    preferences: Sequence[Preference], config: BuildConfig, work: Work
) -> tuple[list[Preference], list[Dropped]]:
    """The rows with the model's answers as chosen ones, where that is asked, and the rows that this
    leaves without a usable pair."""
    if config.chosen_from_model is None:
        return list(preferences), []
    from mpo.data_build.answers import Answerer  # transformers takes seconds to import

    answerer = Answerer(config.chosen_from_model, work.progress.log)
    prompts = dict.fromkeys(preference.pair.prompt for preference in preferences)
    with Journal(work.output.answers, "answer") as journal:
        answers, _ = work.finish(
            {prompt: answerer.key(prompt) for prompt in prompts},
            journal,
            answerer.answer,
            lambda prompt, answer: {"prompt": [m.model_dump() for m in prompt], "answer": answer},
            "Answering",
            "prompts",
        )
    return _with_answers(preferences, answers, config.languages)


def _with_answers(
    preferences: Sequence[Preference], answers: dict[Prompt, Result], languages: Sequence[str]
) -> tuple[list[Preference], list[Dropped]]:
    good: list[Preference] = []
    dropped: list[Dropped] = []
    for preference in preferences:
        answer = answers[preference.pair.prompt]
        finding: Finding | None
        if isinstance(answer, Failure):
            finding = answer.of(preference.source)
        else:
            pair = preference.pair.model_copy(update={"chosen": answer})
            preference = replace(preference, pair=pair)
            finding = next(findings_in_pair(preference.source, "dominant", pair), None)
        if finding is None:
            good.append(preference)
        else:
            dropped += [_dropped(preference, language, finding, None) for language in languages]
    return good, dropped


def _translate(
    preferences: Sequence[Preference],
    translator: Translator,
    languages: Sequence[str],
    work: Work,
) -> tuple[Translations, int]:
    """Translations of every text into every language, and how many of them were made now."""
    texts = dict.fromkeys(
        text for preference in preferences for text in preference.pair.texts() if text.strip()
    )

    def translated(
        jobs: Sequence[tuple[str, str]],
    ) -> Iterator[list[tuple[tuple[str, str], Result]]]:
        for language in languages:
            pending = [text for text, into in jobs if into == language]
            for batch in translator.translate(pending, language) if pending else ():
                yield [((text, language), result) for text, result in batch]

    needs_work = translator.identity(languages[0]) is not None
    with (
        Journal(work.output.translations, "translation") if needs_work else nullcontext() as journal
    ):
        return work.finish(
            {
                (text, language): key_of(text, translator.identity(language))
                for language in languages
                for text in texts
            },
            journal,
            translated,
            lambda job, text: {"source": job[0], "language": job[1], "translation": text},
            "Translating",
            "texts",
        )


def _assemble(
    preferences: Sequence[Preference],
    translations: Translations,
    filters: Filters,
    languages: Sequence[str],
) -> tuple[list[dict[str, Any]], list[Dropped]]:
    """Native rows, and those that are left out."""
    rows: list[dict[str, Any]] = []
    dropped: list[Dropped] = []
    for preference in preferences:
        for language in languages:
            results = [translations.get((text, language), "") for text in preference.pair.texts()]
            failure = next((result for result in results if isinstance(result, Failure)), None)
            if failure is not None:
                finding = failure.of(preference.source)
                dropped.append(_dropped(preference, language, finding, None))
                continue

            def translated(text: str, language: str = language) -> str:
                return filters.clean(str(translations.get((text, language), "")))

            target = map_texts(preference.pair, translated)
            found = filters.finding_in(preference.source, preference.pair, target, language)
            if found is not None:
                dropped.append(_dropped(preference, language, found, target))
            else:
                pairs = {"dominant": preference.pair.model_dump(), "target": target.model_dump()}
                rows.append({"id": f"{preference.id}-{language}", "language": language, **pairs})
    return rows, dropped


def _dropped(
    preference: Preference, language: str, finding: Finding, target: Pair | None
) -> Dropped:
    return Dropped(f"{preference.id}-{language}", language, finding, preference.pair, target)

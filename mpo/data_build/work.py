"""Making texts that take long, by a model or a server: each one once, whatever stops a build."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from mpo.data_build.journal import Journal
from mpo.data_build.output import Output
from mpo.data_build.translation import Result
from mpo.runtime.interruption import Interrupted, Interruption
from mpo.runtime.progress import Progress

Job = TypeVar("Job", bound=Hashable)


@dataclass(frozen=True)
class Work:
    """What making texts takes: where finished ones are kept, who is told, and who may stop it."""

    output: Output
    progress: Progress
    stop: Interruption

    def finish(
        self,
        keys: dict[Job, str],
        journal: Journal | None,
        make: Callable[[list[Job]], Iterator[list[tuple[Job, Result]]]],
        record: Callable[[Job, str], dict[str, Any]],
        title: str,
        unit: str,
    ) -> tuple[dict[Job, Result], int]:
        """The results of jobs, and how many were made now: the others the journal had.

        Args:
            keys: what the result of each job depends on, as the journal knows it.
            make: makes the results of jobs, in batches and in any order.
            record: what the journal keeps of a job and its text.
            title: names the work, and `unit` its pieces.
        """
        results: dict[Job, Result] = {}
        for job, key in keys.items():
            if journal is not None and (known := journal.get(key)) is not None:
                results[job] = known
        pending = [job for job in keys if job not in results]
        if not pending:
            return results, 0
        with self.progress.task(title, len(pending), unit) as advance:
            for batch in make(pending):
                if journal is not None:
                    journal.add(
                        {"key": keys[job], **record(job, text)}
                        for job, text in batch
                        if isinstance(text, str)
                    )
                results.update(batch)
                advance(len(batch))
                self._heed()
        return results, len(pending)

    def _heed(self) -> None:
        if self.stop.requested:
            raise Interrupted(
                f"Interrupted. What is finished is kept beside {self.output.rows}; the same command"
                " goes on from there."
            )

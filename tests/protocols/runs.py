"""A run of a protocol: edits, then scores; each row is kept, and a run makes what is missing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from host.client import Client, PromptTimedOut
from host.prompts import PromptFailed, PromptInterrupted

from . import drawn, judging, keys
from .cases import BadCase, Case, Protocol, at_size_of, limited, opened, scaled
from .judging import Judges
from .running import Method
from .store import Row, Store

failures = (BadCase, PromptFailed, PromptInterrupted, PromptTimedOut)
"""What one case can suffer while the others go on."""


@dataclass(frozen=True)
class Job:
    """A case to be edited by a method.

    Attributes:
        edit, scores: keys of the rows; see `keys`.
    """

    method: Method
    case: Case
    edit: str
    scores: str


@dataclass(frozen=True)
class Run:
    """What is run, and where it is kept.

    Attributes:
        seed: of cases without one.
        size: the longer side that pictures are scaled to; None leaves them.
        timeout: of one edit, and of its scores, in seconds.
    """

    protocol: Protocol
    store: Store
    judges: Judges
    seed: int
    size: int | None
    timeout: float

    def jobs(self, methods: Sequence[Method]) -> list[Job]:
        """All that is wanted, method by method, so that models stay loaded."""
        given = []
        for case in self.protocol.cases:
            scores = keys.of_scores(case, self.judges, self.protocol.attributes)
            given.append((case, keys.of_edit(case, self._seed(case), self.size), scores))
        found = []
        for method in methods:
            for case, asked, scores in given:
                edit = keys.key(method.name, method.graph, asked)
                found.append(Job(method, case, edit, keys.key(edit, scores)))
        return found

    def edit(self, client: Client, jobs: Sequence[Job]) -> None:
        """Edit what has not been edited yet."""
        done = self.store.rows("edits")
        for number, job in enumerate(jobs, 1):
            if job.edit in done:
                continue
            row: Row = {"key": job.edit, "method": job.method.name, "case": job.case.id}
            try:
                row["seconds"] = self._edit(client, job)
                told = "cached" if row["seconds"] is None else f"{row['seconds']:.1f} s"
            except failures as error:
                row["error"] = told = str(error)
            self.store.add("edits", row)
            _tell("edit", number, jobs, told)

    def _edit(self, client: Client, job: Job) -> float | None:
        source, seed = self._source(job.case), self._seed(job.case)
        edit, seconds = job.method.edit(client, job.case, source, seed, self.timeout)
        file = self.store.picture(job.method.name, job.case.id, job.edit)
        file.parent.mkdir(parents=True, exist_ok=True)
        edit.save(file)
        return seconds

    def score(self, client: Client, jobs: Sequence[Job]) -> None:
        """Score the edits that have not been scored yet."""
        edits, done = self.store.rows("edits"), self.store.rows("scores")
        for number, job in enumerate(jobs, 1):
            if job.scores in done or edits.get(job.edit, {"error": "not made"}).get("error"):
                continue
            row: Row = {"key": job.scores, "method": job.method.name, "case": job.case.id}
            try:
                row["scores"] = self._score(client, job)
            except failures as error:
                row["error"] = str(error)
            self.store.add("scores", row)
            _tell("score", number, jobs, row.get("error", "done"))

    def _score(self, client: Client, job: Job) -> judging.Scores:
        case = job.case
        source = self._source(case)
        edit = opened(self.store.picture(job.method.name, case.id, job.edit))
        if not case.references:
            edit = at_size_of(source, edit)
        found = judging.score(client, self.judges, case, source, edit, self.timeout)
        seen = self._words(client, case, source, edit)
        return {**found, **judging.attribute_scores(case, *seen)} if seen else found

    def _words(
        self, client: Client, case: Case, source: Image.Image, edit: Image.Image
    ) -> tuple[dict[str, str], dict[str, str]] | None:
        """What of the attributes was to be seen, and what the edit shows; None if none can tell."""
        if case.drawn:
            return drawn.words(case, edit)
        attributes, judges = self.protocol.attributes, self.judges
        if not (attributes and judges.clip and judges.clip_vision):
            return None
        key = keys.of_words(case, self.size, judges, attributes)
        known = self.store.rows("words").get(key)
        if known is None:
            words = judging.clip_words(client, judges, source, attributes, self.timeout)
            known = {"key": key, "case": case.id, "words": words}
            self.store.add("words", known)
        return known["words"], judging.clip_words(client, judges, edit, attributes, self.timeout)

    def rows(self, jobs: Sequence[Job]) -> list[Row]:
        """What there is of each job: method, case and key; error, or scores where it is judged."""
        edits, scores = self.store.rows("edits"), self.store.rows("scores")
        found = []
        for job in jobs:
            if job.edit in edits:
                row = dict(edits[job.edit])
                judged = scores.get(job.scores, {})
                if judged.get("error"):
                    row["error"] = judged["error"]
                if judged.get("scores"):
                    row["scores"] = {**judged["scores"], "seconds": row["seconds"]}
                found.append(row)
        return found

    def _seed(self, case: Case) -> int:
        return self.seed if case.seed is None else case.seed

    def _source(self, case: Case) -> Image.Image:
        picture = opened(case.image)
        return scaled(picture, limited(picture.size, self.size))


def _tell(what: str, number: int, jobs: Sequence[Job], told: str) -> None:
    job = jobs[number - 1]
    print(f"{what} {number}/{len(jobs)} {job.method.name} {job.case.id}: {told}", flush=True)

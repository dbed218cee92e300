"""The whole answer to `outlay check`, in the format that `--format json` prints."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from outlay.planner.check.fit import Variant, faster, nearest_fit
from outlay.planner.check.mend import Mended, again, diff_of, level_of, mended, written_texts
from outlay.planner.check.question import Asked, Question, Unknown, question_of
from outlay.planner.check.says import says
from outlay.planner.read.document import Document
from outlay.planner.read.known import LATEST, OLDEST, Version, parse_version
from outlay.planner.read.meaning import DEEPSPEED, MAIN, Meaning
from outlay.planner.read.models import model_of
from outlay.planner.rules.config import ConfigRule, Found, found_in
from outlay.planner.rules.setup import Setup, setup_of
from outlay.planner.spec.cluster import Cluster
from outlay.planner.spec.files import plain
from outlay.planner.spec.model import ModelSpec
from outlay.profiles.errors import EXIT_DONE, EXIT_NOT_FEASIBLE, EXIT_USAGE

SCHEMA_CHECK = "outlay/check@1"
STATES = ("illegal", "does not fit", "tight", "fits", "unknown")


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked besides the file."""

    cluster: Cluster | None = None
    model: str | None = None
    version: Version = field(default_factory=lambda: parse_version(LATEST))
    asked: Asked = field(default_factory=Asked)
    fix: bool = False
    better: bool = False
    """Also take up what is clearly faster."""
    strict: bool = False


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The check of one configuration."""

    value: dict[str, Any]
    exit_code: int
    before: Meaning
    after: Meaning

    def texts(self, out: str) -> dict[str, str]:
        """What `--write OUT` writes."""
        return written_texts(self.before, self.after, out)


def _model(meaning: Meaning, request: Request) -> tuple[ModelSpec | None, str]:
    if request.model is not None:
        from outlay.planner.spec.families import resolve_model

        return resolve_model(request.model)[0], "--model"
    reference = meaning.said("model")
    if reference is None:
        return None, "the file names none"
    spec, _, note = model_of(str(reference), meaning.documents[MAIN].path.parent)
    return spec, note


def _found_dict(row: tuple[ConfigRule, Found], fixed: Mended) -> dict[str, Any]:
    rule, found = row
    return {
        "rule": rule.name, "level": level_of(row), "what": found.what, "where": found.where,
        "do": found.do, "evidence": rule.evidence, "versions": rule.versions,
        "mended": (rule.name, found.where) in fixed.applied,
    }  # fmt: skip


def _variant_dict(found: Variant) -> dict[str, Any]:
    return {
        "changes": list(found.changes), "outside": list(found.outside), "strategy": plain(found.strategy),
        "device_bytes": round(found.device_bytes), "low_bytes": round(found.low_bytes),
        "high_bytes": round(found.high_bytes), "verdict": found.verdict,
        "oom_probability": round(found.risk, 4), "step_s": found.step_s,
    }  # fmt: skip


def _summary(e: dict[str, Any] | None) -> dict[str, Any] | None:
    """The figures of the mended file beside those of the file as it stands."""
    if e is None:
        return None
    return {
        "device_bytes": e["memory"]["device_bytes"], "low_bytes": e["memory"]["low_bytes"],
        "high_bytes": e["memory"]["high_bytes"], "verdict": e["verdict"],
        "oom_probability": e["oom_probability"], "step_s": None if e["step"] is None else e["step"]["time_s"],
    }  # fmt: skip


def _asked(s: Setup, asked: Asked, note: str) -> tuple[Question | None, str | None]:
    try:
        return question_of(s, asked, note), None
    except Unknown as why:
        return None, str(why)


@dataclass(frozen=True, kw_only=True)
class _Outcome:
    """Where a configuration stands: its question, estimate and what would fit or be faster."""

    question: Question | None
    unknown: str | None
    estimate: dict[str, Any] | None
    fit: Variant | None = None
    smallest: Variant | None = None
    better: Variant | None = None

    @property
    def verdict(self) -> str | None:
        return None if self.estimate is None else str(self.estimate["verdict"])


def _outcome(s: Setup, asked: Asked, note: str, *, look: bool) -> _Outcome:
    q, unknown = _asked(s, asked, note)
    if q is None:
        return _Outcome(question=None, unknown=unknown, estimate=None)
    estimate = q.estimate()
    if not look:
        return _Outcome(question=q, unknown=None, estimate=estimate)
    if estimate["verdict"] != "ok":
        fit, smallest = nearest_fit(q, s)
        return _Outcome(question=q, unknown=None, estimate=estimate, fit=fit, smallest=smallest)
    step_s = None if estimate["step"] is None else float(estimate["step"]["time_s"])
    return _Outcome(question=q, unknown=None, estimate=estimate, better=faster(q, s, step_s))


def _by_hand(fixed: Mended) -> _Outcome | None:
    """No estimate where faults stand that a person must mend: what they leave open would be guessed."""
    left = sorted({row[0].name for row in fixed.left if level_of(row) == "illegal"})
    if not left:
        return None
    why = f"faults stand that have to be mended by hand ({', '.join(left)})"
    return _Outcome(question=None, unknown=why, estimate=None)


def _settled(fixed: Mended, asked: Asked, taken: Variant) -> Asked:
    """Flags that stood for what the variant now decides outside of the files."""
    changes: dict[str, Any] = {}
    if asked.micro_batch or asked.grad_accum:
        changes = {
            "micro_batch": taken.strategy.micro_batch,
            "grad_accum": taken.strategy.grad_accum,
        }
    if asked.activation_checkpointing:
        changes["activation_checkpointing"] = taken.strategy.activation_checkpointing
    return replace(asked, **changes)


def check(document: Document, kind: str | None, request: Request) -> Answer:
    """Read, apply the rules, mend, estimate, and look for what fits."""
    from outlay.planner.read.reader import read_meaning

    meaning = read_meaning(document, kind)
    spec, note = _model(meaning, request)
    s = setup_of(meaning, request.version, spec=spec, cluster=request.cluster)
    rows = found_in(s)
    fixed = mended(s, rows)
    illegal = [row for row in rows if level_of(row) == "illegal"]
    whole = _by_hand(fixed) or _outcome(fixed.setup, request.asked, note, look=True)
    # What will not start has no memory: then the figures are of the mended file.
    as_it_is = bool(fixed.applied) and not illegal
    now = _outcome(s, request.asked, note, look=False) if as_it_is else whole
    after, taken, asked = fixed.setup, None, request.asked
    if request.fix and whole.fit is not None and not whole.fit.outside:
        taken = whole.fit
    elif request.better and whole.better is not None:
        taken = whole.better
    if taken is not None:
        after, asked = again(after, taken.edits), _settled(fixed, asked, taken)
    then = whole if taken is None else _outcome(after, asked, note, look=False)
    unmended = [row for row in found_in(after) if level_of(row) == "illegal"]
    state = _state(bool(illegal), now)
    value = {
        "schema": SCHEMA_CHECK,
        "file": document.name,
        "framework": meaning.framework,
        "deepspeed": ".".join(map(str, request.version)),
        "state": state,
        "meaning": says(s, note),
        "findings": [_found_dict(row, fixed) for row in rows],
        "notes": [*meaning.notes, *_companion_notes(meaning), *_version_notes(request.version)],
        "estimate": now.estimate,
        "estimate_is_of": "the mended file" if illegal else "the file as it stands",
        "unknown": now.unknown,
        "mended": _summary(whole.estimate) if as_it_is else None,
        "fit": None if whole.fit is None else _variant_dict(whole.fit),
        "smallest": None if whole.smallest is None else _variant_dict(whole.smallest),
        "better": None if whole.better is None else _variant_dict(whole.better),
        "taken": None if taken is None else _variant_dict(taken),
        "after": _state(bool(unmended), then),
        "diff": diff_of(meaning, after.meaning),
        "written": [],
    }  # fmt: skip
    return Answer(
        value=value, before=meaning, after=after.meaning,
        exit_code=_exit_code(bool(illegal), now.verdict, rows, request.strict),
    )  # fmt: skip


def exit_code_after(answer: Answer) -> int:
    """Of what `--write` wrote."""
    state = answer.value["after"]
    return (
        EXIT_USAGE
        if state == "illegal"
        else EXIT_NOT_FEASIBLE
        if state == "does not fit"
        else EXIT_DONE
    )


def _state(illegal: bool, outcome: _Outcome) -> str:
    if illegal:
        return "illegal"
    return {None: "unknown", "no": "does not fit", "tight": "tight", "ok": "fits"}[outcome.verdict]


def _exit_code(
    illegal: bool, verdict: str | None, rows: list[tuple[ConfigRule, Found]], strict: bool
) -> int:
    """2 illegal; 3 does not fit; with --strict 2 for anything that is no advice; else 0."""
    if illegal or (strict and any(level_of(row) != "advice" for row in rows)):
        return EXIT_USAGE
    return EXIT_NOT_FEASIBLE if verdict == "no" else EXIT_DONE


def _companion_notes(meaning: Meaning) -> list[str]:
    section = meaning.documents.get(DEEPSPEED)
    if section is None or section.on_disk:
        return []
    return [
        f"{section.name} is not here: what the framework's own file of that name says is taken, as far as it "
        "matters here; a mended copy holds only that"
    ]


def _version_notes(version: Version) -> list[str]:
    if version > parse_version(LATEST):
        return [
            f"DeepSpeed {'.'.join(map(str, version))} was not read: the rules are those of {LATEST}"
        ]
    if version < parse_version(OLDEST):
        return [
            f"DeepSpeed {'.'.join(map(str, version))} was not read: the oldest that was is {OLDEST}"
        ]
    return []

"""Which configuration keys a version of DeepSpeed knows (profiles/deepspeed_keys.yaml).

DeepSpeed ignores an unknown top-level key without a word and refuses an unknown nested one: so nothing
is written that the asked version does not read.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from importlib import resources
from typing import Any

from outlay.profiles.errors import UsageError

WRITTEN_FOR = "0.19.8"
"""What `deepspeed_config` writes without being asked for a version."""


@dataclass(frozen=True, kw_only=True)
class Version:
    """One version of DeepSpeed, as its source distribution and its parser showed it."""

    name: str
    parsed: int | None
    """Of `of` random emitted configurations, those that its parser took; null = it was not run."""
    of: int
    why: str | None
    """Why it was not run, or the first refusal."""

    @property
    def verdict(self) -> str:
        """`parsed by that version: …`, for a person."""
        if self.parsed is None:
            return f"not tested ({self.why}); its source reads every key that is written"
        if self.parsed == self.of:
            return f"yes ({self.of} of {self.of} random plans)"
        return f"{self.parsed} of {self.of} random plans; the first refused: {self.why}"


@functools.cache
def _table() -> dict[str, Any]:
    import yaml

    file = resources.files("outlay.profiles") / "deepspeed_keys.yaml"
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    value: dict[str, Any] = yaml.load(file.read_text(encoding="utf-8"), Loader=loader)
    return value


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(x) for x in version.split("."))


def versions() -> tuple[str, ...]:
    """Those that were looked at, oldest first."""
    return tuple(sorted(_table()["versions"], key=_number))


def version(name: str) -> Version:
    """Raises UsageError with the nearest ones that were looked at."""
    found = _table()["versions"].get(name)
    if found is None:
        raise UsageError(
            f"DeepSpeed {name} was not looked at, so which keys it reads is not known",
            where="--deepspeed",
            do=f"one of {', '.join(_near(name))}",
        )
    return Version(name=name, parsed=found["parsed"], of=found["of"], why=found["why"])


def _near(name: str) -> tuple[str, ...]:
    """The two below and the two above; all where it is no version."""
    known = versions()
    try:
        asked = _number(name)
    except ValueError:
        return known
    below = [v for v in known if _number(v) < asked]
    above = [v for v in known if _number(v) > asked]
    return (*below[-2:], *above[:2])


def known_keys(name: str, section: str) -> frozenset[str]:
    """Of `top`, `zero_optimization`, `offload_optimizer` or `offload_param`, at that version."""
    mine = _number(version(name).name)

    def holds(span: list[str]) -> bool:
        if len(span) > 2:
            return name in span
        return _number(span[0]) <= mine <= _number(span[-1])

    return frozenset(k for k, span in _table()["keys"][section].items() if holds(span))


def _own_optimizer(config: dict[str, Any]) -> set[str]:
    """The optimizer's type where it is DeepSpeed's own in any version; torch's are in none of them."""
    name = str(config.get("optimizer", {}).get("type", "")).lower()
    return {name} & set(_table()["keys"]["optimizer_types"])


def require_known(config: dict[str, Any], name: str, where: str) -> None:
    """Raise UsageError for the first key of a configuration that this version does not read."""
    zero = config.get("zero_optimization", {})
    sections = {
        "top": config,
        "zero_optimization": zero,
        "offload_optimizer": zero.get("offload_optimizer", {}),
        "offload_param": zero.get("offload_param", {}),
        "optimizer_types": _own_optimizer(config),
    }
    for section, written in sections.items():
        unknown = sorted(set(written) - known_keys(name, section))
        if unknown:
            span = _table()["keys"][section].get(unknown[0])
            having = (
                f"of the versions looked at, {span[0]} to {span[-1]} do" if span else "none does"
            )
            raise UsageError(
                f"DeepSpeed {name} does not read {unknown[0]}, which this plan needs",
                where=where,
                why=f"{'' if section == 'top' else section + ': '}{having}",
                do="plan without it, or use a version that reads it",
            )

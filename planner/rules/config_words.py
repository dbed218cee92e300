"""Rules about the words of training arguments: optimizer, schedule, strategies."""

from __future__ import annotations

from collections.abc import Iterable

from outlay.planner.read.edits import set_to
from outlay.planner.read.known import known
from outlay.planner.rules.config import Found, config_rule
from outlay.planner.rules.config_keys import near
from outlay.planner.rules.places import arguments, at, here, is_of, main_edits
from outlay.planner.rules.setup import Setup

_FEW = 8
"""So many words are named; of a longer list the nearest is."""


@config_rule(
    "argument_word_unknown",
    "illegal",
    "transformers 5.23, training_args.py: each is an enumeration (tried: ValueError: … is not a valid SchedulerType)",
    deepspeed=False,
)
def argument_word_unknown(s: Setup) -> Iterable[Found]:
    """A word that transformers does not know: an optimizer, a schedule, a strategy."""
    of_trainer = is_of(s, "trainer", "llamafactory") or (is_of(s, "launch") and s.meaning.trainer)
    given = arguments(s) if of_trainer else {}
    lists = known("trainer")["words"]
    for key, text in lists.items():
        value, words = given.get(key), text.split()
        if value is None or value in words or (isinstance(value, str) and "$" in value):
            continue
        if is_of(s, "launch") and value is False and "no" in words:
            continue  # a command line keeps the word
        yield _word_unknown(s, key, value, words)


def _word_unknown(s: Setup, key: str, value: object, words: list[str]) -> Found:
    in_5 = str(value) in known("trainer")["words_only_4x"].split()
    quoted = value is False and "no" in words
    meant = "no" if quoted else _meant(str(value), words)
    if quoted:
        said = "YAML reads it as false, which is none of its words"
    elif in_5:
        said = "transformers 5 no longer has it, 4.x has"
    else:
        said = "transformers has no such word"
    named = f", out of {', '.join(words)}" if len(words) <= _FEW else ""
    return Found(
        what=f"{key} is {value!r}: {said}", where=here(s, *at(s, key)), level="advice" if in_5 else "",
        do=(f'write "{meant}"' if quoted else f"write {meant}" if meant else "write one of its words") + named,
        edits=main_edits(set_to(*at(s, key), value=meant)) if meant and not in_5 else (),
    )  # fmt: skip


def _meant(value: str, words: list[str]) -> str | None:
    """The word that is probably meant; an `adamw` without its maker is torch's."""
    plain = known("trainer")["words_meant"].get(value.lower())
    return plain if plain in words else near(value, words)

"""The program that `outlay emit` writes beside a configuration: what it reads from files of fixed names.

Nothing names these files but the program itself, so they are taken where the program is there too.
"""

from __future__ import annotations

from dataclasses import replace

from outlay.planner.read.deepspeed import whole
from outlay.planner.read.document import Document, read_document, read_text
from outlay.planner.read.meaning import (
    ARGUMENTS,
    DEEPSPEED,
    FIXED,
    LOOP,
    MAIN,
    MODEL,
    Meaning,
    Said,
)
from outlay.profiles.errors import FileError

_PIECES, _SCRIPT = "pieces.py", "train.py"
MODEL_KEYS = {"config", "weights", "seq_len", "attention"}
"""Of model.json (planner/emit/trainer.py, `model_file`)."""


def _mentions(folder: Document, script: str, name: str) -> bool:
    """Whether a Python file beside the document reads a file of that name."""
    path = folder.path.parent / script
    try:
        return path.is_file() and f'"{name}"' in read_text(path, str(path))
    except FileError:
        return False


def _fixed(document: str, script: str, of: Document) -> Document | None:
    """A file that the program beside a document reads; null where there is none."""
    name = FIXED[document]
    if name in of.beside:
        return of.beside[name]
    path = of.path.parent / name
    if not path.is_file() or not _mentions(of, script, name):
        return None
    return read_document(path, str(path))


def _said(found: Document, key: str, document: str, value: object = None) -> Said:
    value = found.get(key) if value is None else value
    return Said(value=value, where=found.where((key,)), place=(document, (key,)))


def model_said(of: Document, documents: dict[str, Document]) -> dict[str, Said]:
    """Model, context and attention of the model.json beside; adds it to the documents."""
    found = _fixed(MODEL, _PIECES, of)
    if found is None or not set(found.value) >= MODEL_KEYS:
        return {}
    documents[MODEL] = found
    # the configuration decides: the weights, where there are any, are of that shape
    model = Said(value=str(found.path), where=found.where(("config",)))
    said = {"model": model, "attention": _said(found, "attention", MODEL)}
    if whole(found.get("seq_len")) is not None:
        said["seq_len"] = _said(found, "seq_len", MODEL)
    return said


def loop_said(of: Document, documents: dict[str, Document]) -> dict[str, Said]:
    """Recomputation and steps of the loop.json beside, and the model's; adds both to the documents."""
    found = _fixed(LOOP, _SCRIPT, of)
    if found is None:
        return {}
    documents[LOOP] = found
    on = found.get("gradient_checkpointing") is True
    said = {
        "checkpointing": _said(found, "gradient_checkpointing", LOOP, "full" if on else "none"),
    }
    if whole(found.get("max_steps")) is not None:
        said["steps"] = _said(found, "max_steps", LOOP)
    if found.get("tf32") is True:
        said["precision"] = _said(found, "tf32", LOOP, "tf32")
    return said | model_said(of, documents)


def arguments_of(script: str, text: Document) -> Meaning | None:
    """What training_args.json says, where the script that a command starts reads that; else null.

    Its places are in a document of its own, for the command's are the main one.
    """
    from outlay.planner.read.trainer import read_trainer

    found = _fixed(ARGUMENTS, script, text)
    if found is None:
        return None
    meaning = read_trainer(found)
    section = meaning.section
    if section is not None and section.document == MAIN:
        section = replace(section, document=ARGUMENTS)
    values = {name: _moved(said) for name, said in meaning.values.items()}
    documents = {ARGUMENTS: found}
    documents |= {k: d for k, d in meaning.documents.items() if k in (DEEPSPEED, MODEL)}
    return replace(meaning, section=section, values=values, documents=documents)


def _moved(said: Said) -> Said:
    if said.place is None or said.place[0] != MAIN:
        return said
    return replace(said, place=(ARGUMENTS, said.place[1]))

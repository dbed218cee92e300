"""`accelerate launch`: what its flags, or the configuration file that it names, say of DeepSpeed."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from outlay.planner.read.accelerate import PLUGIN, plugin_config, read_accelerate
from outlay.planner.read.companion import beside
from outlay.planner.read.document import Document
from outlay.planner.read.meaning import ACCELERATE, MAIN, Said, Section
from outlay.planner.read.trainer import attach_deepspeed


@dataclass(frozen=True, kw_only=True)
class Launched:
    """What stands behind the command besides its script's arguments."""

    section: Section | None = None
    values: dict[str, Said] = field(default_factory=dict)
    documents: dict[str, Document] = field(default_factory=dict)
    missing: str | None = None
    notes: tuple[str, ...] = ()


def launched(text: Document) -> Launched:
    """Its configuration file, or the flags that stand for one."""
    launch = text.get("launch", default={})
    if isinstance(launch.get("config_file"), str):
        found = beside(launch["config_file"], text)
        return Launched(missing=launch["config_file"]) if found is None else _through_file(found)
    file = launch.get("deepspeed_config_file")
    if isinstance(file, str):
        documents: dict[str, Document] = {}
        section, missing = attach_deepspeed(
            file, text, ("launch", "deepspeed_config_file"), documents
        )
        return Launched(section=section, documents=documents, missing=missing)
    if launch.get("use_deepspeed") is not True:
        return Launched()
    mixed = launch.get("mixed_precision")
    translated = {path: ("launch", key) for key, path in PLUGIN.items()}
    translated |= {(p, "enabled"): ("launch", "mixed_precision") for p in ("bf16", "fp16")}
    config = plugin_config(launch, mixed)
    return Launched(section=Section(config=config, document=None, translated=dict(translated)))


def _through_file(found: Document) -> Launched:
    meaning = read_accelerate(found)
    section = meaning.section
    if section is not None and section.document is None:
        section = replace(section, holder=ACCELERATE)
    values = {name: _moved(said) for name, said in meaning.values.items()}
    documents = {ACCELERATE: found}
    documents |= {k: d for k, d in meaning.documents.items() if k != MAIN}
    note = f"what is wrong with {found.name} itself is found by checking that file"
    return Launched(
        section=section,
        values=values,
        documents=documents,
        missing=meaning.missing_file,
        notes=(note,),
    )


def _moved(said: Said) -> Said:
    """The same, whose place is in Accelerate's file rather than in the command."""
    if said.place is None or said.place[0] != MAIN:
        return said
    return replace(said, place=(ACCELERATE, said.place[1]))

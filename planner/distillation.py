"""Whether a teacher can teach a model: from both configs, before anything is spent."""

from __future__ import annotations

from pathlib import Path

from outlay.planner.spec.compress import Distill
from outlay.planner.spec.families import resolve_model
from outlay.planner.spec.model import ModelSpec
from outlay.profiles.errors import FileError, UsageError

WHERE = "compress.distill.teacher"


def teacher_spec(distill: Distill) -> ModelSpec:
    """The teacher's sizes; refuses a folder that holds no dense weights of transformers."""
    folder = Path(distill.teacher).expanduser()
    if not folder.is_dir():
        raise FileError(
            f"{distill.teacher} is no folder", where=WHERE, do="name a folder with weights"
        )
    if not any(folder.glob("*.safetensors")):
        raise FileError("no safetensors in it: a teacher is trained", where=f"{WHERE}: {folder}")
    spec, config = resolve_model(str(folder))
    if config.get("quantization_config"):
        raise UsageError(
            "a packed teacher is not run", where=f"{WHERE}: {folder}", do="name dense weights"
        )
    return spec


def check_distill(distill: Distill, student: ModelSpec) -> None:
    """Raise UsageError where the student cannot learn from this teacher."""
    teacher = teacher_spec(distill)
    if teacher.vocab != student.vocab:
        raise UsageError(
            "the teacher reads another vocabulary", where=WHERE,
            why=f"{teacher.vocab} tokens, {student.name} has {student.vocab}",
            do="a teacher with the student's tokenizer",
        )  # fmt: skip
    if distill.hidden > 0 and teacher.hidden != student.hidden:
        raise UsageError(
            "hidden states of different widths have no distance", where="compress.distill.hidden",
            why=f"the teacher is {teacher.hidden} wide, {student.name} {student.hidden}",
            do="hidden: 0, or a teacher of the student's width",
        )  # fmt: skip
    if distill.top_k is not None and distill.top_k > student.vocab:
        raise UsageError(
            f"top_k is more than the vocabulary of {student.vocab}", where="compress.distill.top_k"
        )

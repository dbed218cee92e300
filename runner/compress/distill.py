"""Distillation: the student learns what a teacher says of each next token, beside the text itself.

    loss = (1 - weight) · CE(student, text) + weight · T² · KL(teacher_T || student_T) + hidden · D

Hinton, Vinyals, Dean 2015 (arXiv:1503.02531): both are softened by the temperature T, and T² keeps the
gradient's size. D is the squared distance of hidden states, each relative to the teacher's own size, over
the student's blocks and the teacher's at the same share of its depth. From cached logits, KL is over the
teacher's top k tokens and all others as one: it is at most the full one, and equal at k = vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from outlay.planner.spec.compress import Distill
from outlay.profiles.errors import OutlayError, UsageError
from outlay.runner.compress.soft_loss import full_kl, top_kl
from outlay.runner.model import IGNORED, causal_lm_loss, next_tokens

if TYPE_CHECKING:
    from outlay.runner.compress.teacher import Teacher
    from outlay.runner.compress.teacher_cache import Cache, Pretended
    from outlay.runner.engine import Engine


def hidden_distance(
    student: tuple[torch.Tensor, ...], teacher: tuple[torch.Tensor, ...]
) -> torch.Tensor:
    """Mean over the student's blocks of |s - t|² / |t|²; each tuple begins with the embedding."""
    blocks, deep = len(student) - 1, len(teacher) - 1
    total = torch.zeros((), device=student[0].device)
    for i in range(1, blocks + 1):
        mine, theirs = student[i].float(), teacher[round(i * deep / blocks)].float()
        total = total + functional.mse_loss(mine, theirs) / theirs.square().mean()
    return total / blocks


class Distiller:
    """The teacher's part of the loss, in each rank of one engine."""

    def __init__(self, engine: Engine, distill: Distill) -> None:
        self.engine, self.distill = engine, distill
        self.teacher: Teacher | None = None
        self.cache: Cache | Pretended | None = None
        """Of top-k logits; the trainer makes or opens it before the first step."""
        if distill.top_k is None:
            self.teacher = self._open_teacher()

    @classmethod
    def of(cls, engine: Engine) -> Distiller | None:
        """Null where the job does not distil."""
        compress = engine.plan.job.compress
        if compress is None or compress.distill is None:
            return None
        return cls(engine, compress.distill)

    def pretend(self) -> None:
        """Stand-in for a cache where memory and time are measured on tokens that no run has."""
        from outlay.runner.compress.teacher_cache import Pretended

        if self.distill.top_k is not None:
            vocab = int(self.engine.plan.model.config["vocab_size"])
            self.cache = Pretended(min(self.distill.top_k, vocab), vocab)

    def _open_teacher(self) -> Teacher:
        from outlay.runner.compress.teacher import Teacher

        made = Teacher(self.engine.plan, self.distill)
        student = self.engine.deepspeed.module.config
        if self.distill.hidden > 0 and made.config.hidden_size != student.hidden_size:
            made.close()
            raise UsageError(
                "hidden states of different widths have no distance", where="compress.distill.hidden",
                why=f"the teacher is {made.config.hidden_size} wide, the student {student.hidden_size}",
                do="hidden: 0, or a teacher of the student's width",
            )  # fmt: skip
        return made

    def loss(self, ids: torch.Tensor) -> torch.Tensor:
        """Of one micro-batch [b, s], through the engine; it replaces the loss on the text alone."""
        d, hidden = self.distill, self.distill.hidden > 0
        said = self.engine.deepspeed(input_ids=ids, output_hidden_states=hidden)
        # the last position has no next token; a slice of the logits would be copied
        used = (next_tokens(ids) != IGNORED).flatten()
        mine, text = said.logits.flatten(0, 1), causal_lm_loss(said.logits, ids)
        if self.cache is not None:
            values, numbers = (x.flatten(0, 1) for x in self.cache.of(ids))
            soft = top_kl(mine, values, numbers, used, d.temperature)
            return (1 - d.weight) * text + d.weight * d.temperature**2 * soft
        if self.teacher is None:
            raise OutlayError("the teacher's logits are not there", do="open the cache first")
        theirs, states = self.teacher.says(ids, hidden=hidden)
        soft = full_kl(mine, theirs.flatten(0, 1), used, d.temperature)
        loss = (1 - d.weight) * text + d.weight * d.temperature**2 * soft
        return loss + d.hidden * hidden_distance(said.hidden_states, states) if hidden else loss

    def close(self) -> None:
        """Let go of the teacher and its files."""
        if self.teacher is not None:
            self.teacher.close()
        self.teacher = self.cache = None

"""A teacher beside the student: whole on each rank, or split by ZeRO-3, in the host's memory if asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from outlay.planner.spec.compress import Distill
from outlay.planner.spec.plan import ModelSource, Plan
from outlay.profiles.errors import FileError, UsageError


def teacher_source(folder: str) -> ModelSource:
    """The teacher as plans describe a model."""
    path = Path(folder)
    config = path / "config.json"
    if not config.is_file():
        raise FileError("no config.json: this is no folder of transformers", where=str(path))
    value: dict[str, Any] = json.loads(config.read_text(encoding="utf-8"))
    if value.get("quantization_config"):
        raise UsageError("a packed teacher is not run", where=str(path), do="name dense weights")
    return ModelSource(
        name=path.name, source=str(path), parameters=0, config=value, weights=str(path)
    )


class Teacher:
    """Its forward passes, without gradients. Building it is collective at `teacher_zero: 3`."""

    def __init__(self, plan: Plan, distill: Distill) -> None:
        from outlay.runner.engine import current_device
        from outlay.runner.model import Filler, skeleton

        source, job = teacher_source(distill.teacher), plan.job
        model = skeleton(source, precision=job.precision, attention=job.attention)
        model.requires_grad_(False)
        self.config: Any = model.config
        words = int(plan.model.config.get("vocab_size", 0))
        if int(self.config.vocab_size) != words:
            raise UsageError(
                "the teacher reads another vocabulary", where=distill.teacher,
                why=f"{self.config.vocab_size} tokens, the student has {words}",
                do="a teacher with the student's tokenizer",
            )  # fmt: skip
        filler = Filler(model, source, seed=job.seed, device=current_device())
        self.engine: Any = None
        if distill.teacher_zero == 3:
            self.engine = _split(model, filler, plan, distill)
        else:
            filler.fill("")
            model.eval()
        # not in a list of modules: the student's engine must not find it
        self._model = (model,)

    def says(
        self, ids: torch.Tensor, *, hidden: bool = False
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """(logits [b, s, v], hidden states by depth or nothing)."""
        run: Any = self.engine if self.engine is not None else self._model[0]
        with torch.no_grad():
            said = run(input_ids=ids, output_hidden_states=hidden)
        return said.logits, tuple(said.hidden_states) if hidden else ()

    def close(self) -> None:
        """Free it; the student's engine, if it lives, goes on."""
        if self.engine is not None:
            self.engine.destroy()
        self.engine, self._model = None, ()  # type: ignore[assignment]


def _split(model: nn.Module, filler: Any, plan: Plan, distill: Distill) -> Any:
    """DeepSpeed's ZeRO-3 for inference: parts filled and split one at a time, gathered as they are used."""
    import deepspeed

    from outlay.runner.engine import quiet, refusals
    from outlay.runner.model import parts_of

    config = teacher_config(plan, distill)
    used = functional.linear
    with quiet(), refusals():
        for part in parts_of(model):
            deepspeed.zero.Init(module=filler.fill(part), config_dict_or_path=config)
        # filling makes new parameters
        model.requires_grad_(False)
        engine = deepspeed.initialize(model=model, config=config)[0]
    if plan.strategy.zero < 3:
        # ZeRO-3 replaces it for the whole process; the student needs its own
        functional.linear = used
    engine.eval()
    return engine


def teacher_config(plan: Plan, distill: Distill) -> dict[str, Any]:
    """DeepSpeed's section for a teacher of that plan: stage 3 without an optimizer."""
    zero: dict[str, Any] = {"stage": 3}
    if distill.teacher_offload == "cpu":
        zero["offload_param"] = {"device": "cpu"}
    precisions = {k: v for k, v in plan.deepspeed.items() if k in ("bf16", "fp16")}
    return {
        "train_micro_batch_size_per_gpu": plan.strategy.micro_batch,
        "zero_optimization": zero,
        **precisions,
    }

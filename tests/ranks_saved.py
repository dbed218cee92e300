"""Functions that tests run inside living ranks: what is saved, resumed, exported and loaded.

As in ranks.py: `pool.call("ranks_saved:resume_train", plan, folder, more)`.
"""

from __future__ import annotations

from typing import Any

from ranks import micro_batches

from outlay.planner.spec.plan import Plan


def train_save_train(plan: Plan, root: str, steps: int, more: int) -> dict[str, Any]:
    """Train, save, train on: the losses after the save are what a resume must repeat."""
    from pathlib import Path

    from outlay.runner.checkpoint import save_checkpoint
    from outlay.runner.engine import Engine

    engine = Engine.build(plan)
    try:
        for step in range(steps):
            engine.train_step(micro_batches(plan, step, engine.dp_rank))
        state = {"tokens": steps * plan.job.tokens_per_step, "data": {"step": steps}}
        folder = save_checkpoint(engine, Path(root), steps, state)
        return {"folder": str(folder), "losses": _more(engine, plan, steps, more)}
    finally:
        engine.close()


def resume_train(plan: Plan, folder: str, more: int) -> dict[str, Any]:
    """Build, load, train on."""
    from pathlib import Path

    from outlay.runner.checkpoint import load_checkpoint
    from outlay.runner.engine import Engine

    engine = Engine.build(plan)
    try:
        state = load_checkpoint(engine, Path(folder))
        step = state["data"]["step"]
        return {"state": state, "losses": _more(engine, plan, step, more)}
    finally:
        engine.close()


def _more(engine: Any, plan: Plan, step: int, more: int) -> list[float]:
    steps = range(step, step + more)
    return [engine.train_step(micro_batches(plan, s, engine.dp_rank)) for s in steps]


def save_into(plan: Plan, root: str, steps: list[int], keep: int) -> list[str]:
    """Save without training, once for each number; the folders returned."""
    from pathlib import Path

    from outlay.runner.checkpoint import save_checkpoint
    from outlay.runner.engine import Engine

    engine = Engine.build(plan)
    try:
        state = {"tokens": 5, "data": {"sha256": "ab"}, "more": [1.5, None, "x"]}
        return [str(save_checkpoint(engine, Path(root), step, state, keep=keep)) for step in steps]
    finally:
        engine.close()


def write_code_into(path: str) -> None:
    """A shard that would run code when it is unpickled carelessly (rank 0 writes it)."""
    import torch

    if torch.distributed.get_rank() == 0:
        torch.save({"module": _RunsCode()}, path)


class _RunsCode:
    def __reduce__(self) -> Any:
        return (print, ("this must never run",))


def train_and_export(plan: Plan, steps: int, folder: str, tokenizer: str | None) -> dict[str, Any]:
    """Train, export on rank 0; the engine's own logits and held-out loss."""
    from pathlib import Path

    from outlay.runner.engine import Engine
    from outlay.runner.export import export_safetensors

    engine = Engine.build(plan)
    try:
        for step in range(steps):
            engine.train_step(micro_batches(plan, step, engine.dp_rank))
        state = engine.gather_state_dict()
        if state is not None:
            path = None if tokenizer is None else Path(tokenizer)
            export_safetensors(state, plan, Path(folder), path, shard_bytes=100_000)
        ids = micro_batches(plan, 900, 0)[0]
        return {"logits": _logits(engine, ids), "heldout": engine.evaluate([ids])}
    finally:
        engine.close()


def only_export(plan: Plan, folder: str, tokenizer: str | None) -> None:
    """Export untrained weights, without an engine, each rank into a folder of its own."""
    import os
    from pathlib import Path

    from outlay.runner.export import export_safetensors
    from outlay.runner.model import build_model

    model = build_model(plan.model, precision="fp32", attention="sdpa", seed=0)
    path = None if tokenizer is None else Path(tokenizer)
    own = Path(f"{folder}-{os.environ['RANK']}")
    export_safetensors(model.state_dict(), plan, own, path)


def _logits(engine: Any, ids: Any) -> Any:
    """Of the engine as it is; null on the stages of a pipeline that make none."""
    import torch

    with torch.no_grad():
        if engine.pipeline:
            pair = iter([(ids, ids)])
            _, logits = engine.deepspeed.eval_batch(pair, return_logits=True, num_micro_batches=1)
            return None if logits is None else logits.numpy()
        engine.deepspeed.eval()
        return engine.deepspeed(input_ids=ids).logits.numpy()


def reloaded(folder: str, plan: Plan) -> dict[str, Any]:
    """What transformers makes of an exported folder: logits, ties, tokens."""
    from pathlib import Path

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=micro_batches(plan, 900, 0)[0]).logits
    text = "def f(x): return x"
    tokens = None
    if (Path(folder) / "tokenizer.json").exists():
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokens = (tokenizer.decode(tokenizer.encode(text)), tokenizer.eos_token)
    return {
        "logits": logits.numpy(),
        "tied": model.get_output_embeddings().weight is model.get_input_embeddings().weight,
        "missing": sorted(report["missing_keys"]) + sorted(report["unexpected_keys"]),
        "class": type(model).__name__,
        "tokens": tokens,
    }


def heldout_at_start(plan: Plan) -> float:
    """Held-out loss before the first step."""
    from outlay.runner.engine import Engine

    engine = Engine.build(plan)
    try:
        loss: float = engine.evaluate([micro_batches(plan, 900, 0)[0]])
        return loss
    finally:
        engine.close()

"""Functions that tests run inside living ranks, and the small plans they run.

`pool.call("ranks:train", plan, steps)`: everything here is importable by a rank and returns
plain values. The `ranks` fixture is in conftest.py.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from outlay.planner.spec.cluster import Cluster, Link
from outlay.planner.spec.job import Job, Optimizer
from outlay.planner.spec.plan import ModelSource, Plan
from outlay.planner.spec.strategy import Strategy
from outlay.profiles.loader import Accelerator

SEQ_LEN = 32
VOCAB = 256
GLOBAL_BATCH = 8

_LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "mistral": {**_LLAMA, "model_type": "mistral", "sliding_window": 16},
    "qwen2": {**_LLAMA, "model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {**_LLAMA, "model_type": "qwen3", "head_dim": 16},
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": VOCAB,
        "n_embd": 64,
        "n_layer": 3,
        "n_head": 4,
        "n_positions": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "resid_pdrop": 0.0,
    },
    "gpt_neox": {
        **{k: v for k, v in _LLAMA.items() if k != "num_key_value_heads"},
        "model_type": "gpt_neox",
    },
    "opt": {
        "model_type": "opt",
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "word_embed_proj_dim": 64,
        "ffn_dim": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "dropout": 0.0,
        "pad_token_id": 1,
        "bos_token_id": 2,
        "eos_token_id": 2,
    },
    "gemma": {**_LLAMA, "model_type": "gemma", "head_dim": 16, "pad_token_id": 0},
    "mixtral": {
        **_LLAMA,
        "model_type": "mixtral",
        "sliding_window": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
}


def cpu_cluster(ranks: int) -> Cluster:
    """`ranks` CPU processes; nothing is read from this machine."""
    return Cluster(
        accelerator=Accelerator(name="cpu", title="CPU", vendor="any", kind="cpu"),
        nodes=1,
        ranks_per_node=ranks,
        usable_bytes=1 << 30,
        intra=Link(kind="shm", bytes_per_s=1e9, latency_s=1e-4, source="test"),
        inter=None,
        source="test",
    )


def tiny_plan(
    family: str = "llama",
    *,
    precision: str = "fp32",
    steps: int = 20,
    config: dict[str, Any] | None = None,
    job: dict[str, Any] | None = None,
    **strategy: Any,
) -> Plan:
    """A plan for a model of about 0.1 M parameters; `strategy` overrides dp=2, micro_batch=…"""
    from outlay.planner.emit.deepspeed import deepspeed_config
    from outlay.planner.spec.families import spec_from_config

    chosen = {"dp": 2, **strategy}
    chosen.setdefault("grad_accum", 2)
    chosen.setdefault("micro_batch", GLOBAL_BATCH // chosen["dp"] // chosen["grad_accum"])
    how = Strategy(**chosen)
    what = Job(
        model=family,
        seq_len=SEQ_LEN,
        global_batch=how.global_batch,
        steps=steps,
        precision=precision,  # type: ignore[arg-type]
        **{"optimizer": Optimizer(lr=3e-3), "seed": 7, **(job or {})},
    )
    cluster = cpu_cluster(how.world)
    model_config = {**CONFIGS[family], **(config or {})}
    spec = spec_from_config(model_config, name=family, source="test")
    return Plan(
        created="2026-01-01T00:00:00Z",
        outlay_version="test",
        model=ModelSource(name=family, source="test", parameters=0, config=model_config),
        job=what,
        cluster=cluster,
        strategy=how,
        estimate={},
        deepspeed=deepspeed_config(what, how, spec, cluster),
        considered=1,
        feasible=1,
    )


def with_strategy(plan: Plan, **changes: Any) -> Plan:
    """The plan with another strategy but the same DeepSpeed section (a plan edited by hand)."""
    return dataclasses.replace(plan, strategy=dataclasses.replace(plan.strategy, **changes))


def global_batch(step: int) -> Any:
    """Token ids [GLOBAL_BATCH, SEQ_LEN] of a step: counting with a stride, so that there is a loss to lower."""
    import torch

    made = torch.Generator().manual_seed(1000 + step)
    start = torch.randint(0, VOCAB, (GLOBAL_BATCH, 1), generator=made)
    stride = torch.randint(1, 4, (GLOBAL_BATCH, 1), generator=made)
    return (start + stride * torch.arange(SEQ_LEN)) % VOCAB


def micro_batches(plan: Plan, step: int, dp_rank: int) -> list[Any]:
    """What data-parallel rank `dp_rank` sees of that step."""
    strategy = plan.strategy
    share = global_batch(step).chunk(strategy.dp)[dp_rank]
    return list(share.split(strategy.micro_batch))


def train(plan: Plan, steps: int) -> dict[str, Any]:
    """Build, train, gather, close: losses, gradient norms, held-out loss, weights (rank 0)."""
    from outlay.runner.engine import Engine

    engine = Engine.build(plan)
    try:
        losses, norms = [], []
        for step in range(steps):
            losses.append(engine.train_step(micro_batches(plan, step, engine.dp_rank)))
            norms.append(engine.last_grad_norm)
        batches = [b for s in (900, 901) for b in micro_batches(plan, s, engine.dp_rank)]
        heldout = engine.evaluate(batches)
        state = engine.gather_state_dict()
        return {
            "losses": losses,
            "norms": norms,
            "heldout": heldout,
            "weights": None if state is None else {k: v.float().numpy() for k, v in state.items()},
            "dp_rank": engine.dp_rank,
            "is_loss_rank": engine.is_loss_rank,
            "pipeline": engine.pipeline,
        }
    finally:
        engine.close()


def plain_optimizer(how: Optimizer, weights: list[Any]) -> Any:
    """torch's own of that name; Lion as its paper has it (arXiv 2302.06675, algorithm 2)."""
    import torch

    rate = {"lr": how.lr, "weight_decay": how.weight_decay}
    adam = {**rate, "betas": how.betas, "eps": how.eps}
    if how.name == "adamw":
        return torch.optim.AdamW(weights, **adam)
    if how.name == "adam":
        return torch.optim.Adam(weights, **adam)
    if how.name == "sgd":
        return torch.optim.SGD(weights, **rate, momentum=how.momentum)
    if how.name == "rmsprop":
        return torch.optim.RMSprop(weights, **rate, eps=how.eps, momentum=how.momentum)
    if how.name == "adafactor":
        return torch.optim.Adafactor(weights, **rate)

    class Lion(torch.optim.Optimizer):
        @torch.no_grad()
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            first, second = how.betas
            for w in self.param_groups[0]["params"]:
                m = self.state[w].setdefault("m", torch.zeros_like(w))
                c = first * m + (1 - first) * w.grad
                w -= how.lr * (torch.sign(c) + how.weight_decay * w)
                m.copy_(second * m + (1 - second) * w.grad)

    assert how.name == "lion"
    return Lion(weights, {"lr": how.lr})


def reference(plan: Plan, steps: int) -> dict[str, Any]:
    """The same training in one process with nothing but torch: optimizer and clipping."""
    import torch

    from outlay.runner.adapters import adapt
    from outlay.runner.model import Filler, causal_lm_loss, skeleton
    from outlay.runner.quantized import fill

    job = plan.job
    model: Any = skeleton(plan.model, precision=job.precision, attention=job.attention)
    filler = Filler(model, plan.model, seed=job.seed, device=torch.device("cpu"))
    fill(model, filler, job)
    model.train()
    adapt(model, job)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = plain_optimizer(job.optimizer, weights)
    losses, norms = [], []
    for step in range(steps):
        ids = global_batch(step)
        loss = causal_lm_loss(model(input_ids=ids).logits, ids)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), job.gradient_clipping)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        norms.append(float(norm))
    model.eval()
    with torch.no_grad():
        heldout = [
            float(causal_lm_loss(model(input_ids=ids).logits, ids))
            for ids in (global_batch(900), global_batch(901))
        ]
    weights = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    return {"losses": losses, "norms": norms, "heldout": sum(heldout) / 2, "weights": weights}


def who(said: str, suffix: str = "") -> dict[str, Any]:
    """Who this rank is, after one collective."""
    import os

    import torch

    total = torch.tensor(torch.distributed.get_rank())
    torch.distributed.all_reduce(total)
    return {
        "rank": torch.distributed.get_rank(),
        "world": torch.distributed.get_world_size(),
        "sum": int(total),
        "said": said + suffix,
        "pid": os.getpid(),
        "threads": torch.get_num_threads(),
    }


def shared_memory_op() -> bool:
    """Whether DeepSpeed uses its compiled shared-memory kernels here."""
    from deepspeed.comm import comm

    return comm.cdb.shm_comm_op is not None


def fail_in(rank: int) -> None:
    """Raise in one rank."""
    import torch

    if torch.distributed.get_rank() == rank:
        raise ValueError(f"rank {rank} does not like this")


def refuse_all() -> None:
    """Raise one of our errors in all ranks."""
    from outlay.profiles.errors import UsageError

    raise UsageError("not like this", where="here", do="like that")


def die_in(rank: int) -> None:
    """End one rank's process."""
    import os

    import torch

    if torch.distributed.get_rank() == rank:
        print("last words", flush=True)
        os._exit(7)


def hang_in(rank: int) -> None:
    """One rank never returns."""
    import time

    import torch

    if torch.distributed.get_rank() == rank:
        time.sleep(3600)


def fail_before_meeting(rank: int) -> None:
    """One rank raises, the others wait for it in a collective."""
    import torch

    if torch.distributed.get_rank() == rank:
        raise ValueError("never came")
    torch.distributed.barrier()


def block_forwards(plan: Plan) -> dict[str, Any]:
    """How often each decoder block of this rank began its MLP in one step, and the loss."""
    from outlay.runner.engine import Engine

    engine = Engine.build(plan)
    try:
        counts: list[int] = []
        mlps = [m for name, m in engine.deepspeed.module.named_modules() if name.endswith("mlp")]
        for index, mlp in enumerate(mlps):
            counts.append(0)

            def count(*_: Any, index: int = index) -> None:
                counts[index] += 1

            mlp.register_forward_pre_hook(count)
        loss = engine.train_step(micro_batches(plan, 0, engine.dp_rank))
        return {"counts": counts, "loss": loss}
    finally:
        engine.close()


def saved_and_resumed(plan: Plan, folder: str, before: int, after: int) -> dict[str, Any]:
    """Losses of `after` steps: straight through, and from a checkpoint in another engine."""
    from pathlib import Path

    from outlay.runner.engine import Engine

    def losses(engine: Engine, steps: range) -> list[float]:
        return [engine.train_step(micro_batches(plan, i, engine.dp_rank)) for i in steps]

    engine = Engine.build(plan)
    try:
        losses(engine, range(before))
        engine.save(Path(folder), {})
        through = losses(engine, range(before, before + after))
        count = sum(getattr(p, "ds_numel", p.numel()) for p in engine.deepspeed.module.parameters())
    finally:
        engine.close()
    engine = Engine.build(plan)
    try:
        engine.load(Path(folder))
        resumed = losses(engine, range(before, before + after))
    finally:
        engine.close()
    return {"through": through, "resumed": resumed, "parameters": count}


def optimizer_bytes(plan: Plan) -> dict[str, int]:
    """After a step: bytes of the optimizer's states in this rank, and the elements that they are of."""
    import torch

    from outlay.runner.engine import Engine

    engine = Engine.build(plan)
    try:
        engine.train_step(micro_batches(plan, 0, engine.dp_rank))
        inner = engine.deepspeed.optimizer.optimizer
        states = [t for s in inner.state.values() for t in s.values() if torch.is_tensor(t)]
        weights = [p for group in inner.param_groups for p in group["params"]]
        return {
            "states": sum(t.numel() * t.element_size() for t in states),
            "elements": sum(p.numel() for p in weights),
        }
    finally:
        engine.close()


def still_at_zero_lr(plan: Plan) -> dict[str, Any]:
    """Losses of the same batch: two steps at lr 0, then one at the job's and one more."""
    from outlay.runner.engine import Engine

    engine = Engine.build(plan)
    try:
        before = engine.last_grad_norm
        losses = []
        for lr in (0.0, 0.0, plan.job.optimizer.lr, 0.0):
            engine.set_lr(lr)
            losses.append(engine.train_step(micro_batches(plan, 0, engine.dp_rank)))
        return {"losses": losses, "norm_before": before, "norm": engine.last_grad_norm}
    finally:
        engine.close()


def left_behind(plans: list[Plan]) -> list[dict[str, int]]:
    """After each engine is built, used and closed: large tensors alive, process groups."""
    import gc

    import torch
    from torch.distributed import distributed_c10d
    from torch.nn import functional

    from outlay.runner.engine import Engine

    def large() -> set[int]:
        gc.collect()
        found = (t for t in gc.get_objects() if isinstance(t, torch.Tensor))
        return {id(t) for t in found if t.numel() > 2000}

    before = large()  # what other tests of these living ranks left is theirs
    seen = []
    for plan in plans:
        engine = Engine.build(plan)
        engine.train_step(micro_batches(plan, 0, engine.dp_rank))
        engine.evaluate(micro_batches(plan, 1, engine.dp_rank))
        engine.close()
        engine.close()
        del engine
        seen.append(
            {
                "large_tensors": len(large() - before),
                "groups": len(distributed_c10d._world.pg_map),
                "own_linear": int(functional.linear.__module__.startswith("deepspeed")),
            }
        )
    return seen


def feed(plan: Plan, shapes: list[tuple[int, int]]) -> None:
    """One step with batches of these shapes."""
    import torch

    from outlay.runner.engine import Engine

    engine = Engine.build(plan)
    try:
        engine.train_step([torch.zeros(shape, dtype=torch.int64) for shape in shapes])
    finally:
        engine.close()


def evaluate_nothing(plan: Plan) -> None:
    """Evaluate on no batch at all."""
    from outlay.runner.engine import Engine

    engine = Engine.build(plan)
    try:
        engine.evaluate([])
    finally:
        engine.close()


def compare(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Two results of `train` and `reference`: the same curve, norms, held-out loss and weights."""
    import numpy as np

    np.testing.assert_allclose(found["losses"], expected["losses"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(found["norms"], expected["norms"], rtol=1e-3)
    assert abs(found["heldout"] - expected["heldout"]) <= 1e-4
    assert found["losses"][-1] < found["losses"][0] - 0.5
    assert list(found["weights"]) == list(expected["weights"])
    for name, weight in expected["weights"].items():
        if name.endswith(("attn.bias", "query_key_value.bias", "k_proj.bias")):
            # The bias of the keys shifts all scores of a query alike: its gradient is rounding
            # error alone, which Adam makes into steps of full size.
            continue
        distance = np.linalg.norm(found["weights"][name] - weight)
        assert distance <= 1e-3 * np.linalg.norm(weight), name


def exported_logits(plan: Plan, folder: str) -> Any:
    """Train two steps in stages and export; the logits of the last stage for one batch, else null."""
    from pathlib import Path

    from outlay.runner.engine import Engine
    from outlay.runner.export import export_safetensors

    engine = Engine.build(plan)
    try:
        for step in range(2):
            engine.train_step(micro_batches(plan, step, engine.dp_rank))
        weights = engine.gather_state_dict()
        if weights is not None:
            export_safetensors(weights, plan, Path(folder))
        ids = global_batch(900)[: plan.strategy.micro_batch]
        inner = engine.deepspeed
        inner.reset_activation_shape()
        _, logits = inner.eval_batch(iter([(ids, ids)]), num_micro_batches=1, return_logits=True)
        return logits.numpy() if engine.is_loss_rank else None
    finally:
        engine.close()


def parallel_sizes(plan: Plan) -> dict[str, Any]:
    """Of a pipeline: this rank's stage, its layers, and the ends of all stages."""
    from outlay.runner.engine import Engine

    engine = Engine.build(plan)
    try:
        module = engine.deepspeed.module
        return {
            "parts": list(module.parts),
            "stage": engine.deepspeed.stage_id,
            "layers": [type(layer).__name__ for layer in module.children()],
            "parameters": sum(p.numel() for p in module.parameters()),
        }
    finally:
        engine.close()

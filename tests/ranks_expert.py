"""Functions that tests run inside living ranks whose experts are spread.

As in ranks.py: `pool.call("ranks_expert:reference", plan, steps)`.
"""

from __future__ import annotations

from typing import Any

from ranks import global_batch, micro_batches, plain_optimizer

from outlay.planner.spec.plan import Plan


def reference(plan: Plan, steps: int) -> dict[str, Any]:
    """One process, torch and transformers alone: the loss is the one that transformers returns for labels.

    The global batch goes through in the micro-batches of the plan, because a load-balance loss is no
    mean over sequences."""
    import torch

    from outlay.runner.model import build_model, causal_lm_loss

    job, strategy = plan.job, plan.strategy
    model: Any = build_model(
        plan.model, precision=job.precision, attention=job.attention, seed=job.seed
    )
    model.train()
    optimizer = plain_optimizer(job.optimizer, list(model.parameters()))
    parts = strategy.dp * strategy.grad_accum
    losses, norms, balance = [], [], []
    for step in range(steps):
        outputs = [model(input_ids=i, labels=i) for i in global_batch(step).chunk(parts)]
        loss = sum(o.loss for o in outputs) / parts
        loss.backward()
        norms.append(
            float(torch.nn.utils.clip_grad_norm_(model.parameters(), job.gradient_clipping))
        )
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        aux = [o.aux_loss for o in outputs if o.aux_loss is not None]
        balance.append(model.router_aux_loss_coef * float(sum(aux)) / parts if aux else None)
    model.eval()
    with torch.no_grad():
        ids = [global_batch(900), global_batch(901)]
        heldout = [float(causal_lm_loss(model(input_ids=i).logits, i)) for i in ids]
    weights = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    return {
        "losses": losses,
        "norms": norms,
        "balance": balance,
        "heldout": sum(heldout) / 2,
        "weights": weights,
    }


def use(plan: Plan, steps: int) -> list[dict[str, Any]]:
    """What each step says of the experts."""
    from outlay.runner.engine import Engine

    engine = Engine.build(plan)
    try:
        seen = []
        for step in range(steps):
            engine.train_step(micro_batches(plan, step, engine.dp_rank))
            assert engine.last_expert_use is not None
            seen.append(
                {"tokens": engine.last_expert_use.tokens, **engine.last_expert_use.figures()}
            )
        return seen
    finally:
        engine.close()


def starved(plan: Plan, steps: int) -> dict[str, Any]:
    """Losses where every router is made to choose among the first half of the experts."""
    from outlay.runner.engine import Engine

    engine = Engine.build(plan)
    try:

        def first_half(router: Any, _: Any, routed: Any) -> Any:
            logits, weights, chosen = routed
            return logits, weights, chosen % (router.num_experts // 2)

        for name, module in engine.deepspeed.module.named_modules():
            if name.endswith("mlp.gate"):
                # before the counting hook, which sees what this returns
                module.register_forward_hook(first_half, prepend=True)
        losses = []
        for step in range(steps):
            losses.append(engine.train_step(micro_batches(plan, step, engine.dp_rank)))
        assert engine.last_expert_use is not None
        return {"losses": losses, "idle": engine.last_expert_use.idle}
    finally:
        engine.close()


def held(plan: Plan) -> dict[str, int]:
    """Elements of weights and of Adam's states that this rank holds after a step."""
    import torch

    from outlay.runner.engine import Engine

    engine = Engine.build(plan)
    try:
        engine.train_step(micro_batches(plan, 0, engine.dp_rank))
        named = dict(engine.deepspeed.module.named_parameters())
        inner = getattr(engine.deepspeed.optimizer, "optimizer", engine.deepspeed.optimizer)
        states = [t for s in inner.state.values() for t in s.values() if torch.is_tensor(t)]
        return {
            "experts": sum(p.numel() for n, p in named.items() if ".experts." in n),
            "others": sum(p.numel() for n, p in named.items() if ".experts." not in n),
            "moments": sum(t.numel() for t in states if t.numel() > 1),
            "masters": sum(p.numel() for g in inner.param_groups for p in g["params"]),
        }
    finally:
        engine.close()

"""Functions that tests run inside living ranks: pruning and quantization-aware training.

As in ranks.py: `pool.call("ranks_compress:train_pruned", plan, steps)`.
"""

from __future__ import annotations

from typing import Any

from ranks import micro_batches

from outlay.planner.spec.plan import Plan


def train_compressed(
    plan: Plan,
    steps: int,
    *,
    save: str | None = None,
    resume: str | None = None,
    stop: int = 0,
    lr: float | None = None,
    nodes: bool = False,
) -> dict[str, Any]:
    """Train from `resume` (or the start) to `stop` (or the end), save; zeros, weights, states.

    `nodes`: with what `add_nodes` does.
    """
    from pathlib import Path

    from outlay.runner.checkpoint import load_checkpoint, save_checkpoint
    from outlay.runner.engine import Engine

    engine = Engine.build(plan)
    try:
        compressor = engine.compressor
        first = load_checkpoint(engine, Path(resume))["data"]["step"] if resume else 0
        losses, changes, alive = [], [], 0
        if lr is not None:
            engine.set_lr(lr)
        if nodes:
            add_nodes(engine.deepspeed.module)
        for step in range(first, stop or steps):
            before = _pruned(compressor)
            if changed := compressor.before_step(step, steps):
                changes.append((step, changed))
            pairs = zip(before, _pruned(compressor), strict=True)
            alive += sum(int((old & ~new).sum()) for old, new in pairs)
            losses.append(engine.train_step(micro_batches(plan, step, engine.dp_rank)))
            alive += _alive(engine)
        if save:
            save_checkpoint(engine, Path(save), stop, {"tokens": 0, "data": {"step": stop}})
        heldout = engine.evaluate([micro_batches(plan, 900, engine.dp_rank)[0]])
        state = engine.gather_state_dict()
        return {
            "losses": losses,
            "heldout": heldout,
            "changes": changes,
            "alive": alive,
            "report": compressor.report(),
            "weights": None if state is None else {k: v.float().numpy() for k, v in state.items()},
            "mask_bytes": sum(p.numel() for p in _pruned(compressor)),
        }
    finally:
        engine.close()


def add_nodes(model: Any) -> None:
    """Put a node of autograd around every module, as ZeRO-3's hooks do: where a tensor is read three
    times, its gradients are then added up in the same order."""
    import torch
    from deepspeed.runtime.zero.parameter_offload import apply_to_tensors_only

    class Same(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.detach()

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return gradient

    for module in model.modules():
        module.register_forward_pre_hook(lambda _, xs: apply_to_tensors_only(Same.apply, xs))
        module.register_forward_hook(lambda _, __, out: apply_to_tensors_only(Same.apply, out))


def _pruned(compressor: Any) -> list[Any]:
    return [] if compressor.pruner is None else [p.clone() for p in compressor.pruner.masks.pruned]


def _alive(engine: Any) -> int:
    """Pruned weights whose master or optimizer state is not zero after a step."""
    from outlay.runner.compress.fragments import inner_optimizer

    if engine.compressor.pruner is None:
        return 0
    masks = engine.compressor.pruner.masks
    state = inner_optimizer(engine.deepspeed).state
    found = 0
    for fragment, pruned in zip(masks.fragments, masks.pruned, strict=True):
        size = fragment.holder.numel()
        values = [t for t in state[fragment.holder].values() if hasattr(t, "numel")]
        states = [t for t in values if t.numel() == size]
        assert len(states) == 2
        tensors = [fragment.holder, *states]
        found += sum(int(fragment.view(t)[pruned].count_nonzero()) for t in tensors)
    return found


def converted_loss(plan: Plan, weights: dict[str, Any]) -> dict[str, float]:
    """Held-out loss of trained weights, dense and as torchao stores them; on one rank's share."""
    import torch

    from outlay.runner.compress.qat import convert
    from outlay.runner.model import build_model, causal_lm_loss

    found = {}
    for kind in ("dense", "converted"):
        model: Any = build_model(plan.model, precision="fp32", attention="sdpa", seed=0)
        model.load_state_dict({name: torch.from_numpy(w) for name, w in weights.items()})
        model.eval()
        if kind == "converted":
            convert(model, plan.job.compress.qat)
        with torch.no_grad():
            parts = [micro_batches(plan, 900, rank)[0] for rank in range(plan.strategy.dp)]
            each = [float(causal_lm_loss(model(input_ids=ids).logits, ids)) for ids in parts]
        found[kind] = sum(each) / len(each)
    return found


def saved_bytes(plan: Plan) -> dict[str, int]:
    """What autograd keeps from one forward pass besides the weights: dense, ours, torchao's own."""
    import torch
    from ranks import global_batch

    from outlay.runner.compress import qat
    from outlay.runner.model import build_model, causal_lm_loss

    found = {}
    for kind in ("dense", "ours", "torchao"):
        model: Any = build_model(plan.model, precision="fp32", attention="sdpa", seed=0)
        if kind != "dense":
            qat.prepare(model, plan.job.compress.qat)
        if kind == "torchao":
            from torchao.quantization.qat import FakeQuantizedLinear

            for module in model.modules():
                if isinstance(module, FakeQuantizedLinear):
                    module.__class__ = FakeQuantizedLinear
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        kept: dict[int, int] = {}

        def keep(tensor: Any, own: set[int] = own, kept: dict[int, int] = kept) -> Any:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        ids = global_batch(0)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            loss = causal_lm_loss(model(input_ids=ids).logits, ids)
        found[kind] = sum(kept.values())
        loss.backward()  # else the graph and the hooks keep each other, out of gc's sight
    return found


def select_in_pieces(seed: int, together: bool) -> dict[str, Any]:
    """`smallest` over weights that lie in pieces on two ranks, and what sorting them whole chooses."""
    import torch

    from outlay.runner.compress.select import Piece, smallest

    made = torch.Generator().manual_seed(seed)
    rank = torch.distributed.get_rank()
    sizes = [int(n) for n in torch.randint(1, 300, (4,), generator=made)]
    weights = [torch.randn(n, generator=made) for n in sizes]
    if seed % 2:  # many equal magnitudes, zeros among them
        weights = [(2 * w).round() / 2 for w in weights]
    units = [0, 0, 0, 0] if together else [0, 1, 2, 3]
    wanted = [sum(sizes) * 2 // 3] if together else [n // 2 for n in sizes]
    pieces, of_piece, where = [], [], []
    for index, weight in enumerate(weights):
        edge = sizes[index] // 3
        for owner, (start, stop) in enumerate(((0, edge), (edge, sizes[index]))):
            of_piece.append(units[index])
            if owner == rank:
                pruned = torch.zeros(stop - start, dtype=torch.bool)
                pruned[: (stop - start) // 4] = True
                mine = weight[start:stop].masked_fill(pruned, 0)
                piece = Piece(order=len(of_piece) - 1, counts=True, values=mine, pruned=pruned)
                pieces.append(piece)
                where.append((index, start))
    chosen = smallest(pieces, of_piece, wanted, torch.device("cpu"))
    kept = all(bool(c[p.pruned].all()) for c, p in zip(chosen, pieces, strict=True))
    return {
        "kept": kept,
        "wanted": wanted,
        "units": units,
        "weights": [w.abs().tolist() for w in weights],
        "pieces": [
            (index, start, c.tolist(), p.pruned.tolist())
            for (index, start), c, p in zip(where, chosen, pieces, strict=True)
        ],
    }

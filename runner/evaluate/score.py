"""Losses and speeds of one loaded model."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

NEW_TOKENS = 16
"""Tokens that are generated to time one."""
PROMPT_TOKENS = 16
"""What they follow."""
BESIDE = ("_scale", "_shape", "_zero_point", "_packed")
"""Endings of what packers keep beside the weights."""

Floats = npt.NDArray[np.float64]


def token_losses(model: Any, tokens: npt.NDArray[np.int64], batch: int) -> Floats:
    """Cross entropy of each next token, nats: [n, s] tokens → [n, s-1]."""
    rows = []
    device = next(model.parameters()).device
    with torch.no_grad():
        for start in range(0, len(tokens), batch):
            ids = torch.from_numpy(tokens[start : start + batch]).to(device)
            logits = model(input_ids=ids).logits
            # one row at a time: fp32 logits of a wide vocabulary are the largest tensor there is
            for row, target in zip(logits, ids, strict=True):
                loss = functional.cross_entropy(row[:-1].float(), target[1:], reduction="none")
                rows.append(loss.double().cpu().numpy())
    return np.stack(rows)


def by_unit(losses: Floats, unit: npt.NDArray[np.int64]) -> tuple[Floats, Floats]:
    """(sum of losses, tokens) of each unit."""
    flat, size = unit.reshape(-1), int(unit.max()) + 1
    sums = np.bincount(flat, weights=losses.reshape(-1), minlength=size)
    return sums, np.bincount(flat, minlength=size).astype(np.float64)


def parameters_of(model: Any) -> tuple[int, int | None]:
    """(weights as the architecture counts them, how many are not zero); the second is null where
    packed weights cannot be counted."""
    total, nonzero = 0, 0
    known = True
    own = {id(p): p for name, p in model.named_parameters() if not name.endswith(BESIDE)}
    for tensor in own.values():
        total += tensor.numel()
        if type(tensor.data) is torch.Tensor:
            nonzero += int(torch.count_nonzero(tensor))
        else:
            known = False
    return total, nonzero if known else None


def timed(act: Callable[[], object], device: torch.device) -> float:
    """Wall time of one call; seconds."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    began_s = time.perf_counter()
    act()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began_s


def speed_acts(
    model: Any, tokens: npt.NDArray[np.int64], batch: int
) -> dict[str, Callable[[], object]]:
    """What is timed: one window alone, a batch of windows, and generating NEW_TOKENS."""
    device = next(model.parameters()).device
    many = torch.from_numpy(tokens[np.arange(batch) % len(tokens)]).to(device)
    one, prompt = many[:1], many[:1, :PROMPT_TOKENS]
    mask = torch.ones_like(prompt)

    def forward(ids: torch.Tensor) -> object:
        with torch.no_grad():
            return model(input_ids=ids, use_cache=False).logits

    def generate() -> object:
        return model.generate(
            prompt, attention_mask=mask, do_sample=False, pad_token_id=0,
            max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS,
        )  # fmt: skip

    return {"window": lambda: forward(one), "batch": lambda: forward(many), "generate": generate}

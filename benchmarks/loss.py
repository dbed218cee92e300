"""Memory and time of head and loss in their three forms, each in a process of its own.

    python -m benchmarks.loss [TOKENS VOCAB HIDDEN]

Memory: VmHWM after clear_refs less the resident bytes before, with malloc set as the runner's memory
measurement sets it; beside it what the planner's formula says (`logits_bytes_per_token`). The gradient of
the head is alive in every form when the peak comes or right after; it is taken off. Time: median of five.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

FORMS = ("plain", "fused", "chunked")


def _status_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def _measure(how: str, dtype: str, tokens: int, vocab: int, hidden: int) -> dict[str, float]:
    import torch

    from outlay.runner.loss import WHOLE, Finish, chunked_loss

    torch.set_num_threads(1)
    kind = getattr(torch, dtype)
    states = torch.randn(1, tokens, hidden).to(kind).requires_grad_()
    head = (torch.randn(vocab, hidden) * 0.02).to(kind).requires_grad_()
    ids = torch.randint(0, vocab, (1, tokens))

    def once() -> None:
        if how == "chunked":
            loss = chunked_loss(states, head, None, ids, Finish())
        else:
            loss = WHOLE[how](torch.nn.functional.linear(states, head), ids)
        loss.backward()
        states.grad = head.grad = None

    once()
    before = _status_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    once()
    peak = _status_bytes("VmHWM") - before
    took = []
    for _ in range(5):
        began_s = time.perf_counter()
        once()
        took.append(time.perf_counter() - began_s)
    gradients = (states.numel() + head.numel()) * states.element_size()
    return {"bytes": peak - gradients, "s": statistics.median(took)}


def main() -> None:
    from outlay.planner.estimate.activations import logits_bytes_per_token
    from outlay.planner.spec.families import spec_from_config

    if sys.argv[1:2] == ["--one"]:
        how, dtype, *sizes = sys.argv[2:]
        print(json.dumps(_measure(how, dtype, *(int(n) for n in sizes))))
        return
    tokens, vocab, hidden = (int(n) for n in sys.argv[1:4] or (2048, 32_000, 512))
    config = {
        "model_type": "llama", "vocab_size": vocab, "hidden_size": hidden, "num_attention_heads": 8,
        "intermediate_size": 4 * hidden, "num_hidden_layers": 1,
    }  # fmt: skip
    spec = spec_from_config(config, name="any", source="benchmark")
    env = {
        **os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    print(f"{tokens} tokens, vocabulary {vocab}, hidden {hidden}, one thread")
    for dtype, width in (("float32", 4), ("bfloat16", 2)):
        for how in FORMS:
            command = [sys.executable, "-m", "benchmarks.loss", "--one", how, dtype]
            command += [str(n) for n in (tokens, vocab, hidden)]
            out = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
            found = json.loads(out.stdout)
            _, peak = logits_bytes_per_token(spec, width, loss=how, implementation="runner")
            print(
                f"{dtype:8}  {how:8} measured {found['bytes'] / 2**20:7.0f} MiB, "
                f"planner {peak * tokens / 2**20:7.0f} MiB, {found['s']:.2f} s"
            )


if __name__ == "__main__":
    main()

"""Rates of this machine (`outlay probe --measure`): what one rank does while all ranks work.

`measure_rates` starts as many processes as a plan would have ranks, each a copy of this module with
`--worker`. They meet through a file, then time matrix products, memory traffic and all-reduces
together, so that shared memory and links are shared as they are in training. The slowest rank is
reported: it sets the pace of a step.

The CPU path (gloo) is measured in the tests. The NVIDIA path (nccl, CUDA events, host copies) is
written against the same interface and has not been run on a GPU yet.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal

from outlay.planner.probe import probe_host
from outlay.planner.spec.cluster import Host, Rates
from outlay.profiles.errors import MissingExtra, OutlayError, UsageError
from outlay.profiles.units import KIB, MIB

Device = Literal["auto", "cpu", "cuda"]

PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
GEMM_SIZES = {"cpu": (256, 512, 1024, 2048), "cuda": (1024, 2048, 4096, 8192)}
"""Edges of square products: from a small model's layer to a size that no cache or launch hides."""
MESSAGES_BYTES = (4 * KIB, 32 * KIB, 256 * KIB, 2 * MIB, 16 * MIB, 64 * MIB)
STREAM_BYTES = {"cpu": 128 * MIB, "cuda": 1024 * MIB}
"""Least array of the memory test; on CPU twice the last-level cache where that is more."""
COPY_BYTES = 256 * MIB
RAM_SHARE = 16
"""A rank's array of the memory test takes at most this part (one in so many) of its free memory."""
LIMIT_S = 300.0
"""Beyond the time that the measurements themselves ask for: imports, meeting, a loaded machine."""
TAIL_LINES = 15


def measure_rates(
    ranks: int,
    *,
    threads_per_rank: int | None = None,
    precisions: tuple[str, ...] = ("fp32", "bf16"),
    seconds_each: float = 0.5,
    device: Device = "auto",
) -> Rates:
    """Rates of one rank while `ranks` work at once. `seconds_each`: about how long a figure takes.

    `auto` measures GPUs where torch sees any. Raises OutlayError if a rank dies or hangs.
    """
    _check(ranks, threads_per_rank, precisions, seconds_each)
    host = probe_host(Path.cwd())
    threads = threads_per_rank or max(1, host.cores // ranks)
    with tempfile.TemporaryDirectory(prefix="outlay-rates-") as name:
        folder = Path(name)
        task = {
            "ranks": ranks,
            "threads": threads,
            "precisions": precisions,
            "seconds_each": seconds_each,
            "device": device,
            "folder": name,
            "gemm_sizes": GEMM_SIZES,
            "messages_bytes": MESSAGES_BYTES,
            "stream_bytes": _stream_bytes(host.available_bytes // ranks),
        }
        _run_all(folder, task, limit_s=LIMIT_S + 40 * seconds_each)
        found = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks)]
    return _combine(found, ranks, threads, host)


def _check(
    ranks: int, threads: int | None, precisions: tuple[str, ...], seconds_each: float
) -> None:
    if ranks < 1:
        raise UsageError(f"{ranks} ranks cannot be measured", do="ask for at least one")
    if threads is not None and threads < 1:
        raise UsageError(f"{threads} threads a rank cannot be meant")
    if not 0 < seconds_each < math.inf:
        raise UsageError(f"{seconds_each} seconds for each figure cannot be meant")
    for precision in precisions:
        if precision not in PRECISIONS:
            known = ", ".join(PRECISIONS)
            raise UsageError(f"the rate of {precision!r} cannot be measured", do=f"use {known}")
    if not precisions:
        raise UsageError("no precision to measure", do=f"use some of {', '.join(PRECISIONS)}")
    if importlib.util.find_spec("torch") is None:
        raise MissingExtra("torch", "run")


def _stream_bytes(free_bytes: int) -> dict[str, int]:
    """Size of an array of the memory test by device; a rank's share of the RAM bounds it on CPU."""
    on_cpu = max(STREAM_BYTES["cpu"], 2 * _last_level_cache_bytes())
    return STREAM_BYTES | {"cpu": min(on_cpu, free_bytes // RAM_SHARE)}


def _last_level_cache_bytes() -> int:
    """The largest cache that Linux names for the first core; 0 where it names none."""
    found = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text(encoding="utf-8").strip()
        factor = {"K": KIB, "M": MIB}.get(text[-1:], 1)
        found.append(int(text.rstrip("KM")) * factor)
    return max(found)


def _combine(found: list[dict[str, Any]], ranks: int, threads: int, host: Host) -> Rates:
    """The slowest rank's figure for each thing."""
    by_size: dict[tuple[str, int], float] = {}
    for result in found:
        for precision, size, rate in result["gemm"]:
            key = (precision, size)
            by_size[key] = min(rate, by_size.get(key, math.inf))
    largest = {precision: rate for (precision, _), rate in sorted(by_size.items())}
    messages = [size for size, _ in found[0]["all_reduce"]]
    slowest = [max(r["all_reduce"][i][1] for r in found) for i in range(len(messages))]
    copies = {
        kind: min(r["copies"][kind] for r in found) if found[0]["copies"] else None
        for kind in ("pinned", "pageable")
    }
    what = found[0]["device_name"] or host.cpu_model
    return Rates(
        ranks=ranks,
        threads_per_rank=threads,
        gemm_flops=largest,
        memory_bytes_per_s=min(result["memory"] for result in found),
        all_reduce=tuple(zip(messages, slowest, strict=True)),
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
        source=f"outlay probe --measure: {what}, torch {found[0]['torch']}, {found[0]['backend']}",
        gemm_by_size=tuple((p, size, rate) for (p, size), rate in by_size.items()),
        pinned_copy_bytes_per_s=copies["pinned"],
        pageable_copy_bytes_per_s=copies["pageable"],
    )


# Starting and watching the ranks.


def _run_all(folder: Path, task: dict[str, Any], *, limit_s: float) -> None:
    """Start the ranks and wait for all; the first that fails ends the others."""
    ranks = []
    try:
        for rank in range(task["ranks"]):
            with (folder / f"{rank}.err").open("wb") as errors:
                ranks.append(
                    subprocess.Popen(
                        _command(rank, task),
                        env=_environment(rank, task),
                        stdin=subprocess.DEVNULL,
                        stdout=errors,
                        stderr=errors,
                    )
                )
        _wait(ranks, folder, limit_s)
    finally:
        for process in ranks:
            if process.poll() is None:
                process.kill()
            process.wait()


def _command(rank: int, task: dict[str, Any]) -> list[str]:
    # -P: the working folder is a person's and may hold a file called torch.py.
    worker = [sys.executable, "-P", "-m", "outlay.runner.measure_rates", "--worker"]
    return [*worker, str(rank), json.dumps(task)]


def _environment(rank: int, task: dict[str, Any]) -> dict[str, str]:
    """Threads are fixed before torch loads. Local ranks meet on the loopback interface, because
    gloo otherwise looks up the host's name, which containers often cannot resolve."""
    environment = dict(os.environ, LOCAL_RANK=str(rank))
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        environment[name] = str(task["threads"])
    interfaces = {name for _, name in socket.if_nameindex()}
    loopback = next((name for name in ("lo", "lo0") if name in interfaces), None)
    if loopback:
        environment.setdefault("GLOO_SOCKET_IFNAME", loopback)
    return environment


def _wait(ranks: list[subprocess.Popen[bytes]], folder: Path, limit_s: float) -> None:
    end = time.monotonic() + limit_s
    while True:
        codes = [process.poll() for process in ranks]
        for rank, code in enumerate(codes):
            if code:
                raise _died(rank, code, folder)
        if all(code == 0 for code in codes):
            return
        if time.monotonic() > end:
            waiting = [str(rank) for rank, code in enumerate(codes) if code is None]
            raise OutlayError(
                f"measuring took over {limit_s:.0f} s; rank {', '.join(waiting)} did not end",
                why=_tail(folder / f"{waiting[0]}.err") or "it wrote nothing",
            )
        time.sleep(0.05)


def _died(rank: int, code: int, folder: Path) -> OutlayError:
    how = f"was ended by signal {-code}" if code < 0 else f"ended with code {code}"
    hint = "signal 9 is most often the system's want of memory" if code == -9 else ""
    return OutlayError(
        f"rank {rank} of the measurement {how}",
        why=_tail(folder / f"{rank}.err") or "it wrote nothing on stderr",
        do=hint,
    )


def _tail(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n       ".join(lines[-TAIL_LINES:])


# What a rank does.


class _Timer:
    """Times an operation on this rank's device while the other ranks do the same."""

    def __init__(self, device: Any, seconds: float) -> None:
        self.device, self.seconds = device, seconds

    def slowest(self, value: float) -> float:
        """The greatest value over the ranks: what all must agree on to stay in step."""
        import torch
        import torch.distributed as dist

        shared = torch.tensor([value], dtype=torch.float64, device=self.device)
        dist.all_reduce(shared, op=dist.ReduceOp.MAX)
        return float(shared.item())

    def median_s(self, operation: Callable[[], object]) -> float:
        """Median of as many runs as fit in the time, at least three; the first is thrown away."""
        self._times(operation, 1)
        guess_s = self.slowest(self._times(operation, 1)[0])
        # slowest() also lets nobody start before all are here.
        count = int(self.slowest(min(1000, max(3, self.seconds / max(guess_s, 1e-9)))))
        return statistics.median(self._times(operation, count))

    def _times(self, operation: Callable[[], object], count: int) -> list[float]:
        if self.device.type == "cuda":
            return self._times_cuda(operation, count)
        times = []
        for _ in range(count):
            start = time.perf_counter()
            operation()
            times.append(time.perf_counter() - start)
        return times

    def _times_cuda(self, operation: Callable[[], object], count: int) -> list[float]:
        """By CUDA events: the host only queues the work."""
        import torch

        events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
        events[0].record()
        for event in events[1:]:
            operation()
            event.record()
        torch.cuda.synchronize(self.device)
        return [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(events)]


def _worker(rank: int, task: dict[str, Any]) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(task["threads"])
    device = _device(task["device"], rank, task["ranks"])
    on_gpu = device.type == "cuda"
    if not on_gpu and "tf32" in task["precisions"]:
        raise SystemExit("tf32 is a mode of NVIDIA GPUs; it cannot be measured on the CPU")
    backend = "nccl" if on_gpu else "gloo"
    meeting = (Path(task["folder"]) / "meeting").as_uri()
    dist.init_process_group(
        backend,
        init_method=meeting,
        rank=rank,
        world_size=task["ranks"],
        device_id=device if on_gpu else None,
    )
    timer = _Timer(device, task["seconds_each"])
    sizes = task["gemm_sizes"][device.type]
    result = {
        "torch": torch.__version__,
        "backend": backend,
        "device_name": torch.cuda.get_device_name(device) if on_gpu else None,
        "gemm": [row for name in task["precisions"] for row in _gemm(timer, name, sizes)],
        "memory": _memory(timer, task["stream_bytes"][device.type]),
        "all_reduce": _all_reduce(timer, task["messages_bytes"]),
        "copies": _copies(timer) if on_gpu else None,
    }
    (Path(task["folder"]) / f"{rank}.json").write_text(json.dumps(result), encoding="utf-8")
    dist.destroy_process_group()


def _device(wanted: Device, rank: int, ranks: int) -> Any:
    import torch

    count = torch.cuda.device_count() if wanted != "cpu" else 0
    if wanted == "cpu" or (wanted == "auto" and not count):
        return torch.device("cpu")
    if count < ranks:
        raise SystemExit(f"{ranks} ranks need {ranks} GPUs; torch sees {count}")
    torch.cuda.set_device(rank)
    return torch.device("cuda", rank)


def _gemm(timer: _Timer, precision: str, sizes: list[int]) -> list[tuple[str, int, float]]:
    """Rates of the three products of an n×n linear layer on n tokens, 2n³ FLOP each: output,
    input gradient, weight gradient. Up to the size that fills the time once.

    Deviation: a model's products are oblong; near squares of the same area they run alike.
    """
    import torch

    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    rows: list[tuple[str, int, float]] = []
    layer_s = 0.0
    for size in sizes:
        if rows and timer.slowest(layer_s) * (size / rows[-1][1]) ** 3 > timer.seconds:
            break
        tokens, weight = (torch.randn(size, size, device=timer.device).to(dtype) for _ in range(2))
        out = torch.empty_like(tokens)

        def layer(x: Any = tokens, w: Any = weight, out: Any = out) -> None:
            torch.mm(x, w.t(), out=out)
            torch.mm(x, w, out=out)
            torch.mm(x.t(), w, out=out)

        layer_s = timer.median_s(layer)
        rows.append((precision, size, 6 * size**3 / layer_s))
    return rows


def _memory(timer: _Timer, size_bytes: int) -> float:
    """Bytes read and written a second: copy and sum of arrays that no cache holds (STREAM)."""
    import torch

    left = torch.ones(size_bytes // 4, device=timer.device)
    right = torch.ones_like(left)
    copy_s = timer.median_s(lambda: right.copy_(left))
    sum_s = timer.median_s(lambda: right.add_(left))
    array_bytes = left.numel() * 4
    return (2 * array_bytes + 3 * array_bytes) / (copy_s + sum_s)


def _all_reduce(timer: _Timer, messages_bytes: list[int]) -> list[tuple[int, float]]:
    """(bytes, seconds) of a sum over all ranks in fp32; nothing for a rank that is alone."""
    import torch
    import torch.distributed as dist

    rows: list[tuple[int, float]] = []
    if dist.get_world_size() == 1:
        return rows
    for size_bytes in messages_bytes:
        message = torch.zeros(size_bytes // 4, device=timer.device)
        rows.append((size_bytes, timer.median_s(partial(dist.all_reduce, message))))
    return rows


def _copies(timer: _Timer) -> dict[str, float]:
    """Host to GPU, all ranks at once: page-locked memory is read by the GPU, other is staged."""
    import torch

    there = torch.empty(COPY_BYTES, dtype=torch.uint8, device=timer.device)
    pageable = torch.ones(COPY_BYTES, dtype=torch.uint8)
    pinned = pageable.pin_memory()
    return {
        "pinned": COPY_BYTES / timer.median_s(lambda: there.copy_(pinned, non_blocking=True)),
        "pageable": COPY_BYTES / timer.median_s(lambda: there.copy_(pageable)),
    }


if __name__ == "__main__":
    _worker(int(sys.argv[2]), json.loads(sys.argv[3]))

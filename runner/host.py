"""What a rank process needs from its host before DeepSpeed is imported: variables, locks, compiled operators.

DeepSpeed compiles C++ operators at first use. A process killed meanwhile leaves a lock file, and
every later start then waits for it without a word. So operators are compiled once, by `build_ops`,
before any rank starts, in a folder of our own whose dead locks `prepare_environment` removes; and
those that a CPU run does not need are not compiled at all (`tame_deepspeed`).
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from outlay.profiles.errors import OutlayError

AcceleratorKind = Literal["cpu", "cuda"]

EXTENSIONS_VARIABLE = "TORCH_EXTENSIONS_DIR"
_TAMED_DEEPSPEED = ((0, 19), (0, 20))
"""From, below: the versions whose operator table is known to look as `tame_deepspeed` expects."""

_QUIET = {
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}


def default_extensions_dir() -> Path:
    """Where compiled operators are kept: `$XDG_CACHE_HOME/outlay/extensions`, else under `~/.cache`."""
    base = os.environ.get("XDG_CACHE_HOME")
    root = Path(base) if base else Path.home() / ".cache"
    return root / "outlay" / "extensions"


def prepare_environment(
    ranks: int, threads_per_rank: int, accelerator: AcceleratorKind, extensions_dir: Path
) -> dict[str, str]:
    """The whole environment for a rank process: this process's, with what a rank needs on top.

    `ranks` is the number of ranks on this host. Makes the extensions folder and removes the locks
    in it that no living process can hold.
    """
    extensions_dir.mkdir(parents=True, exist_ok=True)
    remove_dead_locks(extensions_dir)
    environment = {
        **os.environ,
        **_QUIET,
        "DS_ACCELERATOR": accelerator,
        "OMP_NUM_THREADS": str(threads_per_rank),
        "MKL_NUM_THREADS": str(threads_per_rank),
        EXTENSIONS_VARIABLE: str(extensions_dir),
        "PYTHONUNBUFFERED": "1",
    }
    if accelerator == "cpu":
        # Without it DeepSpeed counts NUMA nodes and takes them for the accelerators of this host.
        environment["LOCAL_SIZE"] = str(ranks)
    return environment


def remove_dead_locks(extensions_dir: Path) -> list[Path]:
    """Remove the lock files that no living process can hold; returns them.

    Only a process that has this very extensions folder in its environment and that started before
    the lock was made can hold it.
    """
    locks = sorted(extensions_dir.rglob("lock"))
    if not locks:
        return []
    oldest_user = min(_start_times_of_users(extensions_dir), default=None)
    removed = []
    for lock in locks:
        try:
            made = lock.stat().st_mtime
            if oldest_user is None or oldest_user > made:
                lock.unlink()
                removed.append(lock)
        except FileNotFoundError:
            continue
    return removed


def _start_times_of_users(extensions_dir: Path) -> list[float]:
    """Start times (seconds since the epoch) of the other processes that use this folder."""
    import psutil

    starts = []
    for process in psutil.process_iter():
        try:
            if process.pid == os.getpid():
                continue
            folder = process.environ().get(EXTENSIONS_VARIABLE)
            if folder and Path(folder) == extensions_dir:
                starts.append(process.create_time())
        except (psutil.Error, OSError):
            continue
    return starts


def tame_deepspeed() -> None:
    """Inside a rank, before the process group: no shared-memory kernel on CPU, so no compiler.

    Without it the first start compiles `deepspeed_shm_comm` for about 50 s, and raises where there
    is no C++ compiler; plain gloo gives the same loss in about the same step time.
    """
    import logging
    import warnings

    import deepspeed
    from deepspeed.accelerator import get_accelerator

    # transformers imports torchao where it is installed, which lists kernels that do not matter here
    for name in ("DeepSpeed", "torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # DeepSpeed calls torch's collectives by names that torch is about to drop.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\..*")
    version = tuple(int(part) for part in deepspeed.__version__.split("+")[0].split(".")[:2])
    first, beyond = _TAMED_DEEPSPEED
    if get_accelerator().device_name() == "cpu" and first <= version < beyond:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def ops_needed(config: dict[str, Any]) -> tuple[str, ...]:
    """Names of the operators that DeepSpeed compiles for this configuration, for `build_ops`."""
    zero = config.get("zero_optimization", {})
    devices = {
        zero.get(key, {}).get("device", "none") for key in ("offload_optimizer", "offload_param")
    }
    optimizer = config.get("optimizer", {})
    adam = optimizer.get("type", "").lower() in ("adam", "adamw")
    native = adam and not optimizer.get("params", {}).get("torch_adam", False)
    names = []
    if native and zero.get("offload_optimizer", {}).get("device", "none") != "none":
        names.append("CPUAdamBuilder")
    elif native:
        names.append("FusedAdamBuilder")
    if "nvme" in devices:
        names.append("AsyncIOBuilder")
    return tuple(names)


def build_ops(names: Sequence[str], environment: dict[str, str]) -> None:
    """Compile these operators once, in a process of its own and with no time limit.

    `environment` is what `prepare_environment` returned. Already compiled ones only load.
    """
    if not names:
        return
    program = (
        "import sys, deepspeed\n"
        "from deepspeed.accelerator import get_accelerator\n"
        "for name in sys.argv[1:]:\n"
        "    get_accelerator().create_op_builder(name).load(verbose=False)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *names], env=environment, capture_output=True, text=True
    )
    if done.returncode != 0:
        tail = "\n".join((done.stdout + done.stderr).strip().splitlines()[-12:])
        raise OutlayError(
            f"DeepSpeed could not compile {', '.join(names)}",
            where=environment[EXTENSIONS_VARIABLE],
            why=tail,
            do="install a C++ compiler (and libaio for NVMe offload), or plan without offload",
        )

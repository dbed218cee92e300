"""What a plan's methods need to be installed, looked at before any rank starts."""

from __future__ import annotations

import importlib.util
import os
import shutil

from outlay.planner.spec.plan import Plan
from outlay.profiles.errors import MissingExtra, UsageError


def check_needs(plan: Plan) -> None:
    """Raise MissingExtra for a package, UsageError for a compiler, without importing anything large."""
    job = plan.job
    quantized = job.finetune is not None and job.finetune.quant != "none"
    if job.finetune is not None:
        _require("peft", "run")
    if quantized or job.optimizer.name == "adamw_8bit":
        _require("bitsandbytes", "quantized")
    compiler = os.environ.get("CXX", "g++")
    if job.compile and plan.cluster.kind == "cpu" and shutil.which(compiler) is None:
        raise UsageError(
            f"torch.compile needs the C++ compiler {compiler} on CPU, and there is none",
            do="install it (Debian: g++), or plan with --no-compile",
        )


def _require(package: str, extra: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise MissingExtra(package, extra)

"""What `outlay emit` writes trains on two CPU processes, started by its own command."""

from __future__ import annotations

import ast
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from outlay.planner.planning import make_plan
from outlay.planner.spec.cluster import Cluster
from outlay.planner.spec.files import to_yaml
from outlay.planner.spec.job import Job
from outlay.planner.spec.model import ModelSpec
from outlay.runner.cli import cli

IN_CI = {("trainer", "launch.sh", 2)}
CASES = [
    *(("trainer", "launch.sh", zero) for zero in range(4)),
    *(("accelerate", "launch.sh", zero) for zero in range(4)),
    ("launch", "torchrun.sh", 1),
    ("launch", "deepspeed.sh", 1),
]


def _started(folder: Path, script: str) -> str:
    """What the folder's command prints, from its start to its end."""
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    process = subprocess.Popen(
        ["sh", script, ast.__file__],
        cwd=folder,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail("no end in 240 s: " + process.communicate()[0][-2000:])
    assert process.returncode == 0, output[-4000:]
    return output


@pytest.mark.processes
@pytest.mark.parametrize(
    ("target", "script", "zero"),
    [pytest.param(*c, marks=[] if c in IN_CI else [pytest.mark.long]) for c in CASES],
)
def test_the_emitted_folder_takes_three_steps(
    target: str,
    script: str,
    zero: int,
    tmp_path: Path,
    tiny_config: Path,
    tiny_spec: ModelSpec,
    tiny_job: Job,
    cpu_cluster: Cluster,
) -> None:
    pytest.importorskip("deepspeed")
    pytest.importorskip("accelerate")
    job = dataclasses.replace(tiny_job, steps=3)
    config = json.loads(tiny_config.read_text())
    plan = make_plan(tiny_spec, config, job, cpu_cluster, fixed={"zero": zero, "dp": 2})
    (tmp_path / "plan.yaml").write_text(to_yaml(plan))
    folder = tmp_path / "out"
    written = CliRunner().invoke(
        cli, ["emit", target, str(tmp_path / "plan.yaml"), "--out", str(folder)]
    )
    assert written.exit_code == 0, written.output
    assert script in written.output
    output = _started(folder, script)
    losses = [float(x) for x in re.findall(r"(?:'loss': '?|step \d+ loss )([0-9.]+)", output)]
    assert len(losses) == 3, output[-4000:]
    assert all(4 < loss < 8 for loss in losses)  # ln 512 = 6.2 at random weights
    assert (folder / "out/model.safetensors").stat().st_size > 100_000

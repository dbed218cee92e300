"""Runs that are really launched: to the end, to the budget, through kills; and what is refused."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import ranks

from outlay.planner.rules import VERSIONS
from outlay.planner.spec.cluster import Gpu, Host
from outlay.planner.spec.files import parse, read_mapping, to_yaml
from outlay.planner.spec.job import Budget, Data, Schedule
from outlay.planner.spec.measurement import Measurement, Outcome
from outlay.planner.spec.plan import Plan
from outlay.profiles.errors import CheckpointError, MissingExtra, NotFeasible, UsageError
from outlay.profiles.loader import Accelerator
from outlay.runner import fit, launch
from outlay.runner.data.corpus import standard_library_files
from outlay.runner.data.dataset import TokenDataset
from outlay.runner.data.prepare import prepare
from outlay.runner.events import EventLog, read_events
from outlay.runner.folder import Attempt, Attempts, RunFolder
from outlay.runner.launch import run_plan
from outlay.runner.memory_probe import run_memory_probe

VOCAB = 400
STEPS = 300


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("corpus") / "data"
    files = [f for f in standard_library_files() if f.stat().st_size < 20_000]
    prepare(files, out, vocab_size=VOCAB, seed=0, max_bytes=600_000)
    return out


def small_plan(data: Path, *, price: float | None = 3.6, zero: int = 1, **job: Any) -> Plan:
    """Two ranks, about 0.1 M parameters, ten or twenty milliseconds a step."""
    plan = ranks.tiny_plan(
        config={"vocab_size": VOCAB},
        steps=job.pop("steps", STEPS),
        job={
            "data": Data(path=str(data)),
            "eval_sequences": 16,
            "schedule": Schedule(warmup_steps=5),
            **job,
        },
        zero=zero,
        grad_accum=2,
    )
    model = dataclasses.replace(plan.model, parameters=150_000)
    cluster = dataclasses.replace(plan.cluster, price_usd_per_h=price)
    return dataclasses.replace(plan, model=model, cluster=cluster)


SUPERVISOR = """
import sys
from pathlib import Path
from outlay.planner.spec.files import parse, read_mapping
from outlay.planner.spec.plan import Plan
from outlay.profiles.errors import OutlayError
from outlay.runner.budget import process_started_s
from outlay.runner.launch import run_plan
from outlay.runner.memory_probe import run_memory_probe

plan, folder, resume = sys.argv[1:]
try:
    outcome = run_plan(
        parse(Plan, read_mapping(plan), path=plan),
        Path(folder),
        resume=resume == "resume",
        started_s=process_started_s(),
    )
except OutlayError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
print(outcome.reason, file=sys.stderr)
sys.exit(outcome.exit_code)
"""


class Launched:
    """A supervisor as a process of its own."""

    def __init__(self, plan: Plan, folder: Path, how: str = "new") -> None:
        path = folder.with_name(f"{folder.name}-plan.yaml")
        path.write_text(to_yaml(plan))
        self.folder = RunFolder(folder)
        self.before = self._count()
        self.process = subprocess.Popen(
            [sys.executable, "-c", SUPERVISOR, str(path), str(folder), how],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def _count(self) -> int:
        return len(list(read_events(self.folder.events))) if self.folder.events.exists() else 0

    def steps(self) -> list[int]:
        """Steps done in this attempt."""
        if not self.folder.events.exists():
            return []
        events = list(read_events(self.folder.events))[self.before :]
        return [e.step for e in events if e.kind == "step" and e.step is not None]

    def until(self, step: int, timeout_s: float = 120.0) -> None:
        """Wait until so many steps of the run are done."""
        end = time.monotonic() + timeout_s
        while not any(done >= step for done in self.steps()):
            assert self.process.poll() is None, self.process.stderr.read()
            assert time.monotonic() < end, "the run did not come this far"
            time.sleep(0.05)

    def ranks(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def end(self, timeout_s: float = 120.0) -> tuple[int, str]:
        _, stderr = self.process.communicate(timeout=timeout_s)
        return self.process.returncode, stderr

    def outcome(self) -> Outcome:
        return read_outcome(self.folder)


def read_outcome(folder: RunFolder) -> Outcome:
    return parse(Outcome, read_mapping(folder.outcome), path=folder.outcome)


def gone(processes: list[psutil.Process], timeout_s: float = 10.0) -> bool:
    _, alive = psutil.wait_procs(processes, timeout=timeout_s)
    return not alive


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    outcome = run_plan(small_plan(data, eval_every=200, save_every=250), folder)
    assert outcome.exit_code == 0, outcome.reason
    return RunFolder(folder)


@pytest.mark.processes
def test_a_run_does_all_its_steps_and_leaves_what_it_should(whole: RunFolder, data: Path) -> None:
    outcome = read_outcome(whole)
    assert outcome.state == "done"
    assert outcome.steps == STEPS
    assert outcome.tokens == STEPS * ranks.GLOBAL_BATCH * ranks.SEQ_LEN
    assert outcome.cost_usd == pytest.approx(outcome.wall_s * 3.6 / 3600)
    assert outcome.heldout_loss < outcome.heldout_unigram
    events = list(read_events(whole.events))
    assert [e.step for e in events if e.kind == "step"] == list(range(1, STEPS + 1))
    assert [e.step for e in events if e.kind == "eval"] == [200, STEPS]
    assert [e.step for e in events if e.kind == "save"] == [250, STEPS]
    kinds = [e.kind for e in events if e.kind != "step"]
    assert kinds[:3] == ["start", "rank_ready", "rank_ready"]
    assert kinds[-4:] == ["save", "export", "eval", "end"]
    elapsed = [e.elapsed_s for e in events]
    assert elapsed[0] < elapsed[-1] <= outcome.wall_s + 1
    measured = parse(Measurement, read_mapping(whole.measurement), path=whole.measurement)
    assert (measured.steps_timed, measured.steps_left_out) == (STEPS - 3, 3)
    assert measured.step_low_s <= measured.step_s <= measured.step_high_s
    assert measured.tokens_per_s == pytest.approx(256 / measured.step_s)
    assert any(whole.tensorboard.iterdir())
    assert whole.read_plan() == small_plan(data, eval_every=200, save_every=250)
    assert whole.read_attempts().attempts[0].ended


@pytest.mark.processes
def test_the_export_is_the_model_that_was_evaluated(whole: RunFolder, data: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(whole.export).eval()
    dataset = TokenDataset(data, seq_len=ranks.SEQ_LEN, seed=7)
    batches = dataset.heldout_batches(0, dp_size=1, micro_batch=16, sequences=16)
    with torch.no_grad():
        losses = [model(input_ids=b, labels=b).loss for b in map(torch.from_numpy, batches)]
    loss = float(torch.stack(losses).mean())
    assert loss == pytest.approx(read_outcome(whole).heldout_loss, abs=1e-5)


@pytest.mark.processes
def test_killed_and_stopped_and_resumed_it_ends_as_if_nothing_had_been(
    whole: RunFolder, data: Path, tmp_path: Path
) -> None:
    """kill -9 of the supervisor, kill -9 of a rank, SIGTERM: then the same loss to the last bit."""
    plan = small_plan(data, eval_every=200, save_every=50)
    folder = tmp_path / "run"

    first = Launched(plan, folder)
    first.until(60)
    children = first.ranks()
    assert len(children) == 2
    first.process.kill()
    first.end()
    assert gone(children)

    second = Launched(plan, folder, "resume")
    second.until(110)
    children = second.ranks()
    victim = next(p for p in children if p.environ()["RANK"] == "1")
    os.kill(victim.pid, signal.SIGKILL)
    code, stderr = second.end()
    assert code == 1
    assert "rank 1 was killed by SIGKILL" in stderr
    assert gone(children)
    outcome = second.outcome()
    assert (outcome.state, outcome.exit_code) == ("failed", 1)
    assert min(second.steps()) == 51

    third = Launched(plan, folder, "resume")
    third.until(160)
    children = third.ranks()
    third.process.send_signal(signal.SIGTERM)
    code, stderr = third.end()
    assert code == 75, stderr
    assert gone(children)
    outcome = third.outcome()
    assert outcome.state == "stopped"
    assert outcome.checkpoint.endswith(f"{outcome.steps}")
    assert min(third.steps()) == 101

    fourth = Launched(plan, folder, "resume")
    code, stderr = fourth.end()
    assert code == 0, stderr
    assert fourth.steps()[0] == outcome.steps + 1
    undisturbed = read_outcome(whole)
    assert fourth.outcome().train_loss == undisturbed.train_loss
    assert fourth.outcome().heldout_loss == undisturbed.heldout_loss
    attempts = fourth.folder.read_attempts().attempts
    assert [a.ended for a in attempts] == [False, True, True, True]
    assert fourth.outcome().wall_s >= sum(a.elapsed_s for a in attempts) - 1


@pytest.mark.processes
def test_a_budget_is_kept_and_used(data: Path, tmp_path: Path) -> None:
    limit_s = 35.0
    budget = (Budget(kind="money", amount=3.6 * limit_s / 3600), Budget(kind="hours", amount=1.0))
    began = time.monotonic()
    run = Launched(small_plan(data, steps=1_000_000, budget=budget), tmp_path / "run")
    code, stderr = run.end()
    took_s = time.monotonic() - began
    assert code == 4, stderr
    outcome = run.outcome()
    assert outcome.state == "budget"
    assert outcome.cost_usd <= budget[0].amount
    assert took_s <= limit_s
    assert outcome.wall_s >= 0.9 * limit_s
    assert outcome.steps > 3
    assert outcome.checkpoint is not None
    assert outcome.heldout_loss is not None
    assert outcome.export is not None


def parameter_count(plan: Plan) -> int:
    from outlay.runner.model import skeleton

    return sum(
        p.numel() for p in skeleton(plan.model, precision="fp32", attention="sdpa").parameters()
    )


@pytest.mark.processes
def test_memory_is_measured_by_rank_and_counts_the_optimizer() -> None:
    """About 9 M parameters, fp32, no ZeRO: weights, gradients and two moments, 16 bytes each."""
    config = {"vocab_size": 2048, "hidden_size": 512, "intermediate_size": 1024}
    plan = ranks.tiny_plan(config=config, zero=0, micro_batch=1, grad_accum=1)
    model = parameter_count(plan)
    readings = run_memory_probe(plan, steps=2)
    assert [r.rank for r in readings] == [0, 1]
    for reading in readings:
        assert reading.kind == "host_growth"
        assert reading.before_bytes > 100 * 2**20
        assert 16 * model <= reading.growth_bytes <= 1.5 * 16 * model


# What is refused before anything is started.


def test_a_budget_that_cannot_even_start_is_refused(data: Path, tmp_path: Path) -> None:
    plan = small_plan(data, budget=(Budget(kind="hours", amount=1 / 3600),))
    with pytest.raises(NotFeasible, match="too small to train anything"):
        run_plan(plan, tmp_path / "run")
    assert not (tmp_path / "run" / "plan.yaml").exists()


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (Budget(kind="money", amount=1.0), "--price-usd-per-h"),
        (Budget(kind="energy", amount=1.0), "needs a meter of energy"),
    ],
)
def test_a_budget_that_cannot_be_kept_is_refused(data, tmp_path, budget, message) -> None:
    with pytest.raises(UsageError, match=message):
        run_plan(small_plan(data, price=None, budget=(budget,)), tmp_path / "run")


def test_a_folder_with_other_things_is_not_used(data: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(UsageError, match="not empty, and not a run"):
        run_plan(small_plan(data), tmp_path)
    with pytest.raises(UsageError, match="not the folder of a run"):
        run_plan(small_plan(data), tmp_path, resume=True)


@pytest.fixture
def old_run(data: Path, tmp_path: Path) -> RunFolder:
    """A run that ended before its first checkpoint."""
    folder = RunFolder(tmp_path / "old")
    folder.write_plan(small_plan(data))
    folder.write_attempts(
        Attempts(attempts=(Attempt(started_at="2026-01-01T00:00:00Z", elapsed_s=9.0, ended=True),))
    )
    return folder


def test_a_run_is_neither_begun_twice_nor_resumed_from_nothing(
    data: Path, old_run: RunFolder
) -> None:
    with pytest.raises(UsageError, match="already holds a run"):
        run_plan(small_plan(data), old_run.root)
    with pytest.raises(CheckpointError, match="no checkpoint that verifies"):
        run_plan(small_plan(data), old_run.root, resume=True)


def test_a_run_is_not_resumed_with_another_plan(data: Path, old_run: RunFolder) -> None:
    with pytest.raises(UsageError, match=r"(?s)job\.seq_len: 32 → 16"):
        plan = small_plan(data)
        other = dataclasses.replace(plan, job=dataclasses.replace(plan.job, seq_len=16))
        run_plan(other, old_run.root, resume=True)


def test_a_run_whose_budget_is_spent_is_refused(data: Path, old_run: RunFolder) -> None:
    plan = small_plan(data, budget=(Budget(kind="hours", amount=10 / 3600),))
    with pytest.raises(NotFeasible, match=r"9\d\d ms of it are left"):
        run_plan(plan, old_run.root, resume=True, started_s=time.monotonic())


def test_a_run_that_is_alive_is_left_alone(data: Path, old_run: RunFolder) -> None:
    code = (
        "import sys, time; from pathlib import Path; from outlay.runner.folder import RunFolder\n"
        "with RunFolder(Path(sys.argv[1])).locked():\n    print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(old_run.root)], stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UsageError, match=rf"(?s)is alive.*process {holder.pid}"):
            run_plan(small_plan(data), old_run.root, resume=True)
        holder.kill()


def test_data_that_the_model_does_not_know_is_refused(data: Path, tmp_path: Path) -> None:
    plan = small_plan(data)
    model = dataclasses.replace(plan.model, config={**plan.model.config, "vocab_size": 300})
    with pytest.raises(UsageError, match=r"(?s)vocabulary 400, the model's 300"):
        run_plan(dataclasses.replace(plan, model=model), tmp_path / "run")


def test_text_is_prepared_in_the_run_once(data: Path, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.mkdir()
    for path in standard_library_files()[:30]:
        (text / path.name).write_bytes(path.read_bytes())
    plan = small_plan(data)
    job = dataclasses.replace(plan.job, data=Data(path=str(text), format="text"))
    plan, folder = dataclasses.replace(plan, job=job), RunFolder(tmp_path / "run")
    launch._prepare_data(plan, folder)
    made = TokenDataset(folder.data, seq_len=32, seed=0).info
    assert made.vocab_size == VOCAB
    shutil.rmtree(text)
    launch._prepare_data(plan, folder)
    weights = dataclasses.replace(plan.model, weights="somewhere")
    with pytest.raises(UsageError, match="needs their tokenizer"):
        launch._prepare_data(
            dataclasses.replace(plan, model=weights), RunFolder(tmp_path / "other")
        )


def _host(**changes: Any) -> Host:
    facts = {
        "cpu_model": "any",
        "cores": 4,
        "sockets": 1,
        "ram_bytes": 2**33,
        "available_bytes": 2**33,
        "disk_free_bytes": 2**40,
    }
    return Host(**{**facts, **changes})


def _gpu(free_bytes: int) -> Gpu:
    return Gpu(
        index=0,
        name="NVIDIA H100 80GB HBM3",
        uuid="GPU-0",
        total_bytes=80 * 2**30,
        free_bytes=free_bytes,
        power_limit_w=700.0,
        pcie_generation=5,
        pcie_width=16,
        nvlink_peers=(),
    )


def _on(plan: Plan, kind: str, **changes: Any) -> Plan:
    accelerator = Accelerator(name=kind, title=kind, vendor="any", kind=kind)
    return dataclasses.replace(
        plan, cluster=dataclasses.replace(plan.cluster, accelerator=accelerator, **changes)
    )


@pytest.mark.parametrize(
    ("kind", "here", "low_gib", "message"),
    [
        ("cpu", {"host": _host(cores=1)}, None, r"2 ranks, this machine has 1 usable cores"),
        ("cpu", {"host": _host()}, 5, r"(?s)2 ranks of at least 5\.00 GiB are 10\.00 GiB, 8\.00"),
        ("gpu", {"gpus": (_gpu(2**36),)}, None, r"needs 2 GPUs, this machine has 1"),
        ("gpu", {"gpus": (_gpu(2**30),) * 2}, 5, r"(?s)GPU 0.*at least 5\.00 GiB.*1\.00 GiB of 80"),
    ],
)
def test_a_plan_that_does_not_fit_this_machine_is_refused(
    data, kind, here, low_gib, message
) -> None:
    plan = _on(small_plan(data), kind, **here)
    if low_gib is not None:
        plan = dataclasses.replace(plan, estimate={"memory": {"low_bytes": low_gib * 2**30}})
    with pytest.raises(NotFeasible, match=message):
        fit.check_machine(plan, plan.cluster)


def test_a_plan_for_gpus_is_refused_where_there_are_none(data: Path, tmp_path: Path) -> None:
    plan = small_plan(data)
    with pytest.raises(NotFeasible, match="plan is for gpu, this machine has cpu"):
        run_plan(_on(plan, "gpu"), tmp_path / "run", here=plan.cluster)


@pytest.mark.parametrize("found", ["0.18.4", "0.19.4", "1.19.0", "0.20.0+abc"])
def test_another_deepspeed_is_refused(monkeypatch, found) -> None:
    monkeypatch.setattr(fit, "version", lambda name: found if name == "deepspeed" else "1.0")
    with pytest.raises(UsageError, match=r"is installed, and this runner knows >=0\.19\.8"):
        fit.check_software()


def test_the_releases_that_are_run_are_those_of_the_rules() -> None:
    first, beyond = (".".join(map(str, bound)) for bound in fit.DEEPSPEED)
    assert f">={first},<{beyond}" == VERSIONS


def test_a_missing_package_says_how_to_install_it(monkeypatch) -> None:
    def version(name: str) -> str:
        if name == "safetensors":
            raise fit.PackageNotFoundError(name)
        return "0.19.8"

    monkeypatch.setattr(fit, "version", version)
    with pytest.raises(MissingExtra, match=r"pip install 'outlay\[run\]'"):
        fit.check_software()


def test_earlier_starts_say_how_long_a_start_takes_at_least(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    attempts = Attempts(
        attempts=(
            Attempt(started_at="", elapsed_s=60.0, ready_s=20.0, ended=True),
            Attempt(started_at="", elapsed_s=10.0),
        )
    )
    assert launch._startup(attempts, folder)[0] == pytest.approx(16.0)
    log = EventLog(folder.events, lambda: 0.0)
    log.write("step", 1, step_s=1.0)
    log.write("save", 1, save_s=4.0)
    log.close()
    assert launch._startup(attempts, folder)[0] == pytest.approx(20.0)
    # the second was killed: up to a heartbeat more than what was noted
    assert attempts.spent_s() == pytest.approx(72.0)
    assert launch._startup(Attempts(), folder)[1].startswith("assumed")


def test_attempts_survive_the_file(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    attempts = Attempts(attempts=(Attempt(started_at="now", elapsed_s=1.5, ready_s=None),))
    folder.write_attempts(attempts)
    assert folder.read_attempts() == attempts
    assert json.loads(folder.attempts.read_text())["schema"] == "outlay/attempts@1"

"""`outlay demo`: the whole way on this machine, in a few minutes.

probe → corpus from Python's standard library → tokenizer → search → plan.yaml → DeepSpeed training
within a budget → evaluation → export → predicted against measured.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from outlay.profiles.errors import EXIT_BUDGET, EXIT_DONE, OutlayError, UsageError
from outlay.profiles.units import format_count, format_seconds

if TYPE_CHECKING:
    from rich.console import Console

    from outlay.planner.spec.cluster import Cluster
    from outlay.planner.spec.job import Job
    from outlay.planner.spec.plan import Plan
    from outlay.runner.data.prepare import DatasetInfo

MARKER = ".outlay-demo"
"""Says that a folder was made by this command, so that the next call may replace it."""
VOCAB_SIZE = 4096
SEQ_LEN = 256
GLOBAL_BATCH = 8
LEARNING_RATE = 1e-3
"""Of 1e-3, 2e-3 and 4e-3 the lowest held-out loss after 200 steps: docs/log.md."""
LEAST_STEPS = 200
"""A shorter schedule learns little; where the machine is slower than that, the budget ends the run."""
CORPUS_BYTES = 8_000_000
"""About 2.5 M tokens: more than two cores see in the demo's minutes."""
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
"""6.5 M parameters: small enough for two cores, large enough that matrix products dominate."""
START_S, FINISH_S = 15.0, 15.0
"""Wall time that is no training: start of the ranks; evaluation, last save, export, shutdown."""
DEFAULT_PRICE = 0.10
"""USD/h: about what two rented cores with 8 GB cost; a flag, since only the user knows."""


@click.command()
@click.option(
    "--dir", "folder", default="outlay-demo", show_default=True, help="Folder to write to."
)
@click.option(
    "--minutes",
    type=click.FloatRange(0.5, 600),
    default=2.75,
    show_default=True,
    help="Budget of wall time for the run.",
)
@click.option(
    "--money",
    type=click.FloatRange(0, min_open=True),
    default=0.02,
    show_default=True,
    help="Budget in USD for the run.",
)
@click.option(
    "--price-usd-per-h",
    type=click.FloatRange(0),
    default=DEFAULT_PRICE,
    show_default=True,
    help="What this machine costs an hour.",
)
@click.option("--seed", type=int, default=0, show_default=True)
def demo(folder: str, minutes: float, money: float, price_usd_per_h: float, seed: int) -> None:
    """The whole way on this machine: probe, plan, train, compare.

    Trains a small Llama on the source of Python's standard library, within a budget of minutes and
    of money, on every GPU or on two CPU processes. Downloads nothing.
    """
    from outlay.planner.commands.question import console
    from outlay.runner.commands.run import require_run_extra

    require_run_extra()
    out = console()
    root = _fresh(Path(folder))
    cluster = _probe(out, root, price_usd_per_h)
    info = _corpus(out, root, seed)
    plan = _plan(out, root, cluster, minutes, money, seed)
    outcome = _train(out, root)
    _judge(out, root, info, outcome)
    _check_export(out, root / "run" / "export")
    _compare(out, root, plan)


def _fresh(root: Path) -> Path:
    """An empty folder; an earlier demo's is replaced, anything else refused."""
    if root.exists():
        if not root.is_dir() or (any(root.iterdir()) and not (root / MARKER).exists()):
            raise UsageError(
                "already there, and not from an earlier demo", where=str(root), do="choose --dir"
            )
        shutil.rmtree(root)
    root.mkdir(parents=True)
    (root / MARKER).touch()
    return root


def _heading(out: Console, text: str) -> None:
    out.print(f"\n== {text}", style="bold", highlight=False)


def _probe(out: Console, root: Path, price: float) -> Cluster:
    from outlay.planner.probe import probe
    from outlay.planner.report.terminal import print_cluster
    from outlay.planner.spec.files import to_yaml, write_text
    from outlay.runner.commands.probe import with_rates

    _heading(out, "1. What is in this machine, and how fast is it?")
    cluster = with_rates(probe(folder=root, price_usd_per_h=price))
    write_text(root / "cluster.yaml", to_yaml(cluster))
    print_cluster(out, cluster)
    return cluster


def _corpus(out: Console, root: Path, seed: int) -> DatasetInfo:
    from outlay.runner.data.corpus import standard_library_files
    from outlay.runner.data.prepare import prepare

    _heading(
        out, "2. Text: the source files of Python's standard library, and a tokenizer for them"
    )
    info = prepare(
        standard_library_files(),
        root / "data",
        seed=seed,
        vocab_size=VOCAB_SIZE,
        max_bytes=CORPUS_BYTES,
    )
    out.print(
        f"{len(info.train.files)} files, {format_count(info.train.tokens)} tokens to train on; "
        f"{len(info.heldout.files)} files, {format_count(info.heldout.tokens)} tokens held out; "
        f"byte-pair vocabulary of {info.vocab_size}",
        highlight=False,
    )
    return info


def _plan(
    out: Console, root: Path, cluster: Cluster, minutes: float, money: float, seed: int
) -> Plan:
    """Search with a nominal length first: the estimate says how many steps the budget holds."""
    from outlay.planner.planning import make_plan
    from outlay.planner.report.terminal import print_plan
    from outlay.planner.spec.families import resolve_model
    from outlay.planner.spec.files import to_json, to_yaml, write_text

    _heading(out, "3. The plan: every strategy that DeepSpeed allows here, estimated and ranked")
    config_path = root / "model" / "config.json"
    write_text(config_path, to_json(CONFIG))
    spec, config = resolve_model(str(config_path))
    spec = dataclasses.replace(spec, name="demo-llama-6.5m")
    job = _job(root, cluster, minutes, money, seed)
    first = make_plan(spec, config, job, cluster)
    price = cluster.price_usd_per_h or 0.0
    limit_s = min(minutes * 60, money / price * 3600 if price else float("inf"))
    step_s = float(first.estimate["step"]["time_s"])
    steps = max(LEAST_STEPS, int((limit_s - START_S - FINISH_S) / step_s))
    schedule = dataclasses.replace(job.schedule, warmup_steps=min(20, steps // 10))
    job = dataclasses.replace(job, steps=steps, schedule=schedule)
    plan = make_plan(spec, config, job, cluster)
    write_text(root / "plan.yaml", to_yaml(plan))
    write_text(root / "ds_config.json", to_json(plan.deepspeed))
    print_plan(out, plan, out=str(root / "plan.yaml"))
    return plan


def _job(root: Path, cluster: Cluster, minutes: float, money: float, seed: int) -> Job:
    from outlay.planner.jobs import default_precision
    from outlay.planner.spec.job import Budget, Data, Job, Optimizer

    precision, _ = default_precision(cluster)
    batch = GLOBAL_BATCH * max(1, cluster.ranks // 2)
    return Job(
        model="demo-llama-6.5m",
        seq_len=SEQ_LEN,
        global_batch=batch,
        steps=100,
        precision=precision,  # type: ignore[arg-type]
        optimizer=Optimizer(lr=LEARNING_RATE),
        data=Data(path=str((root / "data").resolve()), format="tokens"),
        budget=(
            Budget(kind="hours", amount=minutes / 60),
            Budget(kind="money", amount=money),
        ),
        seed=seed,
    )


def _train(out: Console, root: Path) -> dict[str, Any]:
    """`outlay run` as a user would start it: a process of its own, whose wall time is metered."""
    _heading(out, "4. Training with DeepSpeed under the budget: outlay run plan.yaml")
    command = [
        sys.executable,
        "-m",
        "outlay.runner",
        "run",
        str(root / "plan.yaml"),
        "--dir",
        str(root / "run"),
        "--yes",
        "--when-over",
        "anneal",
    ]
    code = subprocess.run(command, check=False).returncode
    if code not in (EXIT_DONE, EXIT_BUDGET):
        raise OutlayError(f"the run ended with exit code {code}", where=str(root / "run"))
    outcome: dict[str, Any] = json.loads((root / "run" / "outcome.json").read_text())
    return outcome


def _judge(out: Console, root: Path, info: DatasetInfo, outcome: dict[str, Any]) -> None:
    """Held-out loss beside a unigram model's on the same tokens; a model that learned is below."""
    from outlay.planner.planning import read_plan
    from outlay.runner.data.dataset import TokenDataset

    _heading(out, "5. Did it learn? Loss on held-out files, nats a token")
    plan = read_plan(root / "plan.yaml")
    data = TokenDataset(root / "data", seq_len=SEQ_LEN, seed=plan.job.seed)
    unigram = data.heldout_unigram_nats(
        dp_size=plan.strategy.dp,
        micro_batch=plan.strategy.micro_batch,
        sequences=plan.job.eval_sequences,
    )
    loss = outcome["heldout_loss"]
    out.print(
        f"unigram model   {unigram:.3f}   (whole held-out part: {info.heldout_unigram_nats:.3f})",
        highlight=False,
    )
    out.print(f"trained model   {loss:.3f}   after {outcome['tokens']:,} tokens", highlight=False)
    if not loss < unigram:
        raise OutlayError(
            "the trained model is no better than a unigram model",
            why=f"{loss:.3f} against {unigram:.3f} nats a token after {outcome['steps']} steps",
            do="give it more --minutes",
        )


_LOAD = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder = sys.argv[1]
model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
prompt = "def __init__(self"
ids = tokenizer(prompt, return_tensors="pt").input_ids
torch.manual_seed(0)
mask = torch.ones_like(ids)
new = model.generate(ids, attention_mask=mask, max_new_tokens=48, do_sample=True, top_k=20, pad_token_id=0)
print(sum(p.numel() for p in model.parameters()), "parameters loaded; it continues", repr(prompt), "with:")
print(tokenizer.decode(new[0, ids.shape[1]:]))
"""


def _check_export(out: Console, folder: Path) -> None:
    """Load the export in a fresh process with transformers alone."""
    _heading(out, "6. The export, loaded by AutoModelForCausalLM in a fresh process")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _LOAD, str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise OutlayError("the export does not load", where=str(folder), why=done.stderr[-500:])
    out.print(done.stdout.rstrip(), highlight=False, markup=False)


def _compare(out: Console, root: Path, plan: Plan) -> None:
    from outlay.planner.spec.files import plain, to_json, write_text
    from outlay.runner.commands.compare import comparison, print_comparison
    from outlay.runner.memory_probe import run_memory_probe

    _heading(out, "7. Predicted against measured (peak memory: a separate short run)")
    readings = run_memory_probe(plan)
    rows = comparison(root / "run", readings)
    write_text(root / "comparison.json", to_json({"rows": plain(rows), "memory": plain(readings)}))
    print_comparison(out, rows)
    outcome = json.loads((root / "run" / "outcome.json").read_text())
    spent = f"spent {format_seconds(outcome['wall_s'])}"
    if outcome["cost_usd"] is not None:
        spent += f", {outcome['cost_usd']:.4f} USD"
    limits = " and ".join(str(b) for b in plan.job.budget)
    out.print(
        f"The run {spent} of its budget of {limits}. Everything is in {root}/.", highlight=False
    )

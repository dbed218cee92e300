"""`outlay estimate --cases IN.csv --out OUT.csv`: one prediction a row, in order.

Columns in: those of `truth/cases.csv`, any of them empty. What is empty is filled by the defaults
below; a row that cannot be expressed says why in `error`.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from outlay.planner.case_model import case_spec, count, facts_of
from outlay.planner.case_words import (
    attention_word,
    checkpointing_of,
    memory_kind_of,
    optimizer_of,
    precision_of,
    quantization_of,
)
from outlay.planner.estimate.candidates import Candidates
from outlay.planner.estimate.estimator import Estimates, evaluate
from outlay.planner.estimate.interval import VERDICTS
from outlay.planner.estimate.software import (
    CPU_DEEPSPEED,
    MEGATRON,
    MEGATRON_CORE,
    Software,
    software_of,
)
from outlay.planner.hardware import cluster_of
from outlay.planner.spec.cluster import Cluster
from outlay.planner.spec.job import Finetune, Job
from outlay.planner.spec.model import ModelSpec
from outlay.planner.spec.strategy import Checkpointing, Strategy
from outlay.profiles.errors import FileError, OutlayError, UsageError
from outlay.profiles.loader import accelerator
from outlay.profiles.units import GIB

COLUMNS_IN = (
    "id", "source", "model", "arch", "n_params", "layers", "hidden", "heads", "kv_heads", "ffn", "vocab",
    "experts", "top_k", "seq_len", "gpu", "gpus", "gpus_per_node", "interconnect", "framework", "precision",
    "zero", "tp", "pp", "vpp", "cp", "ep", "dp", "micro_batch", "global_batch", "activation_checkpointing",
    "optimizer", "attention", "lora_rank", "quant", "measured_memory_gib", "memory_kind", "oom",
    "measured_step_s", "measured_tokens_per_s_per_gpu", "measured_tflops_per_gpu", "notes",
)  # fmt: skip
COLUMNS_OUT = (
    "id", "predicted_step_s", "predicted_step_low_s", "predicted_step_high_s",
    "predicted_tokens_per_s_per_gpu", "predicted_memory_gib", "predicted_memory_low_gib",
    "predicted_memory_high_gib", "fits", "verdict", "oom_probability", "error",
)  # fmt: skip

MICRO_BATCHES_A_STAGE = 8
"""Of a pipeline whose batch a row does not state: a bubble of 1/8 of the work."""
TARGET_SHARE = 4
"""Of an encoder-decoder's input, its target is one part in: T5's span corruption makes 114 target
tokens of 512 (arXiv 1910.10683, section 3.1.4), padded to 128."""
EAGER_SEQ_LEN = 2048
"""Megatron rows that do not name their attention: eager to this length, as before flash attention; a
longer sequence's scores would not fit, so it is taken as flash."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row, expressed in the project's nouns."""

    spec: ModelSpec
    job: Job
    cluster: Cluster
    strategy: Strategy
    software: Software
    memory_kind: str
    stated: Strategy | None = None
    """The strategy with nothing put where the row is silent, if that is another one. Time is
    estimated for this one: who must recompute to fit recomputes single operators and some layers, not
    all (published runs that say nothing: 6 % median error against 13 %)."""


def _check_header(names: list[str], path: str | Path) -> None:
    unknown = sorted(set(names) - set(COLUMNS_IN))
    twice = sorted({name for name in names if names.count(name) > 1})
    if unknown or twice or "id" not in names:
        what = f"unknown columns {unknown}" if unknown else "no column `id`"
        what = f"columns given twice: {twice}" if twice else what
        raise FileError(what, where=f"{path}:1", do="columns: " + ", ".join(COLUMNS_IN))


def read_rows(path: str | Path) -> Iterator[dict[str, str]]:
    """Rows of a cases file. Raises FileError for a file without the column `id`, with unknown
    or doubled ones, or that is not CSV."""
    try:
        with Path(path).open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file, strict=True)
            _check_header(list(reader.fieldnames or ()), path)
            for row in reader:
                if None in row:
                    raise FileError(
                        f"{len(row[None])} cells more than there are columns",
                        where=f"{path}:{reader.line_num}", do="quote a cell that holds a comma",
                    )  # fmt: skip
                yield row
    except csv.Error as error:
        raise FileError("not a CSV file", where=str(path), why=str(error)) from None
    except OSError as error:
        raise FileError("cannot be read", where=str(path), why=error.strerror or "") from None
    except UnicodeDecodeError as error:
        raise FileError("not a text file", where=str(path), why=str(error)) from None


def _with_pp(row: Mapping[str, str]) -> Mapping[str, str]:
    """A row that gives GPUs, tp and dp has said how many pipeline stages there are."""
    gpus, tp, dp = (count(row, k) for k in ("gpus", "tp", "dp"))
    if gpus is None or tp is None or dp is None or (row.get("pp") or "").strip():
        return row
    inside = tp * dp * (count(row, "cp", 1) or 1)
    return row if gpus % inside else {**row, "pp": str(gpus // inside)}


def _ranks(row: Mapping[str, str]) -> tuple[int, int]:
    """(GPUs, data-parallel ranks). Rows that give no GPUs have at least one rank an expert group."""
    tp, pp, cp, ep = (count(row, k, 1) or 1 for k in ("tp", "pp", "cp", "ep"))
    gpus, dp = count(row, "gpus"), count(row, "dp")
    if dp is None:
        gpus = gpus or tp * pp * cp * ep
        if gpus % (tp * pp * cp):
            raise UsageError(f"tp {tp} · pp {pp} · cp {cp} does not divide {gpus} GPUs")
        dp = gpus // (tp * pp * cp)
    elif gpus is not None and gpus != tp * pp * cp * dp:
        raise UsageError(
            f"dp {dp} · tp {tp} · pp {pp} · cp {cp} = {tp * pp * cp * dp}, not gpus {gpus}"
        )
    return gpus or tp * pp * cp * dp, dp


def _states_layout(row: Mapping[str, str]) -> bool:
    """Whether the row, not our defaults, says how many sequences go through the ranks at once."""
    told = {
        key for key in ("micro_batch", "dp", "gpus", "tp", "pp") if (row.get(key) or "").strip()
    }
    return "micro_batch" in told and ("dp" in told or {"gpus", "tp", "pp"} <= told)


def _batches(row: Mapping[str, str], software: Software, dp: int, pp: int) -> tuple[int, int]:
    """(micro_batch, grad_accum). FSDP in a pipeline cuts a rank's batch into pp micro-batches where the
    row does not say (torchtitan's default); elsewhere one sequence at a time. A pipeline whose batch
    is not stated has MICRO_BATCHES_A_STAGE of them."""
    micro, batch = count(row, "micro_batch"), count(row, "global_batch")
    if micro is None:
        whole = max(1, (batch or dp) // dp)
        micro = max(1, whole // pp) if software.family == "fsdp" and pp > 1 else 1
    if batch is None and pp > 1:
        return micro, MICRO_BATCHES_A_STAGE * pp
    batch = batch or micro * dp
    if batch % (micro * dp) and _states_layout(row):
        raise UsageError(
            f"micro_batch {micro} · dp {dp} = {micro * dp} does not divide global_batch {batch}"
        )
    return micro, max(1, round(batch / (micro * dp)))


def _sequence_parallel(row: Mapping[str, str], software: Software, checkpointing: str) -> bool:
    """Where a row does not say: torchtitan's always; Megatron's came with selective recomputation
    (arXiv 2205.05198), and goes with flash attention, which is later still."""
    if software.family == "fsdp":
        return True
    modern = checkpointing == "selective" or _attention(row, software) != "eager"
    return software in (MEGATRON, MEGATRON_CORE) and modern


def _strategy(row: Mapping[str, str], software: Software, dp: int, zero: int) -> Strategy:
    tp, pp, cp = (count(row, k, 1) or 1 for k in ("tp", "pp", "cp"))
    micro, accumulate = _batches(row, software, dp, pp)
    word = checkpointing_of(row)
    sequence = facts_of(row).get(
        "seq_parallel", str(_sequence_parallel(row, software, word)).lower()
    )
    return Strategy(
        zero=zero, dp=dp, tp=tp, pp=pp, cp=cp,
        vpp=count(row, "vpp", 1) or 1, ep=count(row, "ep", 1) or 1,
        micro_batch=micro, grad_accum=accumulate,
        activation_checkpointing=word,  # type: ignore[arg-type]
        sequence_parallel=tp > 1 and sequence == "true",
        offload_optimizer="cpu" if "offload" in (row.get("zero") or "") else "none",
    )  # fmt: skip


def _attention(row: Mapping[str, str], software: Software) -> str:
    """As the row says. Where it does not: flash, but in Megatron up to EAGER_SEQ_LEN tokens eager where
    the column is empty, where selective recomputation makes sense only of eager attention, or where T5
    adds relative positions to the scores, which flash attention did not take."""
    word = attention_word(row)
    if word:
        return word
    seq_len = count(row, "seq_len", 2048) or 2048
    selective = (row.get("activation_checkpointing") or "").strip() == "selective"
    older = (
        not (row.get("attention") or "").strip()
        or selective
        or (row.get("arch") or "").strip() == "t5"
    )
    return (
        "eager" if software.family == "megatron" and seq_len <= EAGER_SEQ_LEN and older else "flash"
    )


def _finetune(row: Mapping[str, str]) -> Finetune | None:
    """Adapters: a LoRA rank, a method in the notes, or quantized weights, which cannot be trained."""
    rank, bits = count(row, "lora_rank"), quantization_of(row)
    method = facts_of(row).get("method", "")
    known = method if method in ("lora", "adapter", "adapter_v2") else ""
    if rank is None and not known and bits == "none":
        return None
    return Finetune(
        method=known or "lora",  # type: ignore[arg-type]
        rank=rank or Finetune().rank,
        quant=bits,  # type: ignore[arg-type]
    )


def _on_machine(machine: Cluster | None, ranks: int) -> Cluster:
    """A CPU has no datasheet: its memory and rates are those of the machine that was probed."""
    if machine is None:
        raise UsageError(
            "gpu: a CPU's memory and rates are its machine's, and no cluster file describes it"
        )
    return replace(machine, nodes=1, ranks_per_node=ranks)


def express(row: Mapping[str, str], *, machine: Cluster | None = None) -> Case:
    """A row in the project's nouns. `machine`: what rows with `gpu` cpu ran on.

    Raises UsageError or UnknownName where that is impossible.
    """
    row = _with_pp(row)
    software = software_of(row.get("framework") or "", attention=attention_word(row))
    if not (row.get("gpu") or "").strip():
        raise UsageError("the row names no gpu")
    a = accelerator((row["gpu"]).strip())
    gpus, dp = _ranks(row)
    per_node = min(count(row, "gpus_per_node", 8) or 8, gpus)
    text = (row.get("zero") or "0").strip() or "0"
    zero = int(text[0]) if text[:1] in "0123" else -1
    if zero < 0:
        raise UsageError(f"zero: {text!r} is none of 0, 1, 2, 3, 3-offload")
    spec = case_spec(row, software)
    strategy = _strategy(row, software, dp, zero)
    seq_len = count(row, "seq_len", min(2048, spec.max_positions or 2048)) or 2048
    job = Job(
        model=spec.name, seq_len=seq_len, global_batch=strategy.global_batch, steps=1,
        precision=precision_of(row),  # type: ignore[arg-type]
        attention=_attention(row, software),  # type: ignore[arg-type]
        optimizer=optimizer_of(row), finetune=_finetune(row),
        target_len=max(1, seq_len // TARGET_SHARE) if spec.encoder_decoder else None,
    )  # fmt: skip
    if a.kind == "cpu":
        cluster, software = _on_machine(machine, gpus), CPU_DEEPSPEED
    else:
        words = row.get("interconnect") or ""
        cluster = cluster_of(a, gpus=gpus, per_node=per_node, interconnect=words)
    case = Case(
        spec=spec, job=job, cluster=cluster, strategy=strategy, software=software,
        memory_kind=memory_kind_of(row),
    )  # fmt: skip
    return _with_unstated(case, row)


def _with_unstated(case: Case, row: Mapping[str, str]) -> Case:
    """A row without ZeRO stage or checkpointing has run with the first of these that fits (each next
    one needs less memory and more time), or with the last where none does."""
    stages = [case.strategy.zero]
    if not (row.get("zero") or "").strip() and case.strategy.dp > 1:
        stages.append(1)
    words: list[Checkpointing] = [case.strategy.activation_checkpointing]
    if not (row.get("activation_checkpointing") or "").strip():
        words += ["selective", "full"]
    choices = [
        replace(case.strategy, zero=zero, activation_checkpointing=word)
        for word in words
        for zero in stages
    ]
    if len(choices) == 1:
        return case
    candidates = Candidates.of(choices)
    found = evaluate(
        case.spec, case.job, case.cluster, candidates, software=case.software, own=False
    )
    fits = np.flatnonzero(found.verdict < VERDICTS.index("no"))
    return replace(case, strategy=choices[int(fits[0]) if len(fits) else -1], stated=case.strategy)


def evaluate_case(case: Case) -> Estimates:
    """The case's one candidate, under its own software's conventions."""
    both = Candidates.of([case.strategy, case.stated or case.strategy])
    found = evaluate(case.spec, case.job, case.cluster, both, software=case.software, own=False)
    time = found.take(np.array([1]))
    return replace(
        found.take(np.array([0])), step=time.step, step_low=time.step_low, step_high=time.step_high
    )


def predict(row: Mapping[str, str]) -> dict[str, str]:
    """One row of the output. Errors of ours become the text in `error`."""
    out = dict.fromkeys(COLUMNS_OUT, "")
    out["id"] = row.get("id") or ""
    try:
        case = express(row)
        e = evaluate_case(case)
    except OutlayError as error:
        out["error"] = error.message().replace("\n", "; ")
        return out
    memory = float(e.memory.in_kind(case.memory_kind)[0]) / GIB
    ratio_low = float(e.memory_low[0] / e.memory.device[0])
    ratio_high = float(e.memory_high[0] / e.memory.device[0])
    verdict = VERDICTS[int(e.verdict[0])]
    out |= {
        "predicted_memory_gib": f"{memory:.6g}",
        "predicted_memory_low_gib": f"{memory * ratio_low:.6g}",
        "predicted_memory_high_gib": f"{memory * ratio_high:.6g}",
        "fits": "false" if verdict == "no" else "true",
        "verdict": verdict,
        "oom_probability": f"{float(e.risk[0]):.4g}",
    }
    if e.step is not None and e.step_low is not None and e.step_high is not None:
        seconds = float(e.step.time_s[0])
        tokens = case.job.tokens_per_step / seconds / case.cluster.ranks
        out |= {
            "predicted_step_s": f"{seconds:.6g}",
            "predicted_step_low_s": f"{float(e.step_low[0]):.6g}",
            "predicted_step_high_s": f"{float(e.step_high[0]):.6g}",
            "predicted_tokens_per_s_per_gpu": f"{tokens:.6g}",
        }
    return out


def predict_file(path: str | Path, out: str | Path) -> tuple[int, int]:
    """Write the predictions; (rows, rows with an error)."""
    import io

    from outlay.planner.spec.files import write_text

    if Path(out).resolve() == Path(path).resolve():
        raise UsageError(
            f"--out {out} is the file of the cases", do="write the predictions to another file"
        )
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, COLUMNS_OUT, lineterminator="\n")
    writer.writeheader()
    rows = errors = 0
    for row in read_rows(path):
        predicted = predict(row)
        writer.writerow(predicted)
        rows += 1
        errors += bool(predicted["error"])
    write_text(out, buffer.getvalue())
    return rows, errors

"""`outlay estimate --cases IN.csv --out OUT.csv`: one prediction a row, in order.

Columns in: those of `truth/cases.csv`, any of them empty. What is empty is filled by the defaults
below; a row that cannot be expressed says why in `error`.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np

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
from outlay.planner.spec.families import preset_names, resolve_model
from outlay.planner.spec.job import Finetune, Job, Optimizer
from outlay.planner.spec.model import Attention, Block, Mlp, ModelSpec
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

VOCAB = {"llama": 32000, "moe": 32000, "bert": 30528, "t5": 32128, "mt5": 250112}
"""By architecture where a row says nothing: the original tokenizers' sizes; else GPT-2's, padded."""
GPT_VOCAB = 51200
LONG_SEQ_LEN, LONG_VOCAB = 8192, 128256
"""Grouped-query attention and so long a context came together with vocabularies of Llama 3's size."""
MICRO_BATCHES_A_STAGE = 8
"""Of a pipeline whose batch a row does not state: a bubble of 1/8 of the work."""
HEAD_DIM = 128
"""Where the heads are not given: the width that most models since GPT-3 have."""
TARGET_SHARE = 4
"""Of an encoder-decoder's input, its target is one part in: T5's span corruption makes 114 target
tokens of 512 (arXiv 1910.10683, section 3.1.4), padded to 128."""
EAGER_SEQ_LEN = 2048
"""Megatron rows that do not name their attention: eager to this length, as before flash attention; a
longer sequence's scores would not fit, so it is taken as flash."""
LATENT = {"q_rank": 1536, "kv_rank": 512, "rope_head_dim": 64}
"""Latent attention whose sizes a row does not give: DeepSeek-V3's (arXiv 2412.19437, section 4.2)."""
LATENT_HEAD_DIM, LATENT_VALUE_DIM = 192, 128
_FACT = re.compile(r"\b(seq_parallel|swiglu|mla|untied|method) *= *(\w+)")


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


def read_rows(path: str | Path) -> Iterator[dict[str, str]]:
    """Rows of a cases file. Raises FileError for a file without the column `id` or with unknown ones."""
    try:
        with Path(path).open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            unknown = set(reader.fieldnames or ()) - set(COLUMNS_IN)
            if unknown or "id" not in (reader.fieldnames or ()):
                what = f"unknown columns {sorted(map(str, unknown))}" if unknown else "no column `id`"
                raise FileError(what, where=f"{path}:1", do="columns: " + ", ".join(COLUMNS_IN))
            yield from reader
    except OSError as error:
        raise FileError("cannot be read", where=str(path), why=str(error)) from None
    except UnicodeDecodeError as error:
        raise FileError("not a text file", where=str(path), why=str(error)) from None


def _number(row: Mapping[str, str], key: str) -> float | None:
    text = (row.get(key) or "").strip()
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        raise UsageError(f"{key}: {text!r} is not a number") from None
    if not math.isfinite(value) or value < 0:
        raise UsageError(f"{key}: {text} makes no sense")
    return value


def _count(row: Mapping[str, str], key: str, default: int | None = None) -> int | None:
    value = _number(row, key)
    if value is None:
        return default
    if value != int(value) or value < 1:
        raise UsageError(f"{key}: {value:g} is not a positive whole number")
    return int(value)


def _facts(row: Mapping[str, str]) -> dict[str, str]:
    """What has no column and is stated in `notes` as `key=value`: seq_parallel, swiglu, mla, untied,
    method (of fine-tuning)."""
    return {key: value.lower() for key, value in _FACT.findall(row.get("notes") or "")}


def _is_llama_like(arch: str, facts: Mapping[str, str]) -> bool:
    """Gated MLP, RMSNorm, rotary, no biases, no dropout; else GPT-2's style."""
    return facts["swiglu"] == "true" if "swiglu" in facts else arch in ("llama", "moe")


def _attention_of(
    row: Mapping[str, str], facts: Mapping[str, str], hidden: int, arch: str, software: Software
) -> Attention:
    tp = _count(row, "tp", 1) or 1
    heads = _count(row, "heads") or _heads(hidden, tp)
    kv_heads = _count(row, "kv_heads") or heads
    mixture = bool(_count(row, "experts", 0))
    if hidden % heads and not mixture:
        raise UsageError(f"heads {heads} do not divide hidden {hidden}")
    gated = _is_llama_like(arch, facts)
    # Mixtures of experts with a k and v for each of 64 or more heads are DeepSeek-V2's descendants.
    latent = facts.get("mla") == "true" or (mixture and heads == _count(row, "kv_heads") and heads >= 64)
    width = max(hidden // heads, HEAD_DIM) if mixture else hidden // heads
    return Attention(
        heads=heads, kv_heads=heads if latent else kv_heads,
        head_dim=LATENT_HEAD_DIM if latent else width,
        value_head_dim=LATENT_VALUE_DIM if latent else None,
        qkv_bias=not gated, out_bias=not gated, causal=arch != "bert",
        dropout=0.1 if software.dropout and not gated else 0.0,
        fused_qkv=software.family == "single" or "litgpt" in (row.get("framework") or ""),
        **(LATENT if latent else {}),
    )  # fmt: skip


def _heads(hidden: int, tp: int) -> int:
    """Heads of a row that gives none: they divide hidden, tp divides them, each is about HEAD_DIM wide."""
    possible = [hidden // d for d in range(32, 513) if hidden % (d * tp) == 0]
    return min(possible or [1], key=lambda n: abs(math.log(hidden / n / HEAD_DIM)))


def _vocab(row: Mapping[str, str], arch: str, gated: bool) -> int:
    """The vocabulary of a row that gives none."""
    heads, kv_heads, seq_len = (_count(row, k) or 0 for k in ("heads", "kv_heads", "seq_len"))
    if arch == "gpt" and 0 < kv_heads < heads and seq_len >= LONG_SEQ_LEN:
        return LONG_VOCAB
    if (row.get("model") or "").lower().startswith("mt5"):
        return VOCAB["mt5"]
    return GPT_VOCAB if arch == "moe" and not gated else VOCAB.get(arch, GPT_VOCAB)


def _spec(row: Mapping[str, str], software: Software) -> ModelSpec:
    """Sizes from the columns; a row without them may name a preset."""
    name = (row.get("model") or "").strip()
    layers, hidden = _count(row, "layers"), _count(row, "hidden")
    parameters = _number(row, "n_params")
    arch = (row.get("arch") or "gpt").strip()
    if hidden is None:
        if name.lower() in preset_names():
            return resolve_model(name.lower())[0]
        raise UsageError(f"the row gives no hidden size, and {name!r} is no preset")
    facts = _facts(row)
    gated = _is_llama_like(arch, facts)
    litgpt = "litgpt" in (row.get("framework") or "")
    experts = _count(row, "experts", 0) or 0
    ffn = _count(row, "ffn") or (4 * hidden if not gated else -(-8 * hidden // 3 // 256) * 256)
    vocab = _count(row, "vocab") or _vocab(row, arch, gated)
    attention = _attention_of(row, facts, hidden, arch, software)
    top_k = _count(row, "top_k", 1) or 1
    mlp = Mlp(
        ffn=ffn, gated=gated, bias=not gated, activation="silu" if gated else "gelu",
        experts=experts, top_k=min(top_k, experts) if experts else 0,
        router_parameters=hidden * experts, shared_ffn=ffn if experts and attention.kv_rank else 0,
    )  # fmt: skip
    untied = facts["untied"] == "true" if "untied" in facts else gated or litgpt
    if layers is None:
        if parameters is None:
            raise UsageError("the row gives neither layers nor n_params")
        pp = _count(row, "pp", 1) or 1
        tables = vocab * hidden * (1 + untied)
        layers = _layers_from_parameters(parameters - tables, hidden, attention, mlp, pp)
    seq_len = _count(row, "seq_len", 2048) or 2048
    blocks = (Block(count=layers, attention=attention, mlp=mlp),)
    if arch == "t5":
        blocks = _two_stacks(blocks[0], parameters, hidden, vocab)
    rotary = gated or litgpt
    return ModelSpec(
        name=name or "case", source="cases", family=arch, hidden=hidden, vocab=vocab, blocks=blocks,
        positions="rotary" if rotary else "learned", max_positions=seq_len,
        learned_positions=0 if rotary else seq_len, tie_embeddings=not untied,
        norm="rmsnorm" if gated else "layernorm", norm_bias=not gated,
        residual_dropout=attention.dropout, embedding_dropout=attention.dropout,
    )  # fmt: skip


def _two_stacks(block: Block, parameters: float | None, hidden: int, vocab: int) -> tuple[Block, ...]:
    """Encoder and decoder of `layers` blocks each, or of half of them where the stated size says that
    both stacks were counted."""

    def stacks(count: int) -> tuple[Block, ...]:
        whole = replace(block.attention, causal=False)
        encoder = replace(block, count=count, stack="encoder", attention=whole)
        return encoder, replace(block, count=count, norms=3, cross_attention=whole)

    a, ffn = block.attention, (3 if block.mlp.gated else 2) * block.mlp.ffn
    pair = hidden * (3 * (a.q_width + a.k_width + a.v_width + a.out_width) + 2 * ffn)
    if parameters is None or block.count == 1:
        return stacks(block.count)
    counts = (block.count, block.count // 2)
    return stacks(min(counts, key=lambda n: abs(n * pair + vocab * hidden - parameters)))


def _layers_from_parameters(inside: float, hidden: int, a: Attention, m: Mlp, pp: int) -> int:
    """Depth that gives about `inside` weights in all blocks, a multiple of pp."""
    up = 3 if m.gated else 2
    block = hidden * (a.q_width + a.k_width + a.v_width + a.out_width)
    block += up * hidden * m.ffn * max(1, m.experts)
    return max(1, round(inside / block / pp)) * pp


def _with_pp(row: Mapping[str, str]) -> Mapping[str, str]:
    """A row that gives GPUs, tp and dp has said how many pipeline stages there are."""
    gpus, tp, dp = (_count(row, k) for k in ("gpus", "tp", "dp"))
    if gpus is None or tp is None or dp is None or (row.get("pp") or "").strip():
        return row
    inside = tp * dp * (_count(row, "cp", 1) or 1)
    return row if gpus % inside else {**row, "pp": str(gpus // inside)}


def _ranks(row: Mapping[str, str]) -> tuple[int, int]:
    """(GPUs, data-parallel ranks). Rows that give no GPUs have at least one rank an expert group."""
    tp, pp, cp, ep = (_count(row, k, 1) or 1 for k in ("tp", "pp", "cp", "ep"))
    gpus, dp = _count(row, "gpus"), _count(row, "dp")
    if dp is None:
        gpus = gpus or tp * pp * cp * ep
        if gpus % (tp * pp * cp):
            raise UsageError(f"tp {tp} · pp {pp} · cp {cp} does not divide {gpus} GPUs")
        dp = gpus // (tp * pp * cp)
    return gpus or tp * pp * cp * dp, dp


def _batches(row: Mapping[str, str], software: Software, dp: int, pp: int) -> tuple[int, int]:
    """(micro_batch, grad_accum). FSDP in a pipeline cuts a rank's batch into pp micro-batches where the
    row does not say (torchtitan's default); elsewhere one sequence at a time. A pipeline whose batch
    is not stated has MICRO_BATCHES_A_STAGE of them."""
    micro, batch = _count(row, "micro_batch"), _count(row, "global_batch")
    if micro is None:
        whole = max(1, (batch or dp) // dp)
        micro = max(1, whole // pp) if software.family == "fsdp" and pp > 1 else 1
    if batch is None and pp > 1:
        return micro, MICRO_BATCHES_A_STAGE * pp
    return micro, max(1, round((batch or micro * dp) / (micro * dp)))


def _sequence_parallel(row: Mapping[str, str], software: Software, checkpointing: str) -> bool:
    """Where a row does not say: torchtitan's always; Megatron's came with selective recomputation
    (arXiv 2205.05198), and goes with flash attention, which is later still."""
    if software.family == "fsdp":
        return True
    modern = checkpointing == "selective" or _attention(row, software) != "eager"
    return software in (MEGATRON, MEGATRON_CORE) and modern


def _strategy(row: Mapping[str, str], software: Software, dp: int, zero: int) -> Strategy:
    tp, pp, cp = (_count(row, k, 1) or 1 for k in ("tp", "pp", "cp"))
    micro, accumulate = _batches(row, software, dp, pp)
    word = (row.get("activation_checkpointing") or "none").strip() or "none"
    if word not in ("none", "selective", "full"):
        raise UsageError(f"activation_checkpointing: {word!r} is none, selective or full")
    sequence = _facts(row).get("seq_parallel", str(_sequence_parallel(row, software, word)).lower())
    return Strategy(
        zero=zero, dp=dp, tp=tp, pp=pp, cp=cp,
        vpp=_count(row, "vpp", 1) or 1, ep=_count(row, "ep", 1) or 1,
        micro_batch=micro, grad_accum=accumulate,
        activation_checkpointing=word,  # type: ignore[arg-type]
        sequence_parallel=tp > 1 and sequence == "true",
        offload_optimizer="cpu" if "offload" in (row.get("zero") or "") else "none",
    )  # fmt: skip


def _attention(row: Mapping[str, str], software: Software) -> str:
    """As the row says. Where it does not: flash, but in Megatron up to EAGER_SEQ_LEN tokens eager where
    the column is empty, or where selective recomputation makes sense only of eager attention."""
    word = (row.get("attention") or "").strip()
    if word in ("eager", "sdpa", "flash"):
        return word
    seq_len = _count(row, "seq_len", 2048) or 2048
    older = not word or (row.get("activation_checkpointing") or "").strip() == "selective"
    return "eager" if software.family == "megatron" and seq_len <= EAGER_SEQ_LEN and older else "flash"


def _finetune(row: Mapping[str, str]) -> Finetune | None:
    """Adapters: a LoRA rank, a method in the notes, or quantized weights, which cannot be trained."""
    rank, quant = _count(row, "lora_rank"), (row.get("quant") or "none").strip().lower()
    method = _facts(row).get("method", "")
    bits = quant.removeprefix("bnb.")
    if bits not in ("nf4", "nf4-dq", "int8"):
        bits = "none"
    known = method if method in ("lora", "adapter", "adapter_v2") else ""
    if rank is None and not known and bits == "none":
        return None
    return Finetune(
        method=known or "lora",  # type: ignore[arg-type]
        rank=rank or Finetune().rank,
        quant=bits,  # type: ignore[arg-type]
    )


def _optimizer(row: Mapping[str, str]) -> Optimizer:
    word = (row.get("optimizer") or "adamw").strip().lower().replace("-", "_")
    known = get_args(get_type_hints(Optimizer)["name"])
    return Optimizer(name=word if word in known else "adamw")  # type: ignore[arg-type]


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
    software = software_of(row.get("framework") or "", attention=(row.get("attention") or "").strip())
    if not (row.get("gpu") or "").strip():
        raise UsageError("the row names no gpu")
    a = accelerator((row["gpu"]).strip())
    gpus, dp = _ranks(row)
    per_node = min(_count(row, "gpus_per_node", 8) or 8, gpus)
    text = (row.get("zero") or "0").strip() or "0"
    zero = int(text[0]) if text[:1] in "0123" else -1
    if zero < 0:
        raise UsageError(f"zero: {text!r} is none of 0, 1, 2, 3, 3-offload")
    spec = _spec(row, software)
    strategy = _strategy(row, software, dp, zero)
    precision = (row.get("precision") or "bf16").strip()
    seq_len = _count(row, "seq_len", min(2048, spec.max_positions)) or 2048
    job = Job(
        model=spec.name, seq_len=seq_len, global_batch=strategy.global_batch, steps=1,
        precision=precision,  # type: ignore[arg-type]
        attention=_attention(row, software),  # type: ignore[arg-type]
        optimizer=_optimizer(row), finetune=_finetune(row),
        target_len=max(1, seq_len // TARGET_SHARE) if spec.encoder_decoder else None,
    )  # fmt: skip
    if a.kind == "cpu":
        cluster, software = _on_machine(machine, gpus), CPU_DEEPSPEED
    else:
        words = row.get("interconnect") or ""
        cluster = cluster_of(a, gpus=gpus, per_node=per_node, interconnect=words)
    case = Case(
        spec=spec, job=job, cluster=cluster, strategy=strategy, software=software,
        memory_kind=(row.get("memory_kind") or "").strip(),
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
    found = evaluate(case.spec, case.job, case.cluster, candidates, software=case.software)
    fits = np.flatnonzero(found.verdict < VERDICTS.index("no"))
    return replace(
        case, strategy=choices[int(fits[0]) if len(fits) else -1], stated=case.strategy
    )


def evaluate_case(case: Case) -> Estimates:
    """The case's one candidate, under its own software's conventions."""
    both = Candidates.of([case.strategy, case.stated or case.strategy])
    found = evaluate(case.spec, case.job, case.cluster, both, software=case.software)
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

"""What one block saves, in closed form, against what torch saves for transformers' module."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from outlay.planner.estimate.activations import Execution, block_saved  # noqa: E402
from outlay.planner.spec.families import spec_from_config  # noqa: E402

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"
)

BATCH, LENGTH = 2, 48
TOLERANCE = 0.03
_GATED = {
    "hidden_size": 64, "intermediate_size": 176, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 256, "pad_token_id": 0,
}  # fmt: skip
_NO_DROPOUT = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _GATED,
    "mistral": _GATED | {"sliding_window": None, "head_dim": 16},
    "qwen2": _GATED,
    "qwen3": _GATED | {"head_dim": 16},
    "granite": _GATED,
    "olmo": _GATED,
    "gemma": _GATED | {"head_dim": 16},
    "starcoder2": _GATED | {"residual_dropout": 0.0, "embedding_dropout": 0.0},
    "phi3": _GATED,
    "mixtral": _GATED | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt2": {"n_embd": 64, "n_head": 4, "vocab_size": 256, "n_positions": 64, "bos_token_id": 0,
             "eos_token_id": 0} | _NO_DROPOUT,
    "gpt_neox": {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4, "vocab_size": 256},
    "phi": {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4, "vocab_size": 256},
    "opt": {"hidden_size": 64, "ffn_dim": 256, "num_attention_heads": 4, "vocab_size": 256,
            "word_embed_proj_dim": 64, "max_position_embeddings": 64, "dropout": 0.0},
    "bloom": {"hidden_size": 64, "n_head": 4, "vocab_size": 256},
    "falcon": {"hidden_size": 64, "num_attention_heads": 4, "vocab_size": 256, "multi_query": True,
               "parallel_attn": True, "new_decoder_architecture": False, "alibi": False,
               "bos_token_id": 0, "eos_token_id": 0},
}  # fmt: skip
_LAYERS_KEY = {"gpt2": "n_layer", "bloom": "n_layer"}
EAGER_ONLY = ("bloom", "falcon")
"""Without, or with another, fast path on a CPU: torch falls back to the mathematical one."""


def layers_key(family: str) -> str:
    """The config's name for the number of blocks."""
    return _LAYERS_KEY.get(family, "num_hidden_layers")


def _config(family: str, layers: int) -> Any:
    values = CONFIGS[family] | {
        layers_key(family): layers,
        "use_cache": False,
    }
    return transformers.AutoConfig.for_model(family, **values)


def _saved_bytes(
    family: str, layers: int, attention: str, dtype: Any, *, checkpointing: bool
) -> int:
    """Storages that autograd keeps after a forward pass, weights and buffers left out."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        _config(family, layers), attn_implementation=attention, dtype=dtype
    )
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    seen: dict[int, Any] = {}

    def keep(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage
        return tensor

    ids = torch.randint(1, 200, (BATCH, LENGTH))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(input_ids=ids, labels=ids)
    return sum(storage.nbytes() for storage in seen.values())


def _predicted(family: str, attention: str, width: int) -> float:
    config = _config(family, 2).to_dict()
    spec = spec_from_config(config, name=family, source="test")
    ex = Execution(width=width, kernels="hf", attention=attention, mask_bytes=width)
    s = block_saved(spec, spec.blocks[0], ex)
    return s.sharded + s.replicated + s.routed + s.scores * LENGTH


CASES = [
    (family, attention)
    for family in CONFIGS
    for attention in (("eager",) if family in EAGER_ONLY else ("eager", "sdpa"))
]


@pytest.mark.parametrize(("family", "attention"), CASES)
@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_block_saves_what_torch_saves(family: str, attention: str, precision: str) -> None:
    dtype = getattr(torch, precision)
    three = _saved_bytes(family, 3, attention, dtype, checkpointing=False)
    measured = (three - _saved_bytes(family, 2, attention, dtype, checkpointing=False)) / (
        BATCH * LENGTH
    )
    assert _predicted(family, attention, dtype.itemsize) == pytest.approx(measured, rel=TOLERANCE)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "mixtral"])
def test_checkpointed_block_saves_its_input(family: str) -> None:
    three = _saved_bytes(family, 3, "sdpa", torch.bfloat16, checkpointing=True)
    measured = (three - _saved_bytes(family, 2, "sdpa", torch.bfloat16, checkpointing=True)) / (
        BATCH * LENGTH
    )
    spec = spec_from_config(_config(family, 2).to_dict(), name=family, source="test")
    ex = Execution(width=2, kernels="hf", attention="sdpa")
    assert block_saved(spec, spec.blocks[0], ex).block_input == pytest.approx(
        measured, rel=TOLERANCE
    )


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_with_dropout_saves_its_scores_on_a_cpu(
    attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's fused attention for CPUs knows no dropout, so sdpa saves what eager attention saves."""
    monkeypatch.setitem(CONFIGS, "gpt2", CONFIGS["gpt2"] | {"attn_pdrop": 0.1})
    three = _saved_bytes("gpt2", 3, attention, torch.float32, checkpointing=False)
    measured = (three - _saved_bytes("gpt2", 2, attention, torch.float32, checkpointing=False)) / (
        BATCH * LENGTH
    )
    assert _predicted("gpt2", attention, 4) == pytest.approx(measured, rel=TOLERANCE)

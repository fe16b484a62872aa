"""Who takes part in `benchmark_step.py`, with which settings, in which part of the comparison.

`ours*` are the package's own step; what a contender leaves out of `TECHNIQUES` is what an ablation
switches off. `activations` is given here where it is the contender's own choice; else every
contender of a part has the same. Peers use scaled-dot-product attention, which was faster here than
their eager one, and all threads. Where no dtype is named all compute, and hold their adapters, in
the one dtype of the comparison (`in_dtype`), that which the machine multiplies fastest.

    equal-*     same recomputation, same batch, no packing; `ours-own` keeps all
    ablation    ours, and without one technique each
    alone       the same step without any of them, and with one each
    pages       ours keeping all, and the same giving freed pages back before every step
    probabilities  ours keeping all, and the same without attention's probabilities
    compile     ours with plain norms and MLPs, and the same with these compiled
    dtype       ours in fp32 and in bf16, fp32 adapters both
    same-losses ours beside PEFT's plain path, fp32 adapters, on packed instructions; compared step
                by step all in fp32, which shows the algorithm, and in bf16, whose rounding alone
                moves the losses of both by about a percent
    real        instructions of real lengths: ours packed and tuned, Trainer as it comes, TRL tuned
"""

from __future__ import annotations

from typing import Any

PEERS = ("peft", "trainer", "trl")
TECHNIQUES = (
    "fused_linear", "fused_mlp", "fused_qkv", "tiled_norms", "chunked_loss", "tiled_attention",
    "freed_pages",
)  # fmt: skip
OURS: dict[str, Any] = {
    "kind": "ours", "techniques": TECHNIQUES, "loss_chunk_tokens": 256,
}  # fmt: skip
# what `train.compile` leaves to itself: plain norms and MLPs
PLAIN: dict[str, Any] = {
    "techniques": tuple(t for t in TECHNIQUES if t not in ("fused_mlp", "tiled_norms"))
}
OWN_CHOICE = {  # nothing computed again
    "activations": "keep", "mlp_keeps_inner": True, "attention_keeps_probabilities": True,
}  # fmt: skip
PEER: dict[str, Any] = {"attention": "sdpa"}
FP32_ADAPTER = {
    "adapter_dtype": "float32", "compute_dtype": "bfloat16", "activations": "keep",
}  # fmt: skip
NO_DECAY = {"weight_decay": 0.0}
SAME_ROWS = {"train_sampling_strategy": "sequential"}  # Trainer's own order is a random one


def in_dtype(contender: dict[str, Any], dtype: str) -> dict[str, Any]:
    """A contender that computes in "bfloat16" or "float32" where it does not name its dtype.

    Trainer and TRL are told whether it is bf16, in which they compute under autocast and TRL does
    by itself; one without arguments is left as it comes.
    """
    whole = {"compute_dtype": dtype, "adapter_dtype": dtype} | contender
    if contender.get("arguments"):
        in_bf16 = whole["compute_dtype"] == "bfloat16"
        whole["arguments"] = {"bf16": in_bf16} | contender["arguments"]
    return whole


def without(technique: str) -> dict[str, Any]:
    """Ours, one technique left out."""
    return OURS | {"techniques": tuple(t for t in TECHNIQUES if t != technique)}


def only(technique: str) -> dict[str, Any]:
    """Ours without its techniques but one."""
    return OURS | {"techniques": (technique,)}


def trl_packed(tokens: int, order: dict[str, Any]) -> dict[str, Any]:
    """TRL's best: packed rows, its chunked loss (the default), nothing computed again.

    1,024 is its own default; the mask over a packed row that attention needs on a CPU costs less in
    shorter ones, for the price of cutting examples off.
    """
    packing = {"packing": True, "max_length": tokens, "per_device_train_batch_size": 1}
    return PEER | {
        "kind": "trl", "activations": "keep", "arguments": NO_DECAY | order | packing,
    }  # fmt: skip


CONTENDERS: dict[str, dict[str, Any]] = {
    "ours": OURS,
    "ours-plain": OURS | PLAIN,
    "ours-compiled": OURS | PLAIN | {"compile": True},
    "ours-own": OURS | OWN_CHOICE,
    "ours-packed": OURS | OWN_CHOICE,
    "ours-own-without-freed-pages": without("freed_pages") | OWN_CHOICE,
    "ours-own-without-probabilities": OURS | OWN_CHOICE | {"attention_keeps_probabilities": False},
    **{f"ours-without-{t.replace('_', '-')}": without(t) for t in TECHNIQUES},
    "ours-bare": OURS | {"techniques": ()},
    **{f"ours-only-{t.replace('_', '-')}": only(t) for t in TECHNIQUES},
    "peft": PEER | {"kind": "peft"},
    "ours-fp32": OURS | FP32_ADAPTER,
    "ours-all-fp32": OURS | FP32_ADAPTER | {"compute_dtype": "float32"},
    "peft-fp32": PEER | FP32_ADAPTER | {"kind": "peft"},
    "peft-all-fp32": PEER | FP32_ADAPTER | {"kind": "peft", "compute_dtype": "float32"},
    "trainer": PEER | {"kind": "trainer", "arguments": NO_DECAY | SAME_ROWS},
    "trl": PEER | {"kind": "trl", "arguments": NO_DECAY | SAME_ROWS},
    # as they come: batches of 8, padded; PEFT's fp32 adapters; nothing computed again
    "trainer-defaults": PEER | {
        "kind": "trainer", "adapter_dtype": "float32", "activations": "keep", "arguments": {},
    },
    "trl-packed": trl_packed(1024, SAME_ROWS),
    "trl-packed-512": trl_packed(512, {}),  # of twice as many rows, any; the first are the longest
}  # fmt: skip


def part(tokens: int, rows: int, contenders: list[str], *, real: bool = False) -> dict[str, Any]:
    """Tokens of a row, rows of a batch, and who runs; ours comes first."""
    return {"tokens": tokens, "rows": rows, "contenders": contenders, "real": real}


EQUAL = ["ours", "ours-own", "peft", "trainer"]
PARTS: dict[str, dict[str, Any]] = {
    "equal-1x512": part(512, 1, EQUAL),
    "equal-4x512": part(512, 4, EQUAL),
    "1b-equal-1x512": part(512, 1, EQUAL),
    "1b-keep-1x512": part(512, 1, ["ours-own"]),
    "ablation-1x512": part(
        512, 1, ["ours", *(f"ours-without-{t.replace('_', '-')}" for t in TECHNIQUES)]
    ),
    "alone-1x512": part(
        512, 1, ["ours-bare", *(f"ours-only-{t.replace('_', '-')}" for t in TECHNIQUES)]
    ),
    "pages-1x512": part(512, 1, ["ours-own", "ours-own-without-freed-pages"]),
    "probabilities-1x512": part(512, 1, ["ours-own", "ours-own-without-probabilities"]),
    "compile-1x512": part(512, 1, ["ours-plain", "ours-compiled"]),
    "dtype-1x512": part(512, 1, ["ours-all-fp32", "ours-fp32"]),
    "same-losses": part(
        512, 1, ["ours-fp32", "peft-fp32", "ours-all-fp32", "peft-all-fp32"], real=True
    ),
    "real": part(
        1024, 1, ["ours-packed", "trainer-defaults", "trl-packed", "trl-packed-512"], real=True
    ),
}

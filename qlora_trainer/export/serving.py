"""What other programs cannot do with an adapter, said while the run is still being planned.

One small table, each line with where it is known from. It is about serving the *adapter* beside
its base; a merged export has none of these limits. Versions move: the lines are what those
projects' sources, trackers and documents said by the end of 2025. Ollama and LM Studio load
adapters through llama.cpp's format and share its lines.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

VLLM_DEFAULT_MAX_RANK = 16
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


@dataclass(frozen=True)
class ServingNote:
    """One thing a server cannot do.

    Attributes:
        server: "vLLM" or "llama.cpp".
        setting: What of the adapter it is about.
        reason: What happens.
        way_out: What to do.
        source: Where it is known from.
    """

    server: str
    setting: str
    reason: str
    way_out: str
    source: str

    def __str__(self) -> str:
        return f"{self.server}: {self.setting}: {self.reason}; {self.way_out} ({self.source})"


_MERGE = "serve a merged export instead (qlora export --format merged)"
_PEFT_HELPER = "vLLM, lora/peft_helper.py"
_CONVERTER = "llama.cpp, convert_lora_to_gguf.py"


def serving_notes(
    *,
    rank: int,
    kinds: Sequence[str],
    modules_to_save: Sequence[str] = (),
    rank_pattern: Sequence[int] = (),
    alpha_pattern: bool = False,
    rslora: bool = False,
    adapts_head: bool = False,
    tied_head: bool = False,
) -> list[ServingNote]:
    """What vLLM and llama.cpp cannot do with such an adapter.

    Args:
        rank: Of the adapter.
        kinds: Kinds of its modules: "linear", "conv1d", "conv2d", "embedding".
        modules_to_save: Modules trained in full.
        rank_pattern: Further ranks.
        alpha_pattern: Whether some modules have an alpha of their own.
        rslora: Whether updates are scaled by alpha / sqrt(rank).
        adapts_head: Whether the output head has a low-rank update.
        tied_head: Whether the head's weight is the token embedding's.

    >>> [note.setting for note in serving_notes(rank=8, kinds=["linear"])]
    []
    """
    largest = max([rank, *rank_pattern])
    notes = [
        *_of_vllm(largest, kinds, modules_to_save),
        *_of_llama_cpp(kinds, modules_to_save, rslora, adapts_head and tied_head),
    ]
    patterns = [name for name, given in
                (("rank_pattern", any(r != rank for r in rank_pattern)),
                 ("alpha_pattern", alpha_pattern)) if given]  # fmt: skip
    if patterns:
        reason = "it reads one rank and one alpha, so these modules get a wrong scale"
        notes.append(ServingNote("vLLM", ", ".join(patterns), reason, _MERGE, _PEFT_HELPER))
    if alpha_pattern:
        reason = "its converter reads one alpha, so these modules get a wrong scale"
        notes.append(ServingNote("llama.cpp", "alpha_pattern", reason, _MERGE, _CONVERTER))
    return notes


def _of_vllm(
    largest: int, kinds: Sequence[str], modules_to_save: Sequence[str]
) -> Iterator[ServingNote]:
    if modules_to_save:
        setting = f"modules_to_save = {', '.join(modules_to_save)}"
        yield ServingNote("vLLM", setting, "refused", _MERGE, "vllm-project/vllm#9280")
    if largest > VLLM_RANKS[-1]:
        reason, way_out = f"more than {VLLM_RANKS[-1]} is not possible", f"lower it, or {_MERGE}"
        yield ServingNote("vLLM", f"rank = {largest}", reason, way_out, "vLLM LoRAConfig")
    elif largest > VLLM_DEFAULT_MAX_RANK:
        needed = next(size for size in VLLM_RANKS if size >= largest)
        reason = f"refused at its default of {VLLM_DEFAULT_MAX_RANK}"
        way_out = f"start it with --max-lora-rank {needed}"
        yield ServingNote("vLLM", f"rank = {largest}", reason, way_out, "vllm-project/vllm#2847")
    if "conv1d" in kinds:
        reason, known = "its GPT-2 takes no adapters", "vLLM's list of supported models"
        yield ServingNote("vLLM", "target_modules of GPT-2", reason, _MERGE, known)
    if "conv2d" in kinds:
        reason, known = "it adapts linear layers and embeddings only", "vllm/lora/layers"
        yield ServingNote("vLLM", "target_modules with convolutions", reason, _MERGE, known)


def _of_llama_cpp(
    kinds: Sequence[str], modules_to_save: Sequence[str], rslora: bool, tied_head: bool
) -> Iterator[ServingNote]:
    if modules_to_save:
        setting = f"modules_to_save = {', '.join(modules_to_save)}"
        reason = "its converter takes low-rank factors only"
        yield ServingNote("llama.cpp", setting, reason, _MERGE, "ggml-org/llama.cpp#11554")
    if rslora:
        reason = "its converter passes on alpha alone, so the scale is too small by sqrt(rank)"
        yield ServingNote("llama.cpp", "rslora = true", reason, _MERGE, _CONVERTER)
    if tied_head:
        reason = "the update of a head tied to the embedding is refused in converting"
        known = "ggml-org/llama.cpp#9065"
        yield ServingNote("llama.cpp", "target_modules with lm_head", reason, _MERGE, known)
    if "conv2d" in kinds:
        reason = "its converter takes matrices only"
        setting = "target_modules with convolutions"
        yield ServingNote("llama.cpp", setting, reason, _MERGE, _CONVERTER)

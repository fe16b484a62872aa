"""What other programs cannot do with an adapter, said while the run is still being planned.

One small table, each line with where it is known from. It is about serving the *adapter* beside
its base; a merged export has none of these limits. Versions move: the lines are what those
projects' trackers and documents said by the end of 2025.
"""

from collections.abc import Sequence
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


def serving_notes(
    *,
    rank: int,
    kinds: Sequence[str],
    modules_to_save: Sequence[str] = (),
    rank_pattern: Sequence[int] = (),
    adapts_head: bool = False,
    tied_head: bool = False,
) -> list[ServingNote]:
    """What vLLM and llama.cpp cannot do with such an adapter.

    Args:
        rank: Of the adapter.
        kinds: Kinds of its modules: "linear", "conv1d", "conv2d", "embedding".
        modules_to_save: Modules trained in full.
        rank_pattern: Further ranks.
        adapts_head: Whether the output head has a low-rank update.
        tied_head: Whether the head's weight is the token embedding's.

    >>> [note.setting for note in serving_notes(rank=8, kinds=["linear"])]
    []
    """
    notes: list[ServingNote] = []

    def note(server: str, setting: str, reason: str, way_out: str, source: str) -> None:
        notes.append(ServingNote(server, setting, reason, way_out, source))

    if modules_to_save:
        setting = f"modules_to_save = {', '.join(modules_to_save)}"
        note("vLLM", setting, "refused", _MERGE, "vllm-project/vllm#9280")
        reason = "its converter takes low-rank factors only"
        note("llama.cpp", setting, reason, _MERGE, "ggml-org/llama.cpp#11554")
    largest = max([rank, *rank_pattern])
    if largest > VLLM_RANKS[-1]:
        reason = f"more than {VLLM_RANKS[-1]} is not possible"
        note("vLLM", f"rank = {largest}", reason, f"lower it, or {_MERGE}", "vLLM LoRAConfig")
    elif largest > VLLM_DEFAULT_MAX_RANK:
        needed = next(size for size in VLLM_RANKS if size >= largest)
        reason = f"refused at its default of {VLLM_DEFAULT_MAX_RANK}"
        way_out = f"start it with --max-lora-rank {needed}"
        note("vLLM", f"rank = {largest}", reason, way_out, "vllm-project/vllm#2847")
    if "conv1d" in kinds:
        reason = "its GPT-2 takes no adapters"
        note("vLLM", "target_modules of GPT-2", reason, _MERGE, "vLLM's list of supported models")
    if adapts_head and tied_head:
        reason = "the update of a head tied to the embedding has been dropped in converting"
        note("llama.cpp", "target_modules with lm_head", reason, _MERGE, "ggml-org/llama.cpp#9065")
    return notes

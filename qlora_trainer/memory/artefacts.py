"""What a run takes of the host: RAM in each phase, and disk for all it leaves.

Each number is of named code. Only `PROCESS_BYTES` and `_MERGE_BYTES` are estimates: the first of
what the libraries take with CUDA, the second the bound that `tests/export/test_memory.py` holds
every merge to, in a fresh process and beside three times its largest tensor.
"""

from qlora_trainer.memory.program import Accounts

PROCESS_BYTES = 1100 * 2**20  # torch, transformers and bitsandbytes with CUDA, an estimate
_MERGE_BYTES = 300 * 10**6  # buffers of reading and writing
_ADAPTERS = 3  # the best one, the last one, and one while it is written


def host_bytes_by_phase(accounts: Accounts) -> dict[str, int]:
    """Host RAM of a run on a card, by phase.

    `rehearsal` (where `memory.rehearse` asks for one) holds everything trained a second time and
    saves meanwhile. `resume` counts a state's files as held, of which the system can drop what is
    only mapped. `merge` is `qlora export`, a process of its own, without its proof.
    """
    standing = PROCESS_BYTES + accounts.host_table_bytes + accounts.waiting_bytes
    states = standing + accounts.paged_bytes
    step = states + accounts.pinned_bytes  # pinned blocks are kept for the next step
    rows = accounts.looked_up_bytes  # gone before the first layer computes
    snapshot = accounts.trained_bytes + accounts.optimizer_bytes
    largest = accounts.largest_tensor_bytes
    return {
        # weights are memory-mapped; one tensor at a time is private
        "load": standing + 2 * largest,
        "rehearsal": step + snapshot + max(rows, accounts.saving_bytes),
        "forward": step + rows,
        "backward": step,
        "optimizer step": step,
        "evaluation": step + rows,
        "save": step + accounts.saving_bytes,
        "resume": states + accounts.resuming_bytes,
        "merge": PROCESS_BYTES + 3 * largest + _MERGE_BYTES,
    }


def disk_peak_bytes(accounts: Accounts, keep_last: int) -> dict[str, int]:
    """Artefact -> most bytes on the disk at one time, the one being written included.

    Args:
        accounts: Of the simulated run.
        keep_last: Saved states kept; the oldest goes only after the newest stands.
    """
    state = accounts.trained_bytes + accounts.optimizer_bytes
    return {
        "adapters": _ADAPTERS * accounts.trained_bytes,
        "saved states": (keep_last + 1) * state,
        "merged export": merged_bytes(accounts),
    }


def merged_bytes(accounts: Accounts) -> int:
    """The base's tensors in 16 bits."""
    return 2 * accounts.base_parameters

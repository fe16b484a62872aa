"""What may change between a run and its resumption, and what cannot hold.

A saved state fits one model, one set of adapters, one order of data. Settings that touch those are
refused; what only changes the road from here on (length, learning rate, evaluation, output) is
allowed and said aloud, because the result is then no longer that of an uninterrupted run.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qlora_trainer.errors import UserError

# What a run and its saved states are tied to, by its name in a state's `identity`.
_TIED_TO = {
    "base_fingerprint": "the base model's files",
    "data_fingerprint": "the training data (rows, template or order)",
    "eval_fingerprint": "the held-out data (rows or template)",
}

# Anything not listed is refused: a new setting is safe until someone has thought about it.
MAY_CHANGE = (
    "memory",
    "output",
    "evaluation.every_steps",
    "evaluation.micro_batch_size",
    "evaluation.early_stopping_patience",
    "model.device",
    "model.attention",
    "model.trust_remote_code",
    "model.embeddings_on_host",
    "model.head_on_host",
    "model.stream_layers",
    "model.shard_layers",
    "model.quantized_cache",
    "train.epochs",
    "train.max_steps",
    "train.learning_rate",
    "train.schedule",
    "train.warmup_ratio",
    "train.warmup_steps",
    "train.weight_decay",
    "train.max_grad_norm",
    "train.beta1",
    "train.beta2",
    "train.epsilon",
    "train.activations",
    "train.attention_keeps_probabilities",
    "train.compile",
    "train.loss_chunk_tokens",
)


@dataclass(frozen=True)
class SettingsDifferences:
    """Differences between the saved run's settings and this run's, one line each."""

    refused: list[str]
    allowed: list[str]


def compare_settings(
    old: Mapping[str, Any], new: Mapping[str, Any], *, may_change: tuple[str, ...] = MAY_CHANGE
) -> SettingsDifferences:
    """Compare two resolved run files, leaf by leaf.

    >>> found = compare_settings({"train": {"seed": 1, "epochs": 1}}, {"train": {"seed": 2}})
    >>> found.refused, found.allowed
    (['train.seed: was 1, now 2'], ["train.epochs: was 1, now 'not set'"])
    """
    refused: list[str] = []
    allowed: list[str] = []
    for key, line in differences(old, new):
        may = any(key == prefix or key.startswith(f"{prefix}.") for prefix in may_change)
        (allowed if may else refused).append(line)
    return SettingsDifferences(refused, allowed)


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Leaves that differ between two trees: key, and what it was and is."""
    before, after = dict(_leaves(old)), dict(_leaves(new))
    found = []
    for key in sorted(before.keys() | after.keys()):
        was, now = before.get(key, "not set"), after.get(key, "not set")
        if was != now:
            found.append((key, f"{key}: was {was!r}, now {now!r}"))
    return found


def require_same_things(old: Mapping[str, Any], new: Mapping[str, Any], *, where: str) -> None:
    """Refuse to go on with another base or other data than the run began with.

    Args:
        old: Fingerprints recorded then; one that was not recorded is not compared.
        new: Fingerprints now.
        where: What they were recorded with.

    Raises:
        UserError: Names everything that has changed.
    """
    changed = [text for key, text in _TIED_TO.items() if key in old and old[key] != new.get(key)]
    if changed:
        raise UserError.from_faults(
            f"{where}: what this run depends on has changed since; put it back, or pass --restart",
            [f"{text} have changed" for text in changed],
        )


def require_same_run(differences: SettingsDifferences) -> None:
    """Refuse what cannot hold.

    Raises:
        UserError: With every difference that stands in the way.
    """
    if differences.refused:
        raise UserError.from_faults(
            "the run file differs from the saved run where it cannot; put these back, name "
            "another output.folder, or pass --restart to discard the saved run",
            differences.refused,
        )


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            found += _leaves(value, f"{prefix}{key}.")
        else:
            found.append((f"{prefix}{key}", list(value) if isinstance(value, tuple) else value))
    return found

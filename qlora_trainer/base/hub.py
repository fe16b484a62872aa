"""From what the user wrote to a folder on disk: a local path, or a hub model pinned to a commit.

A local folder needs no network. From the hub only configuration, tokenizer and safetensors come,
never a pickle; downloads resume, and land in huggingface_hub's own cache, so that a model another
tool brought is found. Which files, is read from the repository's list first: copies of the weights
in other formats stay where they are, and a model without safetensors or a full disk is said before
the first byte. `HF_HUB_OFFLINE=1` is respected.
"""

import json
import logging
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import HfApi, constants, errors, hf_hub_download, snapshot_download
from huggingface_hub.utils._validators import validate_repo_id

from qlora_trainer.base.checkpoint import INDEX_FILE, SINGLE_FILE, open_checkpoint
from qlora_trainer.base.hub_failures import (
    HUB_FAILURES,
    TRANSFER_FAILURES,
    explain_hub_error,
    hub_status,
)
from qlora_trainer.base.shard_header import strange_shards
from qlora_trainer.errors import UserError, first_line
from qlora_trainer.units import format_bytes

_LOG = logging.getLogger(__name__)
_TEXT_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".spm", ".codes", ".tokenizer")
_PREPROCESSING = ("*token*", "vocab*", "*processor_config.json", "*.spm", "*.model", "*.codes")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class ResolvedModel:
    """A model on disk.

    Attributes:
        folder: Where its files are.
        source: What the user wrote.
        revision: The full commit it is pinned to; None for a local folder.
    """

    folder: Path
    source: str
    revision: str | None


def resolve_model(
    source: str,
    revision: str | None = None,
    *,
    cache_dir: Path | None = None,
    trust_remote_code: bool = False,
) -> ResolvedModel:
    """Find a model on disk or bring it from the hub.

    Args:
        source: A folder, or `owner/name` on the hub. A folder that exists wins.
        revision: Branch, tag or commit on the hub; None for its main branch.
        cache_dir: Where hub models are kept; None for huggingface_hub's own place.
        trust_remote_code: Bring the model's Python files too.

    Raises:
        UserError: No such folder or model, no right to it, no network, no safetensors, no space.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise UserError(
                f"model.revision = {revision!r}: {source} is a local folder, which has no "
                "revisions; leave it out"
            )
        return ResolvedModel(folder.resolve(), source, None)
    _check_hub_name(source)
    snapshot = _whole(source, revision, cache_dir, trust_remote_code)
    if snapshot is None and not _is_offline():
        snapshot = _fetch(source, revision, cache_dir, trust_remote_code)
    if snapshot is None:
        snapshot = _cached(source, revision, cache_dir)
    commit = snapshot.name if _COMMIT.fullmatch(snapshot.name) else None
    return ResolvedModel(snapshot, source, commit)


def choose_files(names: list[str], shards: list[str], *, trust_remote_code: bool) -> list[str]:
    """Of a repository's files, those a run needs.

    Args:
        names: All of its files.
        shards: The weight files, from the index or the single file.
        trust_remote_code: Take Python files as well.
    """
    suffixes = (*_TEXT_SUFFIXES, ".py") if trust_remote_code else _TEXT_SUFFIXES
    chosen = set(shards)
    for name in names:
        folder, _, file = name.rpartition("/")
        in_place = not folder or (file.endswith(".jinja") and folder == "additional_chat_templates")
        if in_place and file.endswith(suffixes) and not file.endswith(".bin.index.json"):
            chosen.add(name)
    return sorted(chosen)


def _check_hub_name(source: str) -> None:
    looks_local = source.startswith(("/", "./", "../", "~", ".\\")) or "\\" in source
    if looks_local or source.count("/") > 1:
        raise UserError(f"{source}: no such folder; name a model folder, or owner/name on the hub")
    if Path(source).exists():
        raise UserError(f"{source} is a file; name the folder that holds config.json")
    try:
        validate_repo_id(source)
    except errors.HFValidationError as error:
        raise UserError(
            f"{source!r} is neither a folder nor a hub name (owner/name): {first_line(error)}"
        ) from error


def _fetch(
    source: str, revision: str | None, cache_dir: Path | None, trust_remote_code: bool
) -> Path | None:
    """Bring what is not here yet; None where there is no network, which is said aloud."""
    try:
        info = HfApi().model_info(source, revision=revision, files_metadata=True)
    except HUB_FAILURES as error:
        if (hub_status(error) or 500) < 500:  # the hub answers, and says no
            raise explain_hub_error(error, source, revision) from error
        _LOG.warning(
            "%s: the hub cannot be reached (%s); looking in the cache", source, first_line(error)
        )
        return None
    sizes = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or ()}
    try:
        shards = _weight_files(source, revision, cache_dir, set(sizes))
        wanted = choose_files(list(sizes), shards, trust_remote_code=trust_remote_code)
        _check_space(source, wanted, sizes, info.sha, cache_dir)
        with _transfer(source, revision):
            found = snapshot_download(
                source, revision=revision, cache_dir=cache_dir, allow_patterns=wanted
            )
    except HUB_FAILURES as error:
        raise explain_hub_error(error, source, revision) from error
    return Path(found)


def _whole(
    source: str, revision: str | None, cache_dir: Path | None, trust_remote_code: bool
) -> Path | None:
    """A commit's snapshot with nothing left to fetch: it cannot change, so nobody is asked."""
    if revision is None or not _COMMIT.fullmatch(revision):
        return None
    suffixes = (*_TEXT_SUFFIXES, ".py") if trust_remote_code else _TEXT_SUFFIXES
    try:  # fails where the list of the repository's files, if it was kept, names one not here
        folder = Path(
            snapshot_download(
                source, revision=revision, cache_dir=cache_dir, local_files_only=True,
                allow_patterns=[f"*{suffix}" for suffix in suffixes],
                ignore_patterns=["*/*", "*.bin.index.json"],
            )
        )  # fmt: skip
        open_checkpoint(folder)
    except (OSError, UserError):
        return None
    # Another tool may have brought the weights alone.
    return folder if any(any(folder.glob(pattern)) for pattern in _PREPROCESSING) else None


def _cached(source: str, revision: str | None, cache_dir: Path | None) -> Path:
    """The snapshot in the cache; that it is whole, `checkpoint.open_checkpoint` looks at."""
    path = huggingface_hub.try_to_load_from_cache(
        source, "config.json", cache_dir=cache_dir, revision=revision
    )
    if isinstance(path, str):
        return Path(path).parent
    place = cache_dir or constants.HF_HUB_CACHE
    why = (
        "HF_HUB_OFFLINE forbids fetching it; unset it for one run"
        if _is_offline()
        else "the hub cannot be reached; check the network and run again (a download resumes)"
    )
    raise UserError(
        f"{source} (revision {revision or 'main'}) is not in the cache ({place}) and {why}, or "
        "name a folder that holds the model"
    )


def _weight_files(
    source: str, revision: str | None, cache_dir: Path | None, names: set[str]
) -> list[str]:
    if SINGLE_FILE in names:
        return [SINGLE_FILE]
    if INDEX_FILE in names:
        return _index_shards(source, revision, cache_dir)
    others = sorted(name for name in names if name.endswith((".bin", ".pt", ".gguf")))
    raise UserError(
        f"{source} has no safetensors weights, only: {', '.join(others) or 'none'}; "
        "pickles are never loaded. Take a revision with safetensors (often a pull request: "
        "refs/pr/N), or convert it with https://huggingface.co/spaces/safetensors/convert"
    )


def _index_shards(source: str, revision: str | None, cache_dir: Path | None) -> list[str]:
    with _transfer(source, revision):
        path = hf_hub_download(source, INDEX_FILE, revision=revision, cache_dir=cache_dir)
    try:
        content: Any = json.loads(Path(path).read_text(encoding="utf-8"))
        # The names become patterns of what to fetch, so a `*` here would fetch anything.
        if strange := strange_shards(content["weight_map"]):
            raise UserError.from_faults(f"{source}: {INDEX_FILE} cannot be followed", strange)
        return sorted(set(content["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{source}: its {INDEX_FILE} is broken ({error})") from error


def _check_space(
    source: str, wanted: list[str], sizes: dict[str, int], commit: str | None, cache: Path | None
) -> None:
    """Refuse a download the disk cannot hold, counting only files that are not here yet."""
    missing_bytes = sum(
        sizes.get(name, 0)
        for name in wanted
        if not isinstance(
            huggingface_hub.try_to_load_from_cache(source, name, cache_dir=cache, revision=commit),
            str,
        )
    )
    target = Path(cache or constants.HF_HUB_CACHE).absolute()
    free_bytes = shutil.disk_usage(next(p for p in (target, *target.parents) if p.exists())).free
    if missing_bytes > free_bytes:
        raise UserError(
            f"{source}: {format_bytes(missing_bytes)} are still to come, {target} has "
            f"{format_bytes(free_bytes)} free; free space, or set HF_HOME to another disk"
        )


@contextmanager
def _transfer(source: str, revision: str | None) -> Iterator[None]:
    """Tell what ends a download; hf_xet says a lost network and a full disk by RuntimeError."""
    try:
        yield
    except TRANSFER_FAILURES as error:
        raise explain_hub_error(error, source, revision) from error


def _is_offline() -> bool:
    return bool(constants.HF_HUB_OFFLINE)

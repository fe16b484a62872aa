"""A run's settings made whole: to hold anywhere, and to be compared with those of another day."""

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from qlora_trainer.config.settings import RunConfig

_FIRST_MEGA_BATCH = 50  # what `data.mega_batch_mult` was before it was a setting


def with_todays_defaults(earlier: dict[str, Any] | None) -> dict[str, Any] | None:
    """Settings of a run that an older version began, whole: what is new since as it was then.

    What did not exist stands at its default; the order of rows stays what it was.
    """
    if earlier is None:
        return None
    try:
        run = RunConfig.model_validate(earlier)
    except ValidationError:
        return earlier  # a setting has gone or is narrower now: the comparison names it
    settings = run.model_dump()
    if "mega_batch_mult" not in earlier["data"] and run.data.group_by_length:
        settings["data"]["mega_batch_mult"] = None if run.data.packing else _FIRST_MEGA_BATCH
    return settings


def at_the_same_commit(run: RunConfig, earlier: dict[str, Any]) -> RunConfig:
    """Go on with the commit of a hub model that the run began with, whatever its branch is now."""
    model = earlier.get("model") or {}
    if run.model.revision is not None or model.get("source") != run.model.source:
        return run
    pinned = run.model.model_copy(update={"revision": model.get("revision")})
    return run.model_copy(update={"model": pinned})


def with_the_same_dtype(run: RunConfig, begun: dict[str, Any] | None) -> RunConfig:
    """Go on in the dtype that the run began to compute in, whatever is native where it goes on.

    Args:
        run: As it is asked for now.
        begun: The environment of the run's beginning, as `environment.json` holds it.
    """
    if begun is None or "compute_dtype" not in begun or run.model.compute_dtype != "auto":
        return run
    model = run.model.model_copy(update={"compute_dtype": begun["compute_dtype"]})
    return run.model_copy(update={"model": model})


def with_the_same_chunk(run: RunConfig, earlier: dict[str, Any]) -> RunConfig:
    """Go on with the loss's chunk that the run began with, whatever memory leaves room for now."""
    began = (earlier.get("train") or {}).get("loss_chunk_tokens")
    return run if run.train.loss_chunk_tokens is not None else with_chunk(run, began)


def with_the_same_order(run: RunConfig, earlier: dict[str, Any]) -> RunConfig:
    """Go on with the rows in the order that the run began in, whatever is the default now."""
    began = (earlier.get("data") or {}).get("mega_batch_mult")
    if run.data.mega_batch_mult is not None:
        return run
    data = run.data.model_copy(update={"mega_batch_mult": began})
    return run.model_copy(update={"data": data})


def with_chunk(run: RunConfig, tokens: int | None) -> RunConfig:
    """The run with the loss's chunk that was chosen for it."""
    train = run.train.model_copy(update={"loss_chunk_tokens": tokens})
    return run.model_copy(update={"train": train})


def resolved_settings(run: RunConfig, revision: str | None) -> dict[str, Any]:
    """Every setting, so that the run file holds anywhere: paths absolute, a hub commit pinned.

    Args:
        run: As the user gave it.
        revision: The commit found for a hub model; None for a local folder.
    """
    settings = run.model_dump()
    settings["model"]["revision"] = revision or run.model.revision
    if run.model.chat_template is not None:
        settings["model"]["chat_template"] = _absolute(run.model.chat_template)
    if run.model.quantized_cache is not None:
        quantized = Path(run.model.quantized_cache).expanduser().absolute()
        settings["model"]["quantized_cache"] = str(quantized)
    if run.data.cache_folder is not None:
        cache_folder = Path(run.data.cache_folder).expanduser().absolute()
        settings["data"]["cache_folder"] = str(cache_folder)
    settings["model"]["source"] = _absolute(settings["model"]["source"])
    if run.adapter.init_from is not None:
        settings["adapter"]["init_from"] = _absolute(run.adapter.init_from)
    for source in (*settings["data"]["train"], *settings["data"]["eval"]):
        source["path"] = _absolute(source["path"])
    settings["output"]["folder"] = str(Path(run.output.folder).expanduser().absolute())
    return settings


def _absolute(source: str) -> str:
    """A local path made absolute; the name of something on the hub as it is."""
    path = Path(source).expanduser()
    is_local = path.exists() or any(character in source for character in "*?[")
    return str(path.absolute()) if is_local else source

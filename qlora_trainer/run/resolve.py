"""A run's settings made whole: to hold anywhere, and to be compared with those of another day."""

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from qlora_trainer.config.settings import RunConfig

_FIRST_MEGA_BATCH = 50  # what `data.mega_batch_mult` was before it was a setting
_CHOSEN_AT_THE_BEGINNING = (("train", "loss_chunk_tokens"), ("data", "mega_batch_mult"))


def earlier_made_whole(earlier: dict[str, Any] | None) -> dict[str, Any] | None:
    """Settings of a run that perhaps an older version began, with those it did not know.

    These stand at their defaults, and the order of rows at what it was.
    """
    if earlier is None:
        return None
    try:
        run = RunConfig.model_validate(earlier)
    except ValidationError:
        return earlier  # a setting has gone or is narrower now: the comparison names it
    sorts = run.data.group_by_length and not run.data.packing
    if sorts and "mega_batch_mult" not in earlier["data"]:
        run = with_setting(run, "data", "mega_batch_mult", _FIRST_MEGA_BATCH)
    return run.model_dump()


def at_the_same_commit(run: RunConfig, earlier: dict[str, Any]) -> RunConfig:
    """Go on with the commit of a hub model that the run began with, whatever its branch is now."""
    model = earlier.get("model") or {}
    if run.model.revision is not None or model.get("source") != run.model.source:
        return run
    return with_setting(run, "model", "revision", model.get("revision"))


def with_the_same_dtype(run: RunConfig, begun: dict[str, Any] | None) -> RunConfig:
    """Go on in the dtype that the run began to compute in, whatever is native where it goes on.

    Args:
        run: As it is asked for now.
        begun: The environment of the run's beginning, as `environment.json` holds it.
    """
    if begun is None or "compute_dtype" not in begun or run.model.compute_dtype != "auto":
        return run
    return with_setting(run, "model", "compute_dtype", begun["compute_dtype"])


def with_the_same_choices(run: RunConfig, earlier: dict[str, Any]) -> RunConfig:
    """Go on with what the run began with where nothing is asked for now.

    That is the loss's chunk, whatever memory leaves room for, and the order of rows, whatever is
    the default.
    """
    for section, name in _CHOSEN_AT_THE_BEGINNING:
        if getattr(getattr(run, section), name) is None:
            run = with_setting(run, section, name, (earlier.get(section) or {}).get(name))
    return run


def with_setting(run: RunConfig, section: str, name: str, value: object) -> RunConfig:
    """The run with one setting that was chosen for it."""
    changed = getattr(run, section).model_copy(update={name: value})
    return run.model_copy(update={section: changed})


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

"""What the hub's libraries raise where network, hub or disk fail them, and what each means.

huggingface_hub and `datasets` wrap what happened (a refusal may be the cause of a file not found),
and hf_xet says everything by RuntimeError, so a reason is looked for down the chain of causes.
"""

from collections.abc import Iterator

from huggingface_hub import constants, errors

from qlora_trainer.errors import UserError, first_line

_FULL_DISK = ("No space left", "Not enough disk space")
# Of the HTTP library below huggingface_hub; which one that is depends on its age.
HTTP_FAILURE: type[Exception] = getattr(errors, "HTTPError", errors.HfHubHTTPError)
HUB_FAILURES: tuple[type[Exception], ...] = (OSError, errors.EntryNotFoundError, HTTP_FAILURE)
TRANSFER_FAILURES: tuple[type[Exception], ...] = (*HUB_FAILURES, RuntimeError)


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, what caused it, and so on."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__


def hub_status(error: BaseException) -> int | None:
    """The status the hub answered with, if it did."""
    for cause in causes(error):
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if isinstance(status, int):
            return status
    return None


def is_full_disk(error: BaseException) -> bool:
    """Whether the disk had no room left."""
    return any(
        getattr(cause, "errno", None) == 28 or any(words in str(cause) for words in _FULL_DISK)
        for cause in causes(error)
    )


def explain_hub_error(error: Exception, source: str, revision: str | None) -> UserError:
    """What a failure means and what to do about it."""
    page = f"{constants.ENDPOINT}/{source}"
    if isinstance(error, errors.GatedRepoError):
        text = (
            f"{source} is gated: accept its conditions at {page} with your account, then run "
            "`hf auth login` (or set HF_TOKEN) on this machine"
        )
    elif isinstance(error, errors.RepositoryNotFoundError):
        text = (
            f"{source} is not on the hub, or is private: check the spelling at {page}; for a "
            "private model run `hf auth login`; for a local model name its folder, which must exist"
        )
    elif isinstance(error, errors.RevisionNotFoundError):
        text = f"{source} has no revision {revision!r}; branches and tags: {page}/branches"
    elif is_full_disk(error):
        text = f"{source}: the disk is full ({constants.HF_HUB_CACHE}); free space, or set HF_HOME"
    elif hub_status(error) in (401, 403):
        text = (
            f"{source}: the hub refuses access ({hub_status(error)}); run `hf auth login` with an "
            f"account that may read {page}"
        )
    else:
        text = (
            f"{source} cannot be fetched ({type(error).__name__}: {first_line(error)}); check the "
            "network and run again: a download resumes. A local folder needs no network"
        )
    return UserError(text)

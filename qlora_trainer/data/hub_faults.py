"""Why a data set of the hub could not be had: the network, the disk, its files or our arguments.

`datasets` wraps what happened while it wrote its tables ("An error occurred while generating the
dataset"), so the reason is looked for down the chain of causes.
"""

from qlora_trainer.base.hub_failures import HTTP_FAILURE, causes, hub_status, is_full_disk

_XET = ("CAS Client", "Task error", "reconstruction error", "error sending request")


def explain_data_error(error: Exception) -> str:
    """One line on what `datasets.load_dataset` raised, and the way out.

    Args:
        error: What was raised: of `datasets`, of huggingface_hub, of hf_xet or of the system.
    """
    from datasets.exceptions import DatasetGenerationCastError, DatasetsError

    chain = list(causes(error))
    if is_full_disk(error):
        return f"the disk is full ({_line(chain[-1])}); free space, or set HF_HOME to another disk"
    if (status := hub_status(error)) in (401, 403):
        return (
            f"the hub refuses access ({status}); run `hf auth login` with an account that may "
            "read this data set"
        )
    if isinstance(error, (FileNotFoundError, ConnectionError)):  # also DatasetNotFoundError
        return (
            "no such file here, and no such data set could be fetched from the Hugging Face hub "
            f"({_line(error)}); mend the path, or go online (unset HF_HUB_OFFLINE), or download "
            "the files and give their folder; a gated data set needs `hf auth login`"
        )
    for cause in chain:
        lost = isinstance(cause, (HTTP_FAILURE, ConnectionError, TimeoutError))
        if lost or (isinstance(cause, RuntimeError) and any(w in str(cause) for w in _XET)):
            return (
                f"cannot be fetched ({type(cause).__name__}: {_line(cause)}); check the network "
                "and run again"
            )
    # A cast's own error lists both schemas; the one around it says which columns differ.
    last = next((c for c in chain if isinstance(c, DatasetGenerationCastError)), chain[-1])
    if isinstance(error, DatasetsError):
        return (
            f"its files cannot be made into a table ({type(last).__name__}: {_line(last)}); set "
            "`name` to one configuration, or download the files and give those that fit"
        )
    if isinstance(error, OSError):
        return f"cannot be read ({type(error).__name__}: {_line(error)}); mend it and run again"
    return f"{error}; set `name` and `split` of the data set"


def _line(error: BaseException) -> str:
    """All of a message in one line, at most 300 characters."""
    return " ".join(str(error).split())[:300] or type(error).__name__

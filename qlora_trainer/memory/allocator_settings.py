"""What of torch's allocator configuration decides a prediction, read as torch reads it.

Of the three variables torch 2.13 takes the first that is set, even to nothing, and leaves the
others alone: the old names come first, whatever its documentation says (seen by asking it, which
the tests do again). A configuration is of a process on a machine; whoever asks about a card that
is elsewhere gets the defaults.

`expandable_segments` is modelled (`memory/allocator.py`). torch is built without it for Windows,
where it warns and goes on without; on WSL it is the Linux build and takes it.
"""

import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass

# In the order in which torch looks.
VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
_MODELLED = "expandable_segments"
_SPACES_AND_LISTS = re.compile(r"\s+|\[[^\]]*\]")


@dataclass(frozen=True)
class AllocatorSettings:
    """How torch's allocator works in a process.

    Attributes:
        expandable_segments: Segments grow, in place of many of fixed sizes.
        note: What of its configuration a prediction leaves out; None where there is nothing.
    """

    expandable_segments: bool = False
    note: str | None = None


def configured(environment: Mapping[str, str] = os.environ) -> tuple[str, str] | None:
    """The variable torch takes and what it says; None where none is set."""
    found = next((name for name in VARIABLES if name in environment), None)
    return None if found is None else (found, environment[found])


def allocator_settings(
    environment: Mapping[str, str] = os.environ, system: str = sys.platform
) -> AllocatorSettings:
    """The allocator's settings in such an environment.

    Args:
        environment: Variables by name.
        system: As `sys.platform` says it.
    """
    found = configured(environment)
    if found is None:
        return AllocatorSettings()
    pairs = (entry.partition(":") for entry in _SPACES_AND_LISTS.sub("", found[1]).split(","))
    values = {key: value for key, _, value in pairs if key}
    asked = values.pop(_MODELLED, "False") == "True"  # torch takes no other spelling
    left_out = [key for key, value in values.items() if (key, value) != ("backend", "native")]
    if asked and system == "win32":
        left_out.insert(0, f"{_MODELLED} (torch has none on Windows)")
    note = None
    if left_out:
        note = f"{found[0]}: foreseen without {', '.join(left_out)}"
    return AllocatorSettings(asked and system != "win32", note)

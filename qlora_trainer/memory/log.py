"""The log of a watched program: storages, their births and deaths, and who made them."""

import functools
from dataclasses import dataclass, field
from types import CodeType, FrameType
from typing import TypeAlias

# kinds of event; the second element says what it is about
ALLOCATE, FREE, PHASE, EMPTY_CACHE, RESET_PEAK, RECORD_STREAM, SYNCHRONIZE = range(7)

Event: TypeAlias = tuple[int, int | str]


@dataclass(slots=True)
class Allocation:
    """One storage (or one workspace) of the program, whatever views share it."""

    size_bytes: int
    phase: str
    operator: str
    code: CodeType | None
    line: int
    component: str
    stream: int = 0
    on_host: bool = False

    @property
    def where(self) -> str:
        """File and line of the Python code that made it."""
        if self.code is None:
            return "(inside torch)"
        name = self.code.co_filename
        for marker in ("/site-packages/", "/qlora_trainer/"):
            if marker in name:
                name = ("qlora_trainer/" if "qlora" in marker else "") + name.split(marker)[-1]
                break
        return f"{name}:{self.line} in {self.code.co_name}"


@dataclass
class Log:
    """Births and deaths in order: `events` refer to `allocations` by index."""

    allocations: list[Allocation] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    kernels: dict[str, int] = field(default_factory=dict)
    bounded: dict[str, int] = field(default_factory=dict)  # operator -> bytes, by `stand_in.py`


WRAPPERS = ("torch/_dynamo/eval_frame.py", "torch/_compile.py")
_SKIP = (
    "/torch/",
    "/memory/shapes.py",
    "/memory/log.py",
    "/memory/tracker.py",
    "/memory/cuda_rules.py",
    "/memory/simulate.py",
    "/memory/stand_in.py",
)


@functools.cache
def _is_plumbing(code: CodeType) -> bool:
    name = code.co_filename
    return name.startswith("<") or any(part in name for part in _SKIP)


def maker_of(frame: FrameType | None) -> tuple[CodeType | None, int]:
    """The nearest Python frame that is not torch's own or this room's plumbing."""
    while frame is not None:
        if not _is_plumbing(frame.f_code):
            return frame.f_code, frame.f_lineno
        frame = frame.f_back
    return None, 0

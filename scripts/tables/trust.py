"""What was done to real runs and readers, and what came of it."""

from __future__ import annotations

from typing import Any

from tables.common import markdown, recorded, result

_KINDS = {
    "kill": "killed (SIGKILL)",
    "terminate": "asked to stop (SIGTERM)",
    "pause": "stopped and let go on (SIGSTOP, SIGCONT)",
    "disk-full": "disk full",
    "read-only": "run folder read-only",
    "lost-data": "rows gone",
    "clock-back": "clock a month back",
    "corrupted-state": "newest saved state damaged",
    "out-of-memory": "no more memory from the system",
    "nan": "NaN in the loss of a batch",
    "one-of-two": "one of two processes killed",
}


def trust() -> str:
    """A line for each kind of fault; soak, memory, fuzzing, processes, seeds, versions below.

    Of what was not measured nothing is said.
    """
    chaos = recorded("chaos")
    found = [_memory(), _fuzz(), _bad_inputs(), _processes(), _seeds(), _window()]
    said = "\n".join(f"- {line}" for line in [chaos and _soak(chaos), *found] if line)
    return f"{_faults(chaos)}\n\n{said}" if chaos else said


def _faults(found: dict[str, Any]) -> str:
    rows = [
        [_KINDS.get(kind, kind), *(str(tally[key]) for key in
         ("injected", "survived", "steps_lost", "most_steps_lost"))]
        for kind, tally in found["faults"].items()
    ]  # fmt: skip
    head = ["fault", "injected", "survived", "steps made again", "most at once"]
    return markdown(head, rows)


def _soak(found: dict[str, Any]) -> str:
    injected = sum(tally["injected"] for tally in found["faults"].values())
    places = len(found["corrupted"])
    models = " and ".join(
        f"{run['model']}" + (f" ({count} processes)" if count != "1" else "")
        for count, run in found["runs"].items()
    )
    skipped = "".join(f" Left out: {kind}, {why}." for kind, why in found["skipped"].items())
    return (
        f"**Chaos** (`scripts/chaos.py`), {found['minutes']:.0f} minutes of {models}: "
        f"{injected} faults, {len(found['failures'])} not survived; {found['resumes']} "
        f"resumptions, {sum(found['rounds'].values())} runs brought to their end; of their "
        f"adapters' {found['bits_compared']:,} bits {found['bits_different']} differ from runs "
        "left alone. Survived: left as it should, with every saved step kept; made again: steps "
        f"after the last whole state. States were damaged at {places} places.{skipped}"
    )


def _memory() -> str | None:
    if (found := recorded("soak-memory")) is None:
        return None
    grown, known = found["after_warm_up"], found["at_known_lengths"]
    return (
        f"**Memory** (`scripts/soak_memory.py`): over {grown['steps']} steps of batches of "
        f"{found['lengths']} lengths the trainer's resident memory, what stays for the next step "
        f"in it, was {grown['last_quarter_bytes'] / 1e6:,.0f} MB in the last quarter, "
        f"{grown['growth']:+.2%} on the second quarter's; "
        f"{known['bytes_per_step'] / 1e3:+.1f} kB a step over the {known['steps']} "
        "whose batch was as long as an earlier one."
    )


def _fuzz() -> str | None:
    if (found := recorded("fuzz")) is None:
        return None
    rest = ", ".join(found["not_tried"])
    return (
        f"**Fuzzing** (`scripts/fuzz.py`, guided by coverage): {found['executions']:,} executions "
        f"over {len(found['targets'])} kinds of input in {found['minutes']:.0f} minutes, "
        f"{found['crashes']} crashes." + (f" Not tried: {rest}." if rest else "")
    )


def _bad_inputs() -> str | None:
    found = result("quickstart").get("bad-inputs")
    if found is None:
        return None
    return (
        f"**Bad inputs**: {found['kinds']} kinds of bad run files and data, each answered with "
        "where it is wrong and what to do; none with a traceback."
    )


def _processes() -> str | None:
    if (found := recorded("processes")) is None:
        return None
    together, shrunk = found["together"], found["ended_by_one"]
    same = together["same_tokens"] and shrunk["same_tokens"]
    tokens = "the same tokens" if same else "NOT the same tokens"
    return (
        f"**Processes** (`scripts/compare_processes.py`): {found['processes']} beside 1, {tokens} "
        f"in every step, losses within {together['largest_loss_difference']:.1e} and adapter "
        f"tensors within {together['largest_adapter_difference']:.1e} of their size; begun by "
        f"{found['processes']} and ended by 1, within {shrunk['largest_loss_difference']:.1e} and "
        f"{shrunk['largest_adapter_difference']:.1e}."
    )


def _seeds() -> str | None:
    if (found := recorded("seeds")) is None:
        return None
    ends = found["held_out_difference"]
    return (
        f"**Seeds** (`scripts/seeds.py`): over {len(found['ours'])} seeds our held-out loss less "
        f"PEFT's is {ends['estimate']:+.5f} (95 % interval {ends['low']:+.5f} to "
        f"{ends['high']:+.5f}; sign flips p = {found['held_out_p']:.2f}); seeds alone spread it by "
        f"{found['held_out_spread_of_seeds']:.5f}. In {found['steps_apart']} of {found['steps']} "
        "steps the interval of the training losses' difference leaves 0 out."
    )


def _window() -> str | None:
    said = []
    for end in ("oldest", "newest"):
        if (found := recorded(f"window-{end}")) is None:
            continue
        versions = found.get("versions", {})
        named = ", ".join(
            f"{name} {versions[name]}" for name in ("torch", "transformers", "bitsandbytes")
            if name in versions
        )  # fmt: skip
        came = "pass" if found["passed"] else f"DO NOT pass ({found.get('stopped', 'unfinished')})"
        said.append(f"{end} ({named}): {len(found['tests'])} test files {came}")
    return f"**Versions** (`scripts/test_window.py`): {'; '.join(said)}." if said else None

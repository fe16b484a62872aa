"""How results look on a terminal; what they say comes as plain data from the rooms below."""

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from qlora_trainer.base.audit import BaseAudit
from qlora_trainer.base.machine import Finding
from qlora_trainer.data.gate import GateReport, PartReport, Sample
from qlora_trainer.run.compare import Compared
from qlora_trainer.run.evaluate import Evaluated
from qlora_trainer.run.report import Reporter
from qlora_trainer.run.train import TrainResult
from qlora_trainer.units import format_bytes

_BAR = "█"
_BAR_WIDTH = 40
_SAMPLE_CHARACTERS = 1200

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)


class ConsoleReporter(Reporter):
    """Shows a run on the terminal: bars on standard error, results on standard output."""

    def __init__(self) -> None:
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._what = ""

    def __enter__(self) -> "ConsoleReporter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def console(self) -> Console:
        """The training loop shows itself on standard error."""
        return err

    def say(self, line: str) -> None:
        """Show one line, above any bar."""
        self.close()
        err.print(escape(line))

    def gate(self, report: GateReport) -> None:
        """Show the data."""
        self.close()
        show_gate(report)

    def audit(self, audit: BaseAudit) -> None:
        """Show the base."""
        self.close()
        show_audit(audit)

    def progress(self, what: str, done: int, total: int | None) -> None:
        """Move a bar, on a terminal only."""
        if not err.is_terminal:
            return
        if what != self._what:
            self.close()
            columns = (
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
                TimeRemainingColumn(),
            )  # fmt: skip
            self._bar = Progress(*columns, console=err, transient=True)
            self._what, self._task = what, self._bar.add_task(what, total=total)
            self._bar.start()
        assert self._bar is not None
        assert self._task is not None
        self._bar.update(self._task, completed=done, total=total)

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
        self._bar, self._task, self._what = None, None, ""

    def show_result(self, result: TrainResult) -> None:
        """The last lines of `qlora train`."""
        self.close()
        outcome = result.outcome
        out.print(f"\n[bold]{escape(outcome.reason)}[/] after {outcome.step} steps")
        best = f" (step {outcome.best_step})" if outcome.best_step != outcome.step else ""
        for name in dict.fromkeys(("loss", outcome.best_metric)):
            before, after = result.metrics.get(f"{name}_before"), result.metrics.get(name)
            if before is not None and after is not None:
                out.print(f"held-out {escape(name)} {before:.4f} before, {after:.4f} after{best}")
        out.print(f"run folder    {escape(str(result.folder))}")
        if result.adapter is not None:
            out.print(f"adapter       {escape(str(result.adapter))}")
            for what, command in next_commands(result):
                out.print(f"{what:<13} {escape(command)}")


def next_commands(result: TrainResult) -> list[tuple[str, str]]:
    """What to do with a finished run, and the command that does it."""
    folder = str(result.folder)
    if result.task == "causal-lm":
        return [("ask it", f"qlora generate {folder} 'your question'")]
    return [
        ("score it", f"qlora evaluate {folder} --data FILE"),
        ("ask it", f"qlora predict {folder} --data FILE --out predictions.jsonl"),
    ]


def show_error(message: str) -> None:
    """A user's fault, readable and on standard error."""
    err.print(f"[bold red]error:[/] {escape(message)}")


def show_answer(prompt: str, answer: str, adapter: bool | None) -> None:
    """One prompt and its answer; `adapter` names the side where both are shown."""
    side = {None: "", True: " [green](adapter)[/]", False: " [yellow](base)[/]"}[adapter]
    out.print(f"[dim]> {escape(prompt)}[/]{side}")
    out.print(escape(answer) + "\n")


def show_evaluation(found: Evaluated) -> None:
    """The report where there is one, the figures, and where they were written."""
    scores = found.evaluation.scores
    if scores is not None and scores.report:
        out.print(escape(scores.report) + "\n")
    width = max(20, *(len(name) for name in found.evaluation.metrics))
    for name, value in found.evaluation.metrics.items():
        shown = f"{value:,.0f}" if name in ("rows", "tokens") else f"{value:.4f}"
        out.print(f"{escape(name):<{width}} {shown}")
    out.print(f"{'written to':<{width}} {escape(str(found.folder))}")


def show_compared(found: Compared) -> None:
    """Zero-shot, few-shot and tuned in one table."""
    table = Table(box=None, pad_edge=False)
    table.add_column("asked")
    for name in ("exact match", "F1", "rows"):
        table.add_column(name, justify="right")
    for way, row in found.table.items():
        table.add_row(way, f"{row['exact_match']:.1%}", f"{row['f1']:.1%}", f"{row['rows']:,.0f}")
    out.print(table)
    out.print(f"answers in    {escape(str(found.folder / 'compare.jsonl'))}")


def show_findings(findings: list[Finding]) -> bool:
    """The table of `qlora doctor`; True where something is bad."""
    marks = {"good": "[green]ok[/]", "note": "[yellow]note[/]", "bad": "[bold red]bad[/]"}
    table = Table(box=None, pad_edge=False, show_header=False)
    for finding in findings:
        said = escape(finding.state)
        said += f"\n[dim]{escape(finding.advice)}[/]" if finding.advice else ""
        table.add_row(marks[finding.level], finding.topic, said)
    out.print(table)
    return any(finding.level == "bad" for finding in findings)


def show_audit(audit: BaseAudit) -> None:
    """Bytes of the base by role and dtype, and what stayed unquantized and why."""
    table = Table(title="base on its device", title_justify="left", box=None, pad_edge=False)
    for name in ("role", "dtype"):
        table.add_column(name)
    for name in ("tensors", "size"):
        table.add_column(name, justify="right")
    for role, dtype, count, size in audit.rows():
        table.add_row(role, dtype, f"{count:,}", format_bytes(size))
    table.add_row("[bold]total[/]", "", f"{len(audit.tensors):,}", format_bytes(audit.total_bytes))
    out.print(table)
    for tensor in audit.large_unquantized():
        out.print(
            f"  not quantized: {escape(tensor.name)} ({tensor.dtype}, "
            f"{format_bytes(tensor.size_bytes)}): {escape(tensor.kept_because or '')}"
        )
    out.print()


def show_gate(report: GateReport) -> None:
    """The data: counts, lengths, labels, examples, warnings."""
    _show_part("training data", report.train)
    if report.evaluation is not None:
        _show_part("held-out data", report.evaluation)
    if report.packing is not None:
        packing = report.packing
        out.print(
            f"packing       {packing.rows:,} rows of {packing.capacity:,} tokens, "
            f"{packing.efficiency:.1%} full"
        )
    if report.labels:
        total = sum(rows for _, rows in report.labels)
        shown = ", ".join(
            f"{escape(repr(label))} {rows / total:.1%}" for label, rows in report.labels[:8]
        )
        more = f" and {len(report.labels) - 8} more" if len(report.labels) > 8 else ""
        heading = "answers" if report.end_of_turn else "labels"
        out.print(f"{heading:<13} {shown}{more}")
    for name, value in report.facts:
        out.print(f"{escape(name):<13} {escape(value)}")
    if report.end_of_turn:
        out.print(f"answers end   with {escape(repr(report.end_of_turn))}")
    for number, sample in enumerate(report.samples, start=1):
        _show_sample(number, sample)
    for warning in report.warnings:
        out.print(f"[yellow]warning:[/] {escape(warning)}")
    out.print()


def _show_part(title: str, part: PartReport) -> None:
    out.print(f"[bold]{title}[/]")
    out.print(f"rows          {part.rows:,} ({part.distinct_rows:,} distinct)")
    if not part.tokens:  # images
        return
    counts = f"tokens        {part.tokens:,}"
    if part.trained_tokens:
        share = part.trained_tokens / part.tokens
        counts += f": {part.trained_tokens:,} trained ({share:.1%}), {part.masked_tokens:,} masked"
    out.print(counts)
    if part.long_rows:
        what = "truncated" if part.truncated_rows else "dropped"
        out.print(
            f"too long      {part.long_rows:,} rows {what}: {part.lost_tokens:,} tokens lost, "
            f"{part.lost_trained_tokens:,} of them trained, {part.cut_answers:,} answers cut"
        )
    lengths = part.lengths
    out.print(
        f"length        median {lengths.median}, 95 % within {lengths.p95}, "
        f"longest {lengths.longest} tokens"
    )
    most = max(rows for _, _, rows in lengths.histogram)
    for start, end, rows in lengths.histogram:
        if rows:
            bar = _BAR * max(1, round(_BAR_WIDTH * rows / most))
            out.print(f"  {start:>7,} to {end - 1:>7,}  [cyan]{bar}[/] {rows:,}")


def _show_sample(number: int, sample: Sample) -> None:
    text = Text(f"\nexample {number} ({sample.where}); what is learned is green\n", style="dim")
    shown = 0
    for piece, trained in sample.pieces:
        part = piece[: max(0, _SAMPLE_CHARACTERS - shown)]
        shown += len(piece)
        # Colour alone is lost in a file or to some eyes: trained pieces are bracketed as well.
        marked = f"«{part}»" if trained and part else part
        text.append(marked, style="green" if trained else "")
    if shown > _SAMPLE_CHARACTERS:
        text.append(f" ... ({shown - _SAMPLE_CHARACTERS:,} more characters)", style="dim")
    out.print(text)

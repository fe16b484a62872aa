"""The question turned round: what fits this card, and what makes a run fit that does not.

Every answer is a configuration that was simulated; `memory/fit.py` says how the border is found.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from qlora_trainer.config.settings import RunConfig
from qlora_trainer.errors import UserError
from qlora_trainer.memory.fit import FitAnswer, Fitter
from qlora_trainer.memory.foresight import Foresight
from qlora_trainer.memory.gpus import profiles_folder
from qlora_trainer.run.budget import Budget
from qlora_trainer.run.foresee import foresee_run, read_model_config, run_shape, task_config
from qlora_trainer.run.report import Reporter
from qlora_trainer.training import setup

QUESTIONS = ("seq", "batch", "rank", "change", "models")
_MODELS = profiles_folder("models")
_LIMITS = {
    "card": "the next larger tried does not fit",
    "model": "the model knows no longer position",
    "setting": "the setting's largest value",
}


@dataclass(frozen=True)
class Answer:
    """One answer, simulated.

    Attributes:
        question: Of `QUESTIONS`.
        found: In words: a value, a change, a model.
        overrides: Settings to change, ready for `--set`.
        because: Why it ends there.
        foresight: Of the configuration that was simulated; None where the model was refused.
    """

    question: str
    found: str
    overrides: tuple[str, ...]
    because: str
    foresight: Foresight | None


def solve(
    run: RunConfig,
    budget: Budget,
    questions: Sequence[str],
    *,
    reporter: Reporter | None = None,
) -> list[Answer]:
    """Answer questions about a run on a card.

    Args:
        run: The settings that stay as they are.
        budget: The card, and what of it is free.
        questions: Of `QUESTIONS`.
        reporter: Told which question is being worked on.

    Raises:
        UserError: No such question, or the model cannot have these settings.
    """
    told = reporter or Reporter()
    unknown = [question for question in questions if question not in QUESTIONS]
    if unknown:
        raise UserError(f"--fit {unknown[0]}: no such question; ask {', '.join(QUESTIONS)}")
    config = read_model_config(run)
    if set(questions) != {"seq"}:  # which asks for another length anyway
        setup.check_length(run, config)
    fitter = Fitter(
        task_config(run, config),
        run_shape(run, config, budget.gpu, budget.processes),
        budget.gpu,
        budget_bytes=budget.budget_bytes,
        expandable_segments=budget.expandable_segments,
        paged_on_card=budget.paged_on_card,
    )
    answers: list[Answer] = []
    for number, question in enumerate(questions):
        told.progress("simulating", number, len(questions))
        if question == "models":
            answers += _models(run, budget, told)
        elif question == "change":
            answers.append(_change(fitter))
        else:
            answers += _border(question, fitter)
    return answers


def _border(question: str, fitter: Fitter) -> list[Answer]:
    """One answer; of the longest sequence a second one, where techniques make it longer."""
    ask = {
        "seq": fitter.longest_sequence,
        "batch": fitter.largest_micro_batch,
        "rank": fitter.highest_rank,
    }
    answer = ask[question]()
    found = [_told(question, answer)]
    if question == "seq" and answer.limit == "card" and answer.value:
        longer = fitter.longest_with_techniques(answer)
        if longer is not None:
            found.append(_told(question, longer))
    return found


def _told(question: str, answer: FitAnswer) -> Answer:
    if not answer.value:
        because = f"not even {answer.setting}={answer.next_value} fits"
        return Answer(question, "none", (), because, answer.foresight)
    found = f"{answer.setting} = {answer.value}"
    because = _LIMITS[answer.limit]
    if answer.next_value is not None:
        because = f"{answer.next_value} does not fit"
    return Answer(question, found, answer.overrides, because, answer.foresight)


def _change(fitter: Fitter) -> Answer:
    now = fitter.foresee(fitter.shape)
    if now.fits:
        return Answer("change", "none needed", (), "the run fits as it is", now)
    try:
        change = fitter.smallest_change()
    except UserError as error:
        return Answer("change", "none", (), str(error), now)
    assert change is not None  # it does not fit as it is
    return Answer(
        "change", change.what, change.overrides, "the mildest that fits", change.foresight
    )


def _models(run: RunConfig, budget: Budget, told: Reporter) -> list[Answer]:
    """Each of our model profiles with the run's other settings, smallest first."""
    files = sorted(_MODELS.glob("*.json"))
    if not files:
        raise UserError(f"--fit models: no model profiles at {_MODELS}")
    answers = []
    for number, file in enumerate(files):
        told.progress("simulating models", number, len(files))
        model = run.model.model_copy(update={"source": str(file), "revision": None})
        try:
            found = foresee_run(
                run.model_copy(update={"model": model}),
                budget.gpu,
                budget_bytes=budget.budget_bytes,
                expandable_segments=budget.expandable_segments,
                paged_on_card=budget.paged_on_card,
                processes=budget.processes,
            )
        except UserError as error:
            answers.append(Answer("models", file.stem, (), str(error), None))
            continue
        answers.append(Answer("models", file.stem, (), "", found))
    return sorted(answers, key=_size)


def _size(answer: Answer) -> float:
    return float("inf") if answer.foresight is None else answer.foresight.total_bytes

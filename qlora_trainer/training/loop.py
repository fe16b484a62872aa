"""The training loop: steps, evaluations, saves, and a way back from every interruption.

It takes plain values and callables. All that decides what comes next stands in `Course`, which is
saved with the state; everything else (learning rate, data order, random numbers) is a pure function
of the step, so a resumed run cannot tell that it was interrupted.
"""

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from qlora_trainer.base.host_memory import FreedPages
from qlora_trainer.errors import UserError
from qlora_trainer.tasks.task import Batch
from qlora_trainer.training.ahead import WindowsAhead
from qlora_trainer.training.attempt import StepRunner
from qlora_trainer.training.checks import LearningChecks
from qlora_trainer.training.evaluate import Evaluation, examine
from qlora_trainer.training.log import Phase
from qlora_trainer.training.plan import Course, Run, TrainingOutcome, TrainingPlan
from qlora_trainer.training.rehearse import rehearse
from qlora_trainer.training.resume import require_same_things
from qlora_trainer.training.saver import Saver
from qlora_trainer.training.schedule import learning_rate_factor
from qlora_trainer.training.signals import StopRequest, stop_on_signals
from qlora_trainer.training.state import newest_good_state, restore, start_alike


def run_training(run: Run, plan: TrainingPlan) -> TrainingOutcome:
    """Train to the end, from the newest whole state if there is one.

    What fails between two updates loses nothing: the state is saved before the error goes on.

    Raises:
        UserError: Something the user must decide: a loss that is not finite, out of memory with
            one sequence, a saved state that does not fit, an adapter that does not learn, a disk
            that is full.
    """
    return _Loop(run, plan).run()


class _Loop:
    def __init__(self, run: Run, plan: TrainingPlan) -> None:
        self._run, self._plan = run, plan
        self._saver = Saver(run, plan)
        self._checks = LearningChecks(run.model, run.log.say)
        self._steps = StepRunner(
            run.model,
            task=run.task,
            optimizer=run.optimizer,
            checks=self._checks,
            device=run.device,
            seed=plan.seed,
            max_grad_norm=plan.max_grad_norm,
            scaler=run.scaler,
            failure_folder=run.folder / "failed-batch",
            decode=run.decode,
            say=run.log.say,
            processes=run.processes,
        )
        self._course = Course()
        self._stopped_by: str | None = None
        self._watch = run.watch
        self._freed = FreedPages(run.device)

    def run(self) -> TrainingOutcome:
        run, course = self._run, self._resume()
        evaluated = course.last_evaluation_step == course.step or (
            course.step == 0 and course.first_evaluation is not None
        )
        run.log.begin(course.step, evaluated=evaluated)
        with stop_on_signals(run.log.say) as stop:
            try:
                if run.rehearsal is not None and course.step < self._plan.total_steps:
                    rehearse(run, run.rehearsal, self._steps, step=course.step)
                    course.micro_batch_parts = self._steps.micro_batch_parts
                if course.step == 0 and course.first_evaluation is None:
                    found = self._measure()
                    course.first_evaluation = None if found is None else found.metrics
                with WindowsAhead(run.windows.window, stop=self._plan.total_steps) as ahead:
                    self._train(ahead, stop)
                return self._finish()
            # Whatever it is (a disk, the card, a fault of ours), what is good is kept and the error
            # goes on. Leaving at once (a second Ctrl-C) is no Exception and saves nothing.
            except Exception:
                self._saver.save_before_leaving(self._course)
                raise

    def _train(self, ahead: WindowsAhead, stop: StopRequest) -> None:
        """Steps until the end or a signal; what is due after a step comes first on resuming."""
        plan, course = self._plan, self._course
        verify = True  # the first step of a process, and the first after each evaluation
        while True:
            if self._due(plan.evaluate_every_steps) and course.last_evaluation_step != course.step:
                ahead.rest()
                self._evaluate()
                verify = True
            overdue, self._stopped_by = self._agreed(stop)
            if self._due(plan.save_every_steps) or overdue:
                self._saver.save(course)
                _, self._stopped_by = self._agreed(stop)  # that took a while
            if course.step >= plan.total_steps or course.stopped_early or self._stopped_by:
                return
            self._step(ahead, verify)
            verify = False

    def _agreed(self, stop: StopRequest) -> tuple[bool, str | None]:
        """Whether a save is overdue by the main process' clock, and what signal any has got."""
        found = self._run.processes.gather([self._saver.is_overdue(), stop.signal_name])
        return found[0][0], next((signal for _, signal in found if signal), None)

    def _due(self, every: int | None) -> bool:
        step = self._course.step
        return every is not None and step > 0 and step % every == 0

    def _resume(self) -> Course:
        run = self._run
        with run.processes.together():
            trainer = self._read_state() if run.processes.is_main else None
        trainer = start_alike(run.processes, run.optimizer, trainer)
        if trainer is None:
            return self._course
        self._course = Course(**trainer["course"])
        self._steps.micro_batch_parts = self._course.micro_batch_parts
        if run.scaler is not None and trainer["scaler"] is not None:
            run.scaler.load(trainer["scaler"])
        self._saver.saved_step = trainer["step"]
        run.log.say(f"resuming after step {trainer['step']} of {self._plan.total_steps}")
        return self._course

    def _read_state(self) -> dict[str, Any] | None:
        """Read the newest state into the optimizer; what it says of the loop, if there is one."""
        run = self._run
        saved = newest_good_state(self._saver.states, run.log.say)
        if saved is None:
            return None
        require_same_things(saved.trainer["identity"], run.identity, where=str(saved.folder))
        restore(saved, run.optimizer)
        self._saver.damaged = saved.passed_over
        return saved.trainer

    def _step(self, ahead: WindowsAhead, verify: bool) -> None:
        run, plan, step = self._run, self._plan, self._course.step
        share = learning_rate_factor(
            step,
            total_steps=plan.total_steps,
            warmup_steps=plan.warmup_steps,
            schedule=plan.schedule,
        )
        start = time.perf_counter()
        with run.log.timed("step"):
            window = ahead.window(step)
            self._freed.before_step()
            with self._watched(window):
                result, loss, norm = self._steps.run(
                    window, step=step, learning_rate=plan.learning_rate * share, verify=verify
                )
            self._freed.after_step()
        seconds = time.perf_counter() - start
        tokens = sum(_tokens(batch) for batch in window)
        self._course.step = step + 1
        self._course.micro_batch_parts = self._steps.micro_batch_parts
        values = {
            "step": step + 1,
            "epoch": run.windows.position(step + 1),
            "loss": loss,
            "learning_rate": plan.learning_rate * share,
            "gradient_norm": norm,
            "trained_tokens": result.trained_tokens,
            "tokens": tokens,
            "seconds": round(seconds, 4),
            "tokens_per_second": round(tokens / seconds, 1),
        }
        if run.scaler is not None:
            values["loss_scale"] = run.scaler.scale
        run.log.step(values, self._counts_left())

    def _watched(self, window: Sequence[Batch]) -> AbstractContextManager[None]:
        """Measure the first step of this process, where somebody wants to know."""
        watch, self._watch = self._watch, None
        return nullcontext() if watch is None else watch(window)

    def _counts_left(self) -> dict[Phase, int]:
        def events(every: int | None) -> int:
            return 0 if every is None else total // every - done // every

        done, total = self._course.step, self._plan.total_steps
        held_out = self._run.eval_batches is not None
        seconds = self._run.log.remaining.seconds({"step": total - done}) or 0.0
        by_the_clock = min(int(seconds / self._plan.save_every_seconds), total - done)
        return {
            "step": total - done,
            "evaluate": events(self._plan.evaluate_every_steps) + 1 if held_out else 0,
            "save": max(events(self._plan.save_every_steps), by_the_clock) + 1,
        }

    def _measure(self) -> Evaluation | None:
        """What the held-out rows say of the model as it is, logged; None where there are none."""
        run = self._run
        if run.eval_batches is None:
            return None
        self._freed.give_back()
        with run.log.timed("evaluate"):
            found = examine(
                run.model,
                run.eval_batches(),
                task=run.task,
                device=run.device,
                say=run.log.say,
                references=run.references,
                processes=run.processes,
            )
        run.log.evaluation(self._course.step, found.metrics)
        return found

    def _evaluate(self) -> None:
        run, plan, course = self._run, self._plan, self._course
        found = self._measure()
        if found is None:
            return
        metrics = found.metrics
        if plan.best_metric not in metrics:
            raise UserError(f"no metric named {plan.best_metric!r}; there are {sorted(metrics)}")
        value, best = metrics[plan.best_metric], course.best_value
        better = best is None or (value > best if plan.greater_is_better else value < best)
        if better:
            self._saver.save_adapter("adapter")
            if found.scores is not None:
                self._saver.save_predictions(found.predictions)
        # Only now: a course that tells of an evaluation is one whose adapter stands.
        course.last_evaluation, course.last_evaluation_step = metrics, course.step
        if better:
            course.best_value, course.best_step = value, course.step
            course.best_evaluation = metrics
            course.evaluations_without_gain = 0
            return
        course.evaluations_without_gain += 1
        if plan.patience is not None and course.evaluations_without_gain >= plan.patience:
            course.stopped_early = True
            run.log.say(
                f"step {course.step}: stopping early; {plan.best_metric} has not been better than "
                f"{best:.4f} (step {course.best_step}) in {plan.patience} evaluations"
            )

    def _finish(self) -> TrainingOutcome:
        run, course = self._run, self._course
        complete = course.stopped_early or course.step >= self._plan.total_steps
        reason = f"stopped by {self._stopped_by}; the same command goes on from here"
        if complete:
            reason = "stopped early" if course.stopped_early else "all steps done"
        self._saver.save(course)  # before anything that can fail
        if complete:
            self._checks.require_movement(run.optimizer.steps)
            if course.last_evaluation_step != course.step and run.eval_batches is not None:
                self._evaluate()
                self._saver.save(course, again=True)
            # "adapter" is the best one; without held-out rows the last is all there is to choose.
            if course.best_step is None:
                self._saver.save_adapter("adapter")
            elif course.best_step != course.step:
                self._saver.save_adapter("adapter-last")
        return TrainingOutcome(
            step=course.step,
            complete=complete,
            reason=reason,
            best_step=course.best_step,
            best_value=course.best_value,
            first_evaluation=course.first_evaluation,
            best_evaluation=course.best_evaluation,
            last_evaluation=course.last_evaluation,
            overflows=run.scaler.overflows if run.scaler is not None else 0,
            micro_batch_parts=course.micro_batch_parts,
            best_metric=self._plan.best_metric,
        )


def _tokens(batch: Batch) -> int:
    mask = batch.get("attention_mask")
    if "input_ids" not in batch:  # images: rows are all there is to count
        return next(iter(batch.values())).shape[0]
    return batch["input_ids"].numel() if mask is None else int(mask.sum())

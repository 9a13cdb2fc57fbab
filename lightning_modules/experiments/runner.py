"""A whole experiment, stage by stage: what is finished is not done again, what was interrupted goes on."""

import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

from clafusion.errors import FusionError
from clafusion.lightning import Trainer
from clafusion.lightning_modules.checkpoints.last import LastCheckpoint
from clafusion.lightning_modules.commands.figures import Pictures, folder_beside
from clafusion.lightning_modules.distributed import Agreement, on_rank_zero
from clafusion.lightning_modules.experiments.jobs import Job, Order
from clafusion.lightning_modules.experiments.report import report_on
from clafusion.lightning_modules.experiments.results_table import compare, print_comparison, write_comparison
from clafusion.lightning_modules.experiments.stage_folder import begin, claim, finish, finished
from clafusion.lightning_modules.experiments.stages import StageTrainer, run_stage
from clafusion.lightning_modules.files import write_text

T = TypeVar("T")


class Requeue(LastCheckpoint):
    """Holds the signal by which a cluster takes a job away while no training does, and has the job requeued then."""

    def heed(self, trainer: Trainer) -> None:
        """Asks to be requeued if the signal has come; from the first call on it is held."""
        self.listen(trainer)
        if self._must_requeue(trainer):
            self._requeue(trainer)


class ExperimentFailed(Exception):
    """Stages of an experiment have failed; the results of the others have been written."""


@dataclass(frozen=True)
class Ledger:
    """What has become of the jobs so far, by seed and name of the stage."""

    results: dict[tuple[int, str], dict[str, Any]] = field(default_factory=dict)
    failures: dict[tuple[int, str], str] = field(default_factory=dict)

    def missing(self, job: Job) -> list[str]:
        """The stages that a job needs and that have failed or were left out."""
        return [name for name in job.stage.needs if (job.seed, name) in self.failures]


def run_experiment(order: Order) -> dict[str, Any]:
    """Carries out what is not finished yet; prints and writes the comparison.

    Returns:
        The content of `results.json`.

    Raises:
        ExperimentFailed: A stage has failed (on rank 0; the other ranks return what there is).
        FusionError: Files cannot be written.
    """
    return _on_all_processes(order.workshop.trainer, lambda: _carry_out(order))


def _on_all_processes(trainer: StageTrainer, function: Callable[[], T]) -> T:
    """Calls a function on all processes, which are started here if nobody else has; later trainers find them there."""
    launcher = trainer.strategy.launcher

    def begun() -> T:
        trainer.strategy.setup_environment()
        return function()

    try:
        return begun() if launcher is None else launcher.launch(begun)
    except (KeyboardInterrupt, SystemExit) as end:
        if launcher is not None:
            launcher.kill(signal.SIGKILL)
        # Lightning ends a training that is interrupted in the same way.
        raise end if isinstance(end, SystemExit) else SystemExit(1) from None


def _carry_out(order: Order) -> dict[str, Any]:
    trainer = order.workshop.trainer
    # Only now: the processes that were started have looked at the folder before it changes.
    on_rank_zero(trainer.strategy, lambda: claim(order.output, order.identity))
    agreement, ledger, jobs = Agreement(), Ledger(), list(order.jobs())
    requeue = Requeue(order.output)
    for number, job in enumerate(jobs, 1):
        requeue.heed(cast(Trainer, trainer))
        _attend(order, job, f"[{number}/{len(jobs)}] {job.words}", ledger, agreement)
        # What there is can be looked at after every seed.
        if number % len(order.plan.stages) == 0:
            on_rank_zero(trainer.strategy, lambda: _write(order, ledger))
    if order.figures:
        on_rank_zero(trainer.strategy, lambda: _draw(order))
    results = _compared(order, ledger)
    if trainer.is_global_zero and not order.quiet:
        print_comparison(results, order.output, order.workshop.report)
    if trainer.is_global_zero and ledger.failures:
        raise ExperimentFailed(f"{len(ledger.failures)} of {len(jobs)} stages have no result, the others are there")
    return results


def _write(order: Order, ledger: Ledger) -> None:
    write_comparison(_compared(order, ledger), order.output)
    if order.workshop.report:
        write_text(order.output / "report.html", report_on(order.output / "results.json").html)


def _draw(order: Order) -> None:
    """The figures of the report one by one, once everything is in it."""
    pictures = Pictures.of(report_on(order.output / "results.json").figures)
    pictures.write(folder_beside(order.output / "report.html"))


def _attend(order: Order, job: Job, words: str, ledger: Ledger, agreement: Agreement) -> None:
    """Carries out one job, unless it is finished or cannot be; notes what has become of it."""
    trainer, key = order.workshop.trainer, (job.seed, job.stage.name)
    missing = ledger.missing(job)
    if missing:
        ledger.failures[key] = f"left out, for want of {', '.join(missing)}"
        _say(order, f"{words} ({ledger.failures[key]})", failed=True)
        return
    failure, result = None, {}
    try:
        done = on_rank_zero(trainer.strategy, lambda: finished(job.folder, job.description, job.inputs))
        _say(order, words if done is None else f"{words} (done)")
        result = _carry_out_one(order, job) if done is None else done
    except Exception as error:
        failure = str(error) if isinstance(error, FusionError) else _unexpected(error, job)
    failure = agreement.on(failure)
    if failure is None:
        ledger.results[key] = result
    else:
        ledger.failures[key] = " ".join(failure.split())
        _say(order, f"clafusion: failed: {job.words}: {ledger.failures[key]}", failed=True)


def _carry_out_one(order: Order, job: Job) -> dict[str, Any]:
    strategy = order.workshop.trainer.strategy
    on_rank_zero(strategy, lambda: begin(job.folder, job.description, job.inputs))
    result = run_stage(order.workshop, job.stage, job.folder, job.inputs, job.stage.seed(job.seed))
    on_rank_zero(strategy, lambda: finish(job.folder, list(job.stage.outputs.values()), result))
    if strategy.is_global_zero:
        (job.folder / "error.txt").unlink(missing_ok=True)
    return result


def _compared(order: Order, ledger: Ledger) -> dict[str, Any]:
    """The results so far, as plain values."""
    words = {stage.name: f"{stage.kind} {stage.subject}" for stage in order.plan.stages}
    return {
        **order.identity,
        "seeds": list(order.seeds),
        "networks": compare(
            order.plan.evaluations, order.plan.makers, order.seeds, ledger.results, order.experiment.published
        ),
        "failures": [
            {"seed": seed, "stage": words[name], "reason": reason} for (seed, name), reason in ledger.failures.items()
        ],
    }


def _unexpected(error: Exception, job: Job) -> str:
    """An error that nobody has put into words, in one line; the rest is left in the folder of the stage."""
    path, text = job.folder / "error.txt", traceback.format_exc()
    with suppress(FusionError):
        write_text(path, text)
    return f"{type(error).__name__}: {error} (see {path})"


def _say(order: Order, line: str, failed: bool = False) -> None:
    if order.workshop.trainer.is_global_zero and (failed or not order.quiet):
        print(line, file=sys.stderr, flush=True)

"""A whole experiment, stage by stage: what is finished is not done again, what was interrupted goes on."""

import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar, cast

from clafusion.errors import FusionError
from clafusion.lightning import Trainer
from clafusion.lightning_modules.checkpoints.last import LastCheckpoint
from clafusion.lightning_modules.commands.figures import Pictures, folder_beside
from clafusion.lightning_modules.distributed import FailureGroup, on_rank_zero
from clafusion.lightning_modules.experiments.context import RunContext
from clafusion.lightning_modules.experiments.jobs import Job, PreparedExperiment
from clafusion.lightning_modules.experiments.report import report_on
from clafusion.lightning_modules.experiments.results_table import (
    ExperimentResults,
    print_table,
    result_rows,
    write_tables,
)
from clafusion.lightning_modules.experiments.stage_folder import begin, claim, finish, finished
from clafusion.lightning_modules.experiments.stages.base import StageResult
from clafusion.lightning_modules.files import write_text
from clafusion.lightning_modules.trainer import FusionTrainer

T = TypeVar("T")


class Requeue(LastCheckpoint):
    """The requeue signal of a cluster, held while no training holds it; the job is requeued between two stages."""

    def heed(self, trainer: Trainer) -> None:
        """Ask to be requeued if the signal has come; from the first call on it is held."""
        self.listen(trainer)
        if self._must_requeue(trainer):
            self._requeue(trainer)


class ExperimentFailed(Exception):
    """Stages of an experiment have failed; the results of the others have been written."""


@dataclass
class Outcomes:
    """The results and failures of the jobs so far, by seed and name of the stage."""

    results: dict[tuple[int, str], StageResult] = field(default_factory=dict)
    failures: dict[tuple[int, str], str] = field(default_factory=dict)

    def missing(self, job: Job) -> list[str]:
        """Return the stages that a job needs and that have failed or were skipped."""
        return [name for name in job.stage.needs if (job.seed, name) in self.failures]


def run_experiment(prepared: PreparedExperiment) -> ExperimentResults:
    """Carry out what is not finished yet; print and write the comparison.

    Returns:
        The content of `results.json`.

    Raises:
        ExperimentFailed: A stage has failed (on rank 0; the other ranks return what there is).
        FusionError: Files cannot be written.
    """
    return _on_all_processes(prepared.context.trainer, lambda: _carry_out(prepared))


def _on_all_processes(trainer: FusionTrainer, function: Callable[[], T]) -> T:
    """Call a function on all processes, which are started here unless they are there; later trainers find them."""
    launcher = trainer.strategy.launcher

    def begun() -> T:
        trainer.strategy.setup_environment()
        return function()

    try:
        return begun() if launcher is None else cast(T, launcher.launch(begun))
    except (KeyboardInterrupt, SystemExit) as end:
        if launcher is not None:
            launcher.kill(getattr(signal, "SIGKILL", signal.SIGTERM))  # which Windows lacks
        # Lightning ends a training that is interrupted in the same way.
        raise end if isinstance(end, SystemExit) else SystemExit(1) from None


def _carry_out(prepared: PreparedExperiment) -> ExperimentResults:
    context, output = prepared.context, prepared.output
    trainer = context.trainer
    # Only now: the processes that were started have looked at the folder before it changes.
    on_rank_zero(trainer.strategy, lambda: claim(output, prepared.identity))
    group, outcomes, jobs = FailureGroup(), Outcomes(), list(prepared.jobs())
    requeue = Requeue(output)
    for number, job in enumerate(jobs, 1):
        requeue.heed(trainer)
        _attend(context, job, f"[{number}/{len(jobs)}] {job.words}", outcomes, group)
        # The results so far can be looked at after every seed.
        if number % len(prepared.plan.stages) == 0:
            figures = prepared.figures and number == len(jobs)
            results = _results(prepared, outcomes)
            on_rank_zero(trainer.strategy, partial(_write, results, output, context.report, figures))
    results = _results(prepared, outcomes)
    if trainer.is_global_zero and not context.quiet:
        print_table(results, output, context.report)
    if trainer.is_global_zero and outcomes.failures:
        raise ExperimentFailed(f"{len(outcomes.failures)} of {len(jobs)} stages have no result, the others are there")
    return results


def _results(prepared: PreparedExperiment, outcomes: Outcomes) -> ExperimentResults:
    """The results so far, as plain values."""
    words = {stage.name: stage.words for stage in prepared.plan.stages}
    published = prepared.experiment.published
    return {
        "experiment": prepared.experiment.name,
        "scale": prepared.scale,
        "seeds": list(prepared.seeds),
        "networks": result_rows(prepared.plan.contestants, prepared.seeds, outcomes.results, published),
        "failures": [
            {"seed": seed, "stage": words[name], "reason": reason} for (seed, name), reason in outcomes.failures.items()
        ],
    }


def _write(results: ExperimentResults, output: Path, report: bool, figures: bool) -> None:
    """Write the tables and the report, and the figures of the report one by one."""
    write_tables(results, output)
    if not report:
        return
    page, shown = output / "report.html", report_on(output / "results.json")
    write_text(page, shown.html)
    if figures:
        Pictures.of(shown.figures).write(folder_beside(page))


def _attend(context: RunContext, job: Job, words: str, outcomes: Outcomes, group: FailureGroup) -> None:
    """Carry out a job, unless it is finished or cannot be carried out, and note the outcome."""
    missing = outcomes.missing(job)
    if missing:
        outcomes.failures[job.key] = f"skipped: it needs {', '.join(missing)}, which failed"
        _say(context, f"{words} ({outcomes.failures[job.key]})", failed=True)
        return
    failure, result = None, None
    try:
        result = _result(context, job, words)
    except Exception as error:
        failure = str(error) if isinstance(error, FusionError) else _unexpected(error, job)
    failure = group.first(failure)
    if failure is None:
        outcomes.results[job.key] = cast(StageResult, result)
    else:
        outcomes.failures[job.key] = " ".join(failure.split())
        _say(context, f"clafusion: failed: {job.words}: {outcomes.failures[job.key]}", failed=True)


def _result(context: RunContext, job: Job, words: str) -> StageResult:
    """Return the result that is in the job's folder; without one, run the job."""
    strategy = context.trainer.strategy
    done = on_rank_zero(strategy, lambda: finished(job.folder, job.description, job.inputs))
    _say(context, words if done is None else f"{words} (done)")
    if done is not None:
        return cast(StageResult, done)
    on_rank_zero(strategy, lambda: begin(job.folder, job.record, job.inputs))
    result = job.run(context)
    on_rank_zero(strategy, lambda: finish(job.folder, job.stage.files, result))
    if strategy.is_global_zero:
        (job.folder / "error.txt").unlink(missing_ok=True)
    return result


def _unexpected(error: Exception, job: Job) -> str:
    """Return an unexpected error in one line, and leave its traceback in the folder of the stage."""
    path, text = job.folder / "error.txt", traceback.format_exc()
    with suppress(FusionError):
        write_text(path, text)
    return f"{type(error).__name__}: {error} (see {path})"


def _say(context: RunContext, line: str, failed: bool = False) -> None:
    if context.trainer.is_global_zero and (failed or not context.quiet):
        print(line, file=sys.stderr, flush=True)

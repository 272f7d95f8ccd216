"""Planning and running a study: missing runs, their cost, and several runs at once."""

import os
import queue
import statistics
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch

from dimaskdino.config import Config, load_config
from dimaskdino.evaluation.bootstrap import DRAWS
from dimaskdino.runs.folder import RunFolder
from dimaskdino.runs.processes import TrainingProcess
from dimaskdino.studies.comparison import planned_mde, pooled_deviation
from dimaskdino.studies.study import Study, run_path, start_path
from dimaskdino.utils.errors import UserError
from dimaskdino.utils.progress import progress_bar
from dimaskdino.utils.signals import child_environment


@dataclass(frozen=True)
class PlannedRun:
    """One training with its evaluation, or a training that others start from."""

    title: str
    path: Path
    config_file: Path
    overrides: tuple[str, ...]
    config: Config
    is_start: bool = False

    @property
    def done(self) -> bool:
        return (
            RunFolder(self.path).model.exists()
            if self.is_start
            else (self.path / "evaluation" / "layers.json").exists()
        )

    @property
    def step(self) -> int:
        """Last step of its training so far."""
        return max((record["step"] for record in RunFolder(self.path).read_metrics()), default=0)


@dataclass(frozen=True)
class Plan:
    """The runs of a study, all rows of a seed before the next seed.

    Attributes:
        runs: all runs, finished ones included.
        parallel: number of simultaneous runs.
        seconds_per_step: median of the runs in this folder; None before there are any.
        power: what the registered comparisons can find, one line each.
    """

    runs: tuple[PlannedRun, ...]
    parallel: int
    seconds_per_step: float | None
    power: tuple[str, ...]

    @property
    def missing(self) -> tuple[PlannedRun, ...]:
        return tuple(run for run in self.runs if not run.done)

    def describe(self) -> str:
        """The missing runs and their cost, as text."""
        missing = self.missing
        lines = [f"{len(self.runs)} runs, {len(self.runs) - len(missing)} done, {len(missing)} to do"]
        if not missing:
            return lines[0]
        left = {run: max(0, run.config.schedule.steps - run.step) for run in missing}
        images = sum(steps * run.config.train.batch_size for run, steps in left.items())
        lines += [f"  {run.title}: {left[run]:,} of {run.config.schedule.steps:,} steps left" for run in missing]
        cost = f"{sum(left.values()):,} steps, {images:,} images of training"
        if self.seconds_per_step is None:
            cost += "; the time is known after the first run"
        else:
            seconds = sum(left.values()) * self.seconds_per_step / min(self.parallel, len(missing))
            cost += (
                f"; about {timedelta(seconds=round(seconds))} at the measured {self.seconds_per_step:.2f} s per step"
            )
        return "\n".join([*lines, f"{cost}, {self.parallel} at a time", *self.power])


def plan_study(
    study: Study,
    scale: str,
    seeds: Sequence[int],
    folder: Path,
    changes: Sequence[str] = (),
    parallel: int | None = None,
) -> Plan:
    """Plan the runs of a study.

    Args:
        study: the study.
        scale: one of its scales.
        seeds: seeds of the training; the study's own if empty.
        folder: the study folder; each run goes into `folder/runs/VARIANT_SEED`.
        changes: settings for every variant, after its own.
        parallel: number of simultaneous runs; by default one per GPU, and one without any.

    Raises:
        UserError: a variant is no valid configuration, or the folder holds runs with other settings. Nothing is started
            then.
    """
    if parallel is not None and parallel < 1:
        raise UserError(f"parallel must be at least 1, got {parallel}")
    runs = []
    chosen, start = list(seeds or study.seeds), study.starts.get(scale)
    for seed in chosen if start else ():
        settings = (f"train.seed={seed}", *changes)
        runs.append(_planned(f"start, seed {seed}", start_path(folder, seed), start, settings, is_start=True))
    for seed in chosen:
        weights = [f"train.weights={start_path(folder, seed)}"] if start else []
        for variant in study.variants:
            settings = (*study.overrides(variant, scale, seed), *weights, *changes)
            title = f"{variant.label}, seed {seed}"
            runs.append(_planned(title, run_path(folder, variant, seed), study.scales[scale], settings))
    timed = [
        record["seconds_per_step"]
        for file in (folder / "runs").glob("*/metrics.jsonl")
        for record in RunFolder(file.parent).read_metrics()[-1:]
        if "seconds_per_step" in record
    ]
    speed = statistics.median(timed) if timed else None
    power = tuple(describe_power(study, scale, len(seeds or study.seeds), folder))
    return Plan(tuple(runs), parallel or max(1, torch.cuda.device_count()), speed, power)


def _planned(title: str, path: Path, file: Path, settings: tuple[str, ...], is_start: bool = False) -> PlannedRun:
    config = load_config(file, settings)
    if (path / "config.yaml").exists():
        RunFolder(path).check_config(config, same_result=True)
    return PlannedRun(title, path, file, settings, config, is_start)


def describe_power(study: Study, scale: str, seeds: int, folder: Path) -> Iterator[str]:
    """What the comparisons of a study can find, as lines of text by quantity.

    The deviation over trainings is that of the study's file, otherwise the pooled one of the runs in the folder.
    """
    comparisons, paired, known = study.registered, scale in study.starts, dict(study.deviation)
    if not comparisons:
        return
    measured = study.measured(folder)
    for quantity in study.quantities:
        values = {name: quantity.by_seed(runs) for name, runs in measured.items()}
        found = pooled_deviation(values, paired)
        if found is not None:
            known.setdefault(str(quantity), found)
    if seeds < 2:
        yield "one seed leaves every comparison inconclusive; use at least three"
        return
    yield f"minimum detectable effects of {len(comparisons)} comparisons with {seeds} seeds, at 80 % power:"
    for quantity in study.quantities:
        deviation = known.get(str(quantity))
        if deviation is None:
            yield f"  {quantity.label}: known after runs of two seeds, or with a `deviation` in the study's file"
            continue
        yield f"  {quantity.label}, at a deviation of {deviation:.1f} points over trainings:"
        for comparison in comparisons:
            if comparison.quantity == quantity:
                found = planned_mde(comparison, seeds, deviation, len(comparisons), paired)
                yield f"    {comparison.label}: {'any difference' if found is None else f'±{found:.1f} points'}"


def run_study(plan: Plan) -> dict[str, str]:
    """Train and evaluate the missing runs. A run that fails does not stop the others.

    Interrupting stops all runs after their current steps, with checkpoints; the same plan resumes them.

    Returns:
        The reasons of failed runs by their titles.
    """
    slots: queue.Queue[Mapping[str, str]] = queue.Queue()
    for slot in environments(plan.parallel):
        slots.put(slot)
    jobs = _Jobs(slots, [run.path for run in plan.missing if run.is_start])
    failed: dict[str, str] = {}
    with (
        progress_bar(total=len(plan.runs), initial=len(plan.runs) - len(plan.missing), description="runs") as progress,
        ThreadPoolExecutor(plan.parallel) as workers,
    ):
        # in this order, so that a run comes after the one that it starts from
        pending: dict[Future[None], PlannedRun] = {workers.submit(jobs.work, run): run for run in plan.missing}
        try:
            while pending:
                ended, _ = wait(pending, return_when=FIRST_COMPLETED)
                for future in ended:
                    run, error = pending.pop(future), future.exception()
                    progress.update()
                    if error is not None:
                        failed[run.title] = str(error)
                        progress.write(f"failed: {run.title}: {str(error).splitlines()[0]}", file=sys.stderr)
        except BaseException:
            jobs.stop()
            raise
    return failed


def environments(parallel: int) -> list[dict[str, str]]:
    """Environment variables of the simultaneous runs: a GPU each, as far as there are any, and a share of the cores."""
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // parallel)))
    count = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(i) for i in range(count)]
    devices = [{"CUDA_VISIBLE_DEVICES": names[i % count]} if count else {} for i in range(parallel)]
    return [{"OMP_NUM_THREADS": threads} | device for device in devices]


class _Jobs:
    """The runs in the worker threads."""

    def __init__(self, slots: "queue.Queue[Mapping[str, str]]", starts: Sequence[Path]) -> None:
        self.slots = slots
        self.started = {path: threading.Event() for path in starts}  # set when that training has ended
        self.stopping = threading.Event()
        self.trainings: set[TrainingProcess] = set()
        self.evaluations: set[subprocess.Popen] = set()

    def work(self, run: PlannedRun) -> None:
        """Bring one run to its end."""
        try:
            self._wait_for_start(run)
            environment = self.slots.get()
            try:
                self._train(run, environment)
                if not run.is_start:
                    self._evaluate(run, environment)
            finally:
                self.slots.put(environment)
        finally:
            if run.path in self.started:
                self.started[run.path].set()

    def _wait_for_start(self, run: PlannedRun) -> None:
        """Wait for the training that a run starts from.

        Raises:
            UserError: it failed.
        """
        weights = run.config.train.weights
        if weights in self.started:
            self.started[weights].wait()
            if not RunFolder(weights).model.exists():
                raise UserError(f"not started, since {weights.name} failed, from which it starts")

    def _train(self, run: PlannedRun, environment: Mapping[str, str]) -> None:
        if self.stopping.is_set():
            raise UserError("not started")
        with TrainingProcess(str(run.config_file), run.path, run.overrides, environment=environment) as training:
            self.trainings.add(training)
            if self.stopping.is_set():  # set after the check above, before `stop` knew of this training
                training.stop()
            for _ in training.follow():
                pass
            self.trainings.discard(training)

    def _evaluate(self, run: PlannedRun, environment: Mapping[str, str]) -> None:
        if self.stopping.is_set():
            raise UserError("not evaluated")
        command = [sys.executable, "-m", "dimaskdino", "evaluate", str(run.path), "--bootstrap", str(DRAWS)]
        with RunFolder(run.path).log.open("a") as log:
            evaluation = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | child_environment() | environment,
            )
        self.evaluations.add(evaluation)
        if evaluation.wait():
            raise UserError(f"the evaluation failed; the reason is at the end of {RunFolder(run.path).log}")
        self.evaluations.discard(evaluation)

    def stop(self) -> None:
        """Stop all runs; trainings save their state first."""
        self.stopping.set()
        for evaluation in list(self.evaluations):
            evaluation.terminate()
        for training in list(self.trainings):
            training.stop()

"""Plan and run a study: which runs are missing, what they cost, and several runs at a time."""

import os
import statistics
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence, Set
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch

from dimaskdino.config import Config, load_config, parse_config
from dimaskdino.evaluation.bootstrap import DRAWS
from dimaskdino.runs.folder import RunFolder, check_settings
from dimaskdino.runs.processes import TrainingProcess
from dimaskdino.studies.comparison import planned_mde, pooled_deviation
from dimaskdino.studies.runs import RUNS, read_archive
from dimaskdino.studies.study import Study, run_path, start_path
from dimaskdino.utils.errors import UserError, first_line
from dimaskdino.utils.progress import progress_bar
from dimaskdino.utils.signals import child_environment
from dimaskdino.utils.terminal import printable


@dataclass(frozen=True)
class PlannedRun:
    """A training with its evaluation, or a training from which others start."""

    title: str
    path: Path
    config_file: Path
    overrides: tuple[str, ...]
    config: Config
    is_start: bool = False
    is_archived: bool = False

    @property
    def done(self) -> bool:
        if self.is_start:
            return RunFolder(self.path).model.exists()
        return self.is_archived or (self.path / "evaluation" / "layers.json").exists()

    @property
    def steps_left(self) -> int:
        """Steps that its training still has to do."""
        step = max((record["step"] for record in RunFolder(self.path).read_metrics()), default=0)
        return max(0, self.config.schedule.steps - step)


@dataclass(frozen=True)
class Plan:
    """The runs of a study, all variants of a seed before the next seed.

    Attributes:
        runs: all runs, finished ones included.
        parallel: number of simultaneous runs.
        seconds_per_step: median over the run folders; None before there are any.
        power: minimum detectable effects of the registered comparisons, as lines of text.
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
        steps = images = 0
        for run in missing:
            left = run.steps_left
            lines.append(f"  {run.title}: {left:,} of {run.config.schedule.steps:,} steps left")
            steps += left
            images += left * run.config.train.batch_size
        if self.seconds_per_step is None:
            time = "the time is known after the first run"
        else:
            seconds = round(steps * self.seconds_per_step / min(self.parallel, len(missing)))
            time = f"about {timedelta(seconds=seconds)} at the measured {self.seconds_per_step:.2f} s per step"
        lines.append(f"{steps:,} steps, {images:,} images of training; {time}, {self.parallel} at a time")
        return "\n".join(map(printable, [*lines, *self.power]))


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
        folder: the study folder; each run goes into `folder/runs/VARIANT_SEED`. Archived runs count as done.
        changes: settings for every variant, after its own.
        parallel: number of simultaneous runs; by default one per GPU, and one without any.

    Raises:
        UserError: a variant is no valid configuration, a quantity cannot be used, or the folder holds runs with other
            settings. Nothing is started then.
    """
    if parallel is not None and parallel < 1:
        raise UserError(f"parallel must be at least 1, got {parallel}")
    for quantity in study.quantities:
        quantity.check()
    seeds = seeds or study.seeds
    archived = read_archive(folder)
    starts, runs = [], []
    for seed in seeds:
        weights = [f"train.weights={start_path(folder, seed)}"] if scale in study.starts else []
        of_seed = []
        for variant in study.variants:
            settings = (*study.overrides(variant, scale, seed), *weights, *changes)
            path, title = run_path(folder, variant, seed), f"{variant.label}, seed {seed}"
            run = _planned(title, path, study.scales[scale], settings, is_archived=path.name in archived)
            if run.is_archived:
                # another machine had the common start in another folder
                before = parse_config(archived[path.name]["config"], weights, str(folder / RUNS))
                check_settings(before, run.config, folder / RUNS, same_result=True)
            of_seed.append(run)
        if weights and not all(run.done for run in of_seed):
            settings = (f"train.seed={seed}", *changes)
            path, title = start_path(folder, seed), f"start, seed {seed}"
            starts.append(_planned(title, path, study.starts[scale], settings, is_start=True))
        runs += of_seed
    return Plan(
        (*starts, *runs),
        parallel or max(1, torch.cuda.device_count()),
        _seconds_per_step(folder),
        tuple(describe_power(study, scale, len(seeds), folder)),
    )


def _planned(title: str, path: Path, file: Path, settings: tuple[str, ...], **kind: bool) -> PlannedRun:
    config = load_config(file, settings)
    if (path / "config.yaml").exists():
        RunFolder(path).check_config(config, same_result=True)
    return PlannedRun(title, path, file, settings, config, **kind)


def _seconds_per_step(folder: Path) -> float | None:
    """Median of the seconds per step that the runs of a study folder recorded last."""
    recorded = []
    for file in (folder / "runs").glob("*/metrics.jsonl"):
        for record in RunFolder(file.parent).read_metrics()[-1:]:
            if "seconds_per_step" in record:
                recorded.append(record["seconds_per_step"])
    return statistics.median(recorded) if recorded else None


def describe_power(study: Study, scale: str, seeds: int, folder: Path) -> list[str]:
    """Minimum detectable effects of the comparisons of a study, as lines of text by quantity.

    The standard deviation over trainings comes from the study's file, otherwise from the runs in the folder.
    """
    comparisons, paired = study.registered, scale in study.starts
    if not comparisons:
        return []
    if seeds < 2:
        return ["one seed leaves every comparison inconclusive; use at least three"]
    measured = study.measured(folder)
    lines = [f"minimum detectable effects of {len(comparisons)} comparisons with {seeds} seeds, at 80 % power:"]
    for quantity in study.quantities:
        deviation = study.deviation.get(str(quantity))
        if deviation is None:
            values = {name: quantity.by_seed(runs) for name, runs in measured.items()}
            deviation = pooled_deviation(values, paired)
        if deviation is None:
            lines.append(f"  {quantity.label}: known after two seeds, or with `deviation` in the study file")
            continue
        lines.append(f"  {quantity.label}, for a standard deviation of {deviation:.1f} points over trainings:")
        for comparison in comparisons:
            if comparison.quantity == quantity:
                mde = planned_mde(comparison, seeds, deviation, len(comparisons), paired)
                lines.append(f"    {comparison.label}: {'any difference' if mde is None else f'±{mde:.1f} points'}")
    return lines


def run_study(plan: Plan) -> dict[str, str]:
    """Train and evaluate the missing runs. A run that fails does not stop the others.

    An interrupt stops all runs after their current steps, with checkpoints; the same plan resumes them.

    Returns:
        The reasons of failed runs by their titles.
    """
    missing = plan.missing
    jobs = _Jobs(plan.parallel, {run.path for run in plan.runs if run.is_start})
    failed: dict[str, str] = {}
    with (
        progress_bar(total=len(plan.runs), initial=len(plan.runs) - len(missing), description="runs") as progress,
        ThreadPoolExecutor(plan.parallel) as workers,
    ):
        try:
            for is_start in (True, False):  # the other runs need the starts
                futures = {workers.submit(jobs.work, run): run for run in missing if run.is_start == is_start}
                for future in as_completed(futures):
                    run, error = futures[future], future.exception()
                    progress.update()
                    if error is not None:
                        failed[run.title] = str(error)
                        progress.write(printable(f"failed: {run.title}: {first_line(error)}"), file=sys.stderr)
        except BaseException:
            jobs.stop()
            raise
    return failed


def environments(parallel: int) -> list[dict[str, str]]:
    """Environment variables of each simultaneous run: its GPU, if there is any, and its part of the CPU cores."""
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // parallel)))
    count = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(i) for i in range(count)]
    found = []
    for i in range(parallel):
        environment = {"OMP_NUM_THREADS": threads}
        if count:
            environment["CUDA_VISIBLE_DEVICES"] = names[i % count]
        found.append(environment)
    return found


class _Jobs:
    """The runs in the worker threads.

    Args:
        parallel: number of threads.
        starts: run folders of the trainings from which others start.
    """

    def __init__(self, parallel: int, starts: Set[Path]) -> None:
        self.starts = starts
        self.unused = environments(parallel)
        self.stopping = threading.Event()
        self.stops: set[Callable[[], None]] = set()  # stop the processes that are running

    def work(self, run: PlannedRun) -> None:
        """Train and evaluate one run.

        Raises:
            UserError: it failed, or was not started since its start failed or all runs are stopping.
        """
        start = run.config.train.weights
        if start is not None and start in self.starts and not RunFolder(start).model.exists():
            raise UserError(f"not started: {start.name}, from which it starts, failed")
        environment = self.unused.pop()  # there is one per thread
        try:
            self._train(run, environment)
            if not run.is_start:
                self._evaluate(run, environment)
        finally:
            self.unused.append(environment)

    def _train(self, run: PlannedRun, environment: dict[str, str]) -> None:
        if self.stopping.is_set():
            raise UserError("not started")
        with TrainingProcess(str(run.config_file), run.path, run.overrides, environment=environment) as training:
            self.stops.add(training.stop)
            if self.stopping.is_set():  # set after the check above, before `stop` knew of this training
                training.stop()
            for _ in training.follow():
                pass
            self.stops.discard(training.stop)

    def _evaluate(self, run: PlannedRun, environment: dict[str, str]) -> None:
        if self.stopping.is_set():
            raise UserError("not evaluated")
        log = RunFolder(run.path).log
        with log.open("a") as output:
            evaluation = subprocess.Popen(
                [sys.executable, "-m", "dimaskdino", "evaluate", str(run.path), "--bootstrap", str(DRAWS)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | child_environment() | environment,
            )
        self.stops.add(evaluation.terminate)
        if evaluation.wait():
            raise UserError(f"the evaluation failed; see the end of {log}")
        self.stops.discard(evaluation.terminate)

    def stop(self) -> None:
        """Stop all runs; trainings save their state first."""
        self.stopping.set()
        for stop in list(self.stops):
            stop()

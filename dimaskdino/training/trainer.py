"""The training loop.

The batch of a step is split into pieces, one or more per process. All random numbers of piece p in step t come from a
generator seeded with (seed, t, p), and its images are a function of (seed, t, p). A resume point therefore needs no
random states and no position in the data: the step determines both, and a resumed run equals an undisturbed one.
"""

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.nn.parallel import DistributedDataParallel

from dimaskdino.checkpoints import load_checkpoint
from dimaskdino.checkpoints.model_files import (
    first_non_finite,
    initialize_from,
    load_weights,
    matching_classes,
    parse_stored,
    resume_point_path,
    save_model,
)
from dimaskdino.config import Config
from dimaskdino.data import shapes
from dimaskdino.data.check import advice, describe
from dimaskdino.data.coco import CocoDataset
from dimaskdino.data.dataloader import Batch, batches, explaining_dead_workers, training_dataset, training_loader
from dimaskdino.modeling import Detector, ImageBatch
from dimaskdino.modeling.backbone import ResNet
from dimaskdino.modeling.de_imbalance import TokenInteractionLayer
from dimaskdino.modeling.decoder import DecoderLayer
from dimaskdino.modeling.pixel_decoder import EncoderLayer
from dimaskdino.modeling.precision import autocast
from dimaskdino.runs.folder import Metrics, RunFolder, changed_settings, check_settings
from dimaskdino.training.criterion import Losses, criterion
from dimaskdino.training.optimizer import build_optimizer, load_moments, moments_by_name, set_learning_rate
from dimaskdino.training.resume_points import load_resume_point, save_resume_point, set_aside_newer
from dimaskdino.training.validation import Best, Validator, averaged
from dimaskdino.utils.distributed import DistributedContext
from dimaskdino.utils.errors import Stopped, UserError, first_line
from dimaskdino.utils.progress import progress_bar
from dimaskdino.utils.signals import Interrupt, StopRequest
from dimaskdino.utils.terminal import print_lines
from dimaskdino.utils.threads import adaptive_threads


class NonFiniteLossError(UserError):
    """A loss became infinite or NaN."""


class Readback:
    """An asynchronous device-to-host copy of a scalar. `get` waits for operations queued before it, not after it."""

    def __init__(self, value: Tensor) -> None:
        self._host = value.detach().to("cpu", non_blocking=True)
        self._sent = torch.cuda.Event() if value.is_cuda else None
        if self._sent:
            self._sent.record()

    def get(self) -> float:
        if self._sent:
            self._sent.synchronize()
        return float(self._host)


def train(config: Config, folder: RunFolder) -> None:
    """Train up to `schedule.steps`, resuming from the last resume point if the folder has one.

    Args:
        config: all settings.
        folder: run folder for checkpoints and metrics.

    Raises:
        UserError: settings, data or disk are unusable; `NonFiniteLossError` if the loss is not finite.
        Stopped: on SIGTERM, SIGINT or SIGHUP. The state is saved, and `train` with the same folder resumes.
    """
    with DistributedContext.join() as context, explaining_dead_workers():
        if context.rank == 0:
            shapes.ensure(config.data)
        context.barrier()
        Trainer(config, folder, context).run()


def _look_at(data: CocoDataset, settings: Config) -> None:
    """Print a summary of the training data and what will be hard, and stop if images are missing."""
    found = describe(data.annotations, data.image_folder)
    notes = [*data.annotations.remarks, *advice(data.annotations, found, settings)]
    print_lines(f"training data: {found.summary()}", *(f"note: {line}" for line in notes))
    if found.missing_files and not settings.data.skip_bad_images:
        raise UserError(
            f"{len(found.missing_files)} images of '{settings.data.train}' are missing, the first "
            f"{found.missing_files[0]} (data.skip_bad_images=true replaces them; 'dimaskdino data import' finds images "
            "in other folders)"
        )


@contextlib.contextmanager
def _explaining(point: Path) -> Iterator[None]:
    """Turn the errors of loading parts of a resume point into a `UserError` that names it."""
    try:
        yield
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as error:
        raise UserError(
            f"{point} has parts of another training ({first_line(error)}); delete it to use an earlier one"
        ) from None


def _checkpoint_activations(detector: Detector, backbone: bool) -> None:
    """Recompute layers in the backward pass; those of the backbone only if its batch norm is frozen."""
    kinds = (EncoderLayer, DecoderLayer, TokenInteractionLayer)
    layers: list[nn.Module] = [module for module in detector.modules() if isinstance(module, kinds)]
    if backbone and isinstance(detector.backbone, ResNet):
        layers += [block for stage in detector.backbone.stages for block in stage.children()]
    chosen = set(layers)
    apply_activation_checkpointing(detector, check_fn=lambda module: module in chosen)


def arrange(detector: Detector, settings: Config) -> None:
    """Apply activation checkpointing and compilation to a detector, as the settings say. Results stay the same."""
    if settings.train.checkpoint_activations:
        _checkpoint_activations(detector, settings.model.backbone.norm == "frozen")
    if settings.train.compile:
        detector.backbone.compile()
        detector.pixel_decoder.compile()


class Trainer:
    """One run in one process."""

    def __init__(self, config: Config, folder: RunFolder, context: DistributedContext) -> None:
        self.config, self.folder, self.context = config, folder, context
        self.data = training_dataset(config)
        self.data.check_classes(config.model.classes)
        if context.rank == 0:
            _look_at(self.data, config)
            late = [drop for drop in config.schedule.drops if drop >= config.schedule.steps]
            if late:
                print(f"note: schedule.drops={late} have no effect: the training ends at step {config.schedule.steps}")
        torch.manual_seed(config.train.seed)
        # weights that are replaced at once need not be downloaded
        replaced = config.train.weights and not config.train.weights_of
        model = config.model.without_backbone_weights() if replaced else config.model
        self.detector = Detector(model).to(context.device)
        self.optimizer = build_optimizer(self.detector, config.optimizer)
        self.scaler = torch.amp.GradScaler(context.device.type, enabled=config.train.precision == "fp16")
        self.step = 0
        self._saved_step = -1  # of the newest resume point
        self._resumed_at = -1
        self._changed: dict[str, Any] = {}  # settings that differ from those of the resumed run
        self.best = Best()
        state = self._resume()
        validates = config.train.validation.every is not None
        self.validator = Validator(config, context, self.data.classes) if validates else None
        # it starts from the weights that the training starts or goes on with
        self.average = averaged(self.detector, config.train.average) if config.train.average else None
        if self.average and state and state.get("average"):
            with _explaining(resume_point_path(folder.checkpoints, self.step)):
                self.average.load_state_dict(state["average"])
        arrange(self.detector, config)
        # batch norm's statistics change in the forward pass, before it is known whether the loss is finite
        norms = [m for m in self.detector.modules() if isinstance(m, nn.BatchNorm2d)]
        self._statistics = [buffer for norm in norms for buffer in norm.buffers()]
        self.model: nn.Module = self.detector
        if context.world_size > 1:
            # all processes keep the statistics of the first, which are saved; other buffers are constant
            self.model = DistributedDataParallel(
                self.detector, broadcast_buffers=bool(self._statistics), gradient_as_bucket_view=True
            )
        self._stop = StopRequest()
        self._stopping = False  # some process received a signal; the same step for all of them

    def _resume(self) -> dict[str, Any] | None:
        """Load the newest resume point, which is returned, or start.

        Raises:
            UserError: the run has other settings, or there is nothing to resume from and a model would be replaced.
        """
        state, remark = load_resume_point(self.folder.checkpoints)
        if remark and self.context.rank == 0:
            print(f"{remark}; resuming from the previous one")
        if state is None:
            self.folder.check_start()
            self._start_from(self.config.train.weights)
            return None
        if remark and self.context.rank == 0:
            set_aside_newer(self.folder.checkpoints, state["step"])
        # validated first: settings that are newer than the run then have their defaults, and are no change
        point = resume_point_path(self.folder.checkpoints, state["step"])
        before = parse_stored(state["config"], point)
        check_settings(before, self.config, self.folder.path)
        self._changed = changed_settings(before.model_dump(mode="json"), self.config.model_dump(mode="json"))
        self.data.use_classes(state["classes"], self.config.data)
        load_weights(self.detector, state["model"], str(self.folder.checkpoints))
        with _explaining(point):
            load_moments(self.optimizer, state["optimizer"], state["model"])
            if self.scaler.is_enabled() and state["scaler"]:
                self.scaler.load_state_dict(state["scaler"])
            self.best = Best(**state.get("validation", {}))
        self.step = self._saved_step = self._resumed_at = state["step"]
        if self.context.rank == 0:
            print(f"resuming at step {self.step} of {self.config.schedule.steps}")
        return state

    def _start_from(self, weights: Path | None) -> None:
        if weights is None:
            return
        modules = self.config.train.weights_of
        trained = load_checkpoint(weights)
        state = trained.detector.state_dict()
        rows = matching_classes(trained.classes, self.data.classes, self.config.data.by_order)
        left, lacking = initialize_from(self.detector, state, str(weights), modules, rows)
        if self.context.rank == 0:
            which = f" for {', '.join(modules)}" if modules else ""
            new = f"; re-initialised for these classes or this backbone: {', '.join(left)}" if left else ""
            added = f"; new, and close to the identity at first: {', '.join(lacking)}" if lacking else ""
            print(f"starting from {weights}{which}{new}{added}")

    def _save(self) -> None:
        """Write a resume point, unless the newest one is of this step.

        Raises:
            NonFiniteLossError: a weight or a moment of the optimizer is not finite. Nothing is written then.
        """
        if self.context.rank or self._saved_step == self.step:
            return
        moments = moments_by_name(self.optimizer)
        finite = dict(self.detector.state_dict())
        for name, values in moments.items():
            finite |= {f"the optimizer's {key} of {name}": value for key, value in values.items()}
        broken = first_non_finite(finite)
        if broken is not None:
            raise NonFiniteLossError(
                f"step {self.step}: {broken} is not finite, so nothing is saved. The newest resume point is that of "
                f"step {self._saved_step}; lower optimizer.lr, or use train.precision=fp32, and run the command again"
            )
        state: dict[str, Any] = {
            "model": self.detector.state_dict(),
            "optimizer": moments,
            "scaler": self.scaler.state_dict(),
            "step": self.step,
            "config": self.config.model_dump_json(),
            "classes": self.data.classes,
            "validation": asdict(self.best),
            "average": self.average.state_dict() if self.average else None,
        }
        self.folder.check_lock()
        save_resume_point(self.folder.checkpoints, state, self.config.train.keep)
        self._saved_step = self.step

    def run(self) -> None:
        """Train, log and save; writes `model.safetensors` at the end."""
        steps, every = self.config.schedule.steps, self.config.train.checkpoint_every
        self.model.train()
        loader = training_loader(self.data, self.config, self.step, self.context.rank, self.context.world_size)
        parts_of_steps = batches(loader)
        with (
            contextlib.closing(parts_of_steps),
            self._stop,
            self.folder.metrics(self.step, self.config, enabled=self.context.rank == 0) as metrics,
        ):
            silent = self.context.rank > 0
            if self._out_of_patience() and not silent:
                print(
                    f"the training ended at step {self.step}, since it ran out of train.validation.patience; "
                    "train.validation.patience=null goes on"
                )
            progress = progress_bar(None, "training", steps, log_by_hand=True, initial=self.step, disable=silent)
            if self._changed:
                metrics.write({"step": self.step, "changed": self._changed})
            logged, started = self.step, time.perf_counter()
            while self.step < steps and not self._out_of_patience():
                # forward and backward passes, and one optimizer step
                parts = self._load(parts_of_steps)
                with adaptive_threads():
                    terms, norm = self._train_step(parts)
                self.step += 1
                progress.update()
                if self.step % self.config.train.log_every == 0 or self.step == steps:
                    now = time.perf_counter()
                    record = self._record(terms, norm, (now - started) / (self.step - logged))
                    metrics.write(record)
                    progress.set_postfix(loss=f"{record['loss']:.2f}")
                    logged, started = self.step, now
                # images that could not be read and were replaced
                for reason in (r for part in parts for r in part.skipped):
                    metrics.write({"step": self.step, "skipped": reason})
                    progress.write(f"skipped: {reason}")
                if self._validates():
                    self._validate(metrics, progress)
                # a resume point holds the validation of its step, so it is written after it
                if self.step % every == 0 or self.step == steps or self._stopping or self._out_of_patience():
                    self._save()
                if self._stopping and self.step < steps:
                    raise self._stopped()
            progress.close()
        if self.context.rank == 0:
            self._save_model(self.folder.model)
            if self.validator and self.best.step:
                print(f"best validation at step {self.best.step}; its weights: {self.folder.best}")

    @property
    def _result(self) -> Detector:
        """The model to save: the moving average if enabled."""
        return cast(Detector, self.average.module) if self.average else self.detector

    def _save_model(self, path: Path) -> None:
        self.folder.check_lock()
        save_model(path, self._result, self.config, self.data.classes, self.step)

    def _validates(self) -> bool:
        every = self.config.train.validation.every
        return every is not None and (self.step % every == 0 or self.step == self.config.schedule.steps)

    def _out_of_patience(self) -> bool:
        patience = self.config.train.validation.patience
        return self.validator is not None and patience is not None and self.best.without_better >= patience

    def _validate(self, metrics: Metrics, progress: Any) -> None:
        assert self.validator is not None
        result = self.validator.score(self._result)
        better = self.best.update(result, self.step)
        if self.context.rank:
            return
        if better:
            self._save_model(self.folder.best)
        metrics.write({"step": self.step, "validation": result, "best_step": self.best.step})
        metrics.picture(self.validator.picture(self._result), self.step)
        text = f"step {self.step}: box AP {result['box_AP']:.1f}, mask AP {result['mask_AP']:.1f}"
        progress.write(f"{text} on {result['images']} images of {self.config.data.val}{', the best' if better else ''}")
        if self._out_of_patience():
            progress.write(
                f"no improvement in {self.best.without_better} validations (train.validation.patience): training ends"
            )

    def _load(self, parts: Iterator[Batch]) -> list[Batch]:
        """This process's parts of the next step. A bad image saves the state before it stops the run.

        A signal ends the wait for a loader that hangs; several processes can only stop together, after a step.
        """
        alone = self.context.world_size == 1
        try:
            with self._stop.waiting() if alone else contextlib.nullcontext():
                return [next(parts) for _ in range(self.config.train.accumulate)]
        except UserError:
            self._save()
            raise
        except Interrupt:
            self._save()
            raise self._stopped() from None

    def _stopped(self) -> Stopped:
        reason, steps = self._stop.received or "a signal to another process", self.config.schedule.steps
        return Stopped(f"stopped by {reason} at step {self.step} of {steps}; run the same command again to resume")

    def _train_step(self, parts: list[Batch]) -> tuple[dict[str, Tensor], Tensor]:
        """One optimizer step over this process's parts of the batch; returns the losses and the gradient's norm."""
        set_learning_rate(self.optimizer, self.step, self.config.schedule)
        # kept in case a loss is not finite
        statistics = [buffer.clone() for buffer in self._statistics]
        # losses are divided by the number of objects in the whole batch; the same exchange tells who was asked to stop
        count = sum(sum(part.targets.counts) for part in parts)
        objects, signals = self.context.sum(count, self._stop.received is not None)
        objects, signals = objects / self.context.world_size, Readback(signals)
        terms: dict[str, Tensor] = {}
        totals: list[Readback] = []
        for i, part in enumerate(parts):
            last = i == len(parts) - 1
            # random numbers belong to the piece of the batch, whichever process has it
            entropy = [self.config.train.seed, 2, self.step, self.context.rank * len(parts) + i]
            torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1)[0]))
            # gradients are exchanged once, after the last part
            distributed = self.model if isinstance(self.model, DistributedDataParallel) else None
            with distributed.no_sync() if distributed and not last else contextlib.nullcontext():
                losses = self._forward(part, objects)
                terms = {name: terms.get(name, 0) + value.detach() for name, value in losses.terms.items()}
                total = losses.total
                totals.append(Readback(total))
                self.scaler.scale(total).backward()
        # gradients are clipped by their norm over the whole model
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.detector.parameters(), self.config.optimizer.clip_norm)
        self._check_finite(terms, [value.get() for value in totals], norm, parts, statistics)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average:
            self.average.update_parameters(self.detector)
        self._stopping = signals.get() > 0 or (self.context.world_size == 1 and self._stop.received is not None)
        return terms, norm

    def _forward(self, batch: Batch, objects: Tensor) -> Losses:
        device = self.context.device
        images = ImageBatch.from_images(batch.images, device)
        targets = batch.targets.to(device)
        with autocast(device, self.config.train.precision):
            predictions = self.model(images, targets)
        return criterion(predictions, targets, self.config.loss, objects)

    def _check_finite(
        self,
        terms: dict[str, Tensor],
        totals: list[float],
        norm: Tensor,
        parts: list[Batch],
        statistics: list[Tensor],
    ) -> None:
        """Stop all processes before a loss or gradient that is not finite reaches the weights.

        Gradients are averaged over the processes, so their norm is the same in all of them; losses are not, so the
        processes exchange whether theirs are finite. fp16 has infinite gradients now and then; its loss scaler then
        skips the step.

        Raises:
            NonFiniteLossError: in every process, with the same message. The state before this step is saved.
        """
        broken_losses = [i for i, total in enumerate(totals) if not math.isfinite(total)]
        broken_norm = not self.scaler.is_enabled() and not math.isfinite(float(norm))
        if not float(self.context.sum(len(broken_losses) + broken_norm)):
            return
        for buffer, before in zip(self._statistics, statistics, strict=True):
            buffer.copy_(before)
        names = [name for name, value in terms.items() if not math.isfinite(float(value))]
        suspects = [parts[i] for i in broken_losses] or parts
        reports = self.context.gather((names, [file for part in suspects for file in part.files]))
        guilty = [report for report in reports if report[0]] or reports
        terms_text = ", ".join(dict.fromkeys(name for names, _ in guilty for name in names[:6]))
        what = f"the loss is not finite ({terms_text})" if terms_text else "the gradient is not finite"
        files = ", ".join(file for _, found in guilty for file in found)
        self._save()
        self.context.barrier()
        advice = (
            "look at these images, or lower optimizer.lr, or use train.precision=fp32, and run the same command again"
        )
        if self.step == self._resumed_at:  # what ruined the weights may have happened before they were saved
            newest = resume_point_path(self.folder.checkpoints, self.step)
            advice += f". If that does not help, delete {newest} to go back to the resume point before it"
        raise NonFiniteLossError(
            f"step {self.step}: {what}. Images of this batch: {files}. The state before this step is saved; {advice}"
        )

    def _record(self, terms: dict[str, Tensor], norm: Tensor, seconds: float) -> dict[str, Any]:
        remaining = self.config.schedule.steps - self.step
        values = self.context.mean(torch.stack(list(terms.values()))).tolist()
        return {
            "step": self.step,
            "loss": sum(values),
            "grad_norm": float(norm),
            "lr": max(group["lr"] for group in self.optimizer.param_groups),
            "seconds_per_step": seconds,
            "images_per_second": self.config.train.batch_size / seconds,
            "remaining_seconds": remaining * seconds,
            "losses": dict(zip(terms, values, strict=True)),
        }

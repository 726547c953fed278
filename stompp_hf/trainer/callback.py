"""StoMPPTrainerCallback: a thin shell that drives a Progression from inside transformers' Trainer."""

import logging
from typing import Any, Literal

from transformers import TrainerCallback

from ..console import say, warn_once
from ..errors import CheckpointError, NotBinarizedError, ShardingError
from ..integrations.sharding import ONE_PROCESS
from ..integrations.transformers import wait_after_random_state
from ..surgery.adapters import has_adapters
from ..surgery.members import binary_layers, driven_model, members
from ..surgery.ownership import stop_at
from ..training.compiling import refuse_untraceable
from ..training.live_metrics import ALWAYS, LiveMetrics, check_every
from ..training.progression import Progression
from .binary_evaluation import evaluate_twice
from .hub_card import attach_to
from .resuming import check_adapted, check_folder, check_resumed, last_whole_checkpoint, stopped_after
from .stage_display import show_stage

logger = logging.getLogger(__name__)


class StoMPPTrainerCallback(TrainerCallback):
    """Freezes a binarized model stage by stage while Trainer trains it.

    Use:  trainer = Trainer(model, args, ..., callbacks=[StoMPPTrainerCallback()])
    or, so that every tracker sees the metrics and the progress bar names the stage:
          StoMPPTrainerCallback().attach(trainer)
    Without Trainer, drive a `Progression` yourself; this class adds nothing to it.

    With the loss it logs the metrics of `LiveMetrics`, all of them numbers with names that begin with stompp_;
    log_history has the name of the stage too (stompp_stage_name), which trackers would refuse. The loss line on the
    terminal has four (frozen fraction, stage, stage fraction, flip ratio), and the sampled ones where a tracker listens
    (`report_to`) or `metrics_every` is given. It keeps `load_best_model_at_end` and early stopping from choosing a
    model that is not fully binary yet.

    Args:
        rescale: on a resume with another max_steps, rescale what is left of the progression instead of keeping it.
        evaluate_binary: at each evaluation also evaluate the model as if it were fully binary now, as
            `eval_binary_*` (needs `attach`); layers that are still real are calibrated on the first
            `calibration_batches` training batches, for that evaluation only.
        calibration_batches: number of batches for it.
        metrics_every: steps from one sample of the metrics that cost something to the next; 0 leaves them out; "auto":
            every 50 steps, and on the terminal only where a tracker listens.

    Raises (before the first step):
        NotBinarizedError: `binarize_model` was not called.
        ShardingError: DataParallel, FSDP1 or DeepSpeed.
        CheckpointError: the checkpoint to resume from does not fit the model, or the model was loaded in
            mid-progression and training starts from step 0.
        ConfigError: metrics_every is no number of steps; or the optimizer cannot be held (see `Progression.attach`).
    """

    def __init__(
        self,
        rescale: bool = False,
        evaluate_binary: bool = False,
        calibration_batches: int = 4,
        metrics_every: int | Literal["auto"] = "auto",
    ) -> None:
        if metrics_every != "auto":
            check_every(metrics_every)
        self.metrics_every = metrics_every
        self.rescale = rescale
        self.evaluate_binary = evaluate_binary
        self.calibration_batches = calibration_batches
        self.progression: Progression | None = None
        self._live: LiveMetrics | None = None
        self._shows_samples = False
        self._holds_complete = False
        self._stands = 0  # the step at which a finished base stays, whatever is trained beside it
        self._trainer: Any = None

    # ---- attach: what needs the Trainer itself ----

    def attach(self, trainer: Any) -> "StoMPPTrainerCallback":
        """Join a Trainer (adding this callback if it is not among its own), and wrap its evaluate and train.

        From then on `resume_from_checkpoint=True` takes the last *whole* checkpoint; a save with several processes is
        over, and older checkpoints are deleted, only once all of them have written their part; and the model card gets
        this library's part: how to load the model, what is binary, sizes.
        """
        if self._trainer is trainer:  # wrapped already: a second flip ratio a record would always be 0
            return self
        handler = trainer.callback_handler
        for other in [c for c in handler.callbacks if isinstance(c, StoMPPTrainerCallback) and c is not self]:
            handler.callbacks.remove(other)
            logger.warning("the Trainer had a StoMPPTrainerCallback already; the one that is attached takes its place.")
        if self not in handler.callbacks:
            trainer.add_callback(self)
        self._trainer = trainer
        attach_to(trainer)
        # Before those that report: what on_log adds to a record, all that come later see.
        handler.callbacks.remove(self)
        handler.callbacks.insert(0, self)
        trainer.evaluate = evaluate_twice(
            trainer, lambda: self.progression if self.evaluate_binary else None, self.calibration_batches
        )
        train = trainer.train

        def train_checked(resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
            if resume_from_checkpoint is True:
                resume_from_checkpoint = last_whole_checkpoint(trainer.args.output_dir)
                if resume_from_checkpoint is None:
                    raise CheckpointError(
                        f"resume_from_checkpoint=True: {trainer.args.output_dir} has no whole checkpoint. Start "
                        "without it, or name a folder."
                    )
            if resume_from_checkpoint:
                check_folder(trainer.model, resume_from_checkpoint)
            return train(resume_from_checkpoint, *args, **kwargs)

        trainer.train = train_checked
        wait_after_random_state(trainer)
        return self

    # ---- Trainer's events ----

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        if args.n_gpu > 1:
            raise ShardingError(ONE_PROCESS)
        if self.progression is not None:  # auto_find_batch_size and a second train() begin anew
            self.progression.detach()
        if self._live is not None:
            self._live.end()
        self._bind(model, state)
        progression = self._required()
        if args.torch_compile and progression.config.is_ste_free:
            refuse_untraceable(progression.model)
        if not self._holds_complete:
            self._forget_best(state, state.global_step)
        progression.attach(kwargs["optimizer"])
        progression.step(self._place(state.global_step))
        trackers = [name for name in args.report_to or [] if name != "none"]
        self._shows_samples = bool(trackers) or self.metrics_every != "auto"
        self._live = LiveMetrics(progression, *([] if self.metrics_every == "auto" else [self.metrics_every]))
        if trackers and self._trainer is None:
            warn_once(
                logger, progression.model,
                "%s will not see StoMPP's metrics, which reach the progress bar and log_history only; add "
                "StoMPPTrainerCallback().attach(trainer) in place of callbacks=[StoMPPTrainerCallback()].",
                ", ".join(trackers),
            )  # fmt: skip

    def _bind(self, model: Any, state: Any) -> None:
        layers, root = binary_layers(model), driven_model(model)
        first = next(iter(layers.values()))
        adapted = has_adapters(model)  # then Trainer's checkpoints hold the adapter alone, and nothing of the base
        if not adapted and (stage := stopped_after(state)) is not None:
            stop_at(root, stage)
        finished = all(member.is_settled for member in members(root).values())
        if adapted and not finished:
            check_adapted(first.step, state.global_step)
        elif state.global_step > 0 and not adapted:
            check_resumed(layers, state.global_step)
        # Where the model itself stands: ahead of Trainer's count if an earlier run, or another process, trained it.
        ahead = first.step if first.step > state.global_step or (adapted and finished) else 0
        restarted = self.progression is not None and self.progression.model is root
        total = first.total_steps if adapted and finished and first.total_steps else state.max_steps
        self.progression = Progression(root, total, rescale=self.rescale)
        self._holds_complete = ahead > 0 and self.progression.is_complete(ahead)
        self._stands = ahead if adapted else 0
        if self._holds_complete and not adapted:
            warn_once(
                logger, root,
                "this model's progression is over (%s): training goes on, and no more of it freezes. To begin anew: "
                "restore_model(model), then binarize_model(model, config).",
                self.progression.outcome,
            )  # fmt: skip
        elif self._holds_complete:
            logger.info("the base stays as it is (%s); the adapter trains beside it.", self.progression.outcome)
        elif ahead and restarted:  # auto_find_batch_size, for one
            logger.warning("training begins anew at step %d: stages that were frozen thaw.", state.global_step)
        elif ahead:
            raise CheckpointError(
                f"this model is at step {ahead} of {first.total_steps} of its progression, and training starts at "
                f"step {state.global_step}. To go on: trainer.train(resume_from_checkpoint=...). To start over: "
                "restore_model(model), then binarize_model(model, config)."
            )

    def _place(self, global_step: int) -> int:
        """The step of the progression: Trainer's, as far as it goes; behind its end everything stays frozen."""
        total = self._required().total_steps
        return min(global_step if not self._holds_complete else self._stands or total, total)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._required().step(self._place(state.global_step))
        if self._live is not None:
            self._live.begin(state.global_step)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._live is not None:
            self._live.sample()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        progression = self._required()
        progression.step(self._place(state.global_step))
        # A metric that stands now was measured at an earlier step.
        self._forget_best(state, state.global_step - 1)
        if self._trainer is not None:
            show_stage(self._trainer, progression)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._forget_best(state, state.global_step, metric=False)

    def _forget_best(self, state: Any, step: int, metric: bool = True) -> None:
        """Accuracy dips as layers freeze, so the best model so far would always be one that is not binary."""
        if self._required().is_complete(self._place(step)):
            return
        state.best_model_checkpoint = None
        if metric:
            state.best_metric = state.best_global_step = None

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.progression is None or self._live is None or not logs or "loss" not in logs:
            return
        self.progression.check_latents()
        metrics = self._live.record()
        logs.update((n, value) for n, value in metrics.items() if self._shows_samples or n in ALWAYS)
        name = self.progression.stage_in_transition()[1]
        state.log_history[-1].update({**metrics, "stompp_stage_name": name})

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        progression = self._required()
        rest = progression.unfinished_stages(self._place(state.global_step))
        if rest:
            logger.warning(
                "training ended at step %d, before these stages were frozen: %s. The model is not fully binary. The "
                "progression has %d steps: train to its end (resume_from_checkpoint), or set `end` earlier; early "
                "stopping and a smaller max_steps on a resume cut it short.",
                state.global_step, ", ".join(rest), progression.total_steps,
            )  # fmt: skip
        elif state.is_world_process_zero and (count := len(progression.frozen_layers())):
            say(logger, "%s: %d layers, at step %d.", progression.outcome, count, state.global_step)
        if self._live is not None:
            self._live.end()
        progression.detach()

    def _required(self) -> Progression:
        if self.progression is None:
            raise NotBinarizedError("StoMPPTrainerCallback: training has not begun; call trainer.train().")
        return self.progression

"""Train an image model in the order of timm's train.py, with timm's own utilities; nothing here knows this library.

The tests run it where they are given no copy of the real one (environment variable TIMM_TRAIN: the path of train.py).
"""

import argparse
import contextlib
import logging
import os
from pathlib import Path

import torch
from timm.data import Mixup, create_dataset, create_loader, resolve_data_config
from timm.models import create_model, model_parameters, resume_checkpoint, safe_model_name
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.task import ClassificationTask
from timm.utils import (
    AverageMeter,
    CheckpointSaver,
    NativeScaler,
    ParseKwargs,
    dispatch_clip_grad,
    get_outdir,
    random_seed,
    setup_default_logging,
    update_summary,
)

_logger = logging.getLogger("train")

parser = argparse.ArgumentParser(description="Training in timm's order")
parser.add_argument("--data-dir")
parser.add_argument("--model", default="resnet18")
parser.add_argument("--model-kwargs", nargs="*", default={}, action=ParseKwargs)
parser.add_argument("--num-classes", type=int)
parser.add_argument("--img-size", type=int)
parser.add_argument("--initial-checkpoint", default="")
parser.add_argument("--resume", default="")
parser.add_argument("--no-resume-opt", action="store_true")
parser.add_argument("--batch-size", type=int, default=128)
parser.add_argument("--grad-accum-steps", type=int, default=1)
parser.add_argument("--channels-last", action="store_true")
parser.add_argument("--device", default="cpu")
parser.add_argument("--amp", action="store_true")
parser.add_argument("--amp-dtype", default="bfloat16")
parser.add_argument("--opt", default="sgd")
parser.add_argument("--momentum", type=float, default=0.9)
parser.add_argument("--weight-decay", type=float, default=2e-5)
parser.add_argument("--clip-grad", type=float)
parser.add_argument("--clip-mode", default="norm")
parser.add_argument("--sched", default="cosine")
parser.add_argument("--sched-on-updates", action="store_true")
parser.add_argument("--lr", type=float, default=0.05)
parser.add_argument("--min-lr", type=float, default=0.0)
parser.add_argument("--epochs", type=int, default=2)
parser.add_argument("--stop-epoch", type=int)
parser.add_argument("--warmup-epochs", type=int, default=0)
parser.add_argument("--warmup-lr", type=float, default=1e-5)
parser.add_argument("--no-aug", action="store_true")
parser.add_argument("--mixup", type=float, default=0.0)
parser.add_argument("--smoothing", type=float, default=0.1)
parser.add_argument("--drop-path", type=float)
parser.add_argument("--model-ema", action="store_true")
parser.add_argument("--model-ema-decay", type=float, default=0.9998)
parser.add_argument("--model-ema-warmup", action="store_true")
parser.add_argument("--seed", type=int, default=42)
parser.add_argument("--workers", type=int, default=0)
parser.add_argument("--recovery-interval", type=int, default=0)
parser.add_argument("--checkpoint-hist", type=int, default=10)
parser.add_argument("--output", default="output")
parser.add_argument("--experiment", default="run")


def main():
    setup_default_logging()
    args = parser.parse_args()
    device = torch.device(args.device)
    autocast = contextlib.nullcontext
    if args.amp:
        autocast = lambda: torch.autocast(device.type, getattr(torch, args.amp_dtype))  # noqa: E731
    random_seed(args.seed, 0)

    model = create_model(
        args.model,
        num_classes=args.num_classes,
        drop_path_rate=args.drop_path,
        checkpoint_path=args.initial_checkpoint,
        **args.model_kwargs,
    )
    _logger.info("Model %s created", safe_model_name(args.model))
    data_config = resolve_data_config(vars(args), model=model)
    model.to(device=device)
    if args.channels_last:
        model.to(memory_format=torch.channels_last)

    task = ClassificationTask(
        model, criterion_kwargs={"smoothing": args.smoothing, "soft_targets": args.mixup > 0}, device=device
    )
    if args.model_ema:
        task.setup_ema(decay=args.model_ema_decay, use_warmup=args.model_ema_warmup)
    optimizer = create_optimizer_v2(task.get_trainable_module(), **optimizer_kwargs(cfg=args))
    loss_scaler = NativeScaler(device=device.type) if args.amp and args.amp_dtype == "float16" else None

    resume_epoch = None
    if args.resume:
        resume_epoch = resume_checkpoint(
            task.get_trainable_module(),
            args.resume,
            optimizer=None if args.no_resume_opt else optimizer,
            loss_scaler=None if args.no_resume_opt else loss_scaler,
            weights_only=False,
        )
        if args.model_ema:
            checkpoint = torch.load(args.resume, map_location="cpu", weights_only=False)
            task.load_checkpoint_state(checkpoint["state_dict_ema"], ema=True)

    loaders = {}
    for split, training in (("train", True), ("validation", False)):
        dataset = create_dataset("", root=args.data_dir, split=split, is_training=training, batch_size=args.batch_size)
        loaders[split] = create_loader(
            dataset,
            input_size=data_config["input_size"],
            batch_size=args.batch_size,
            is_training=training,
            no_aug=args.no_aug,
            interpolation=data_config["interpolation"],
            mean=data_config["mean"],
            std=data_config["std"],
            num_workers=args.workers,
            device=device,
            use_prefetcher=False,
        )
    mixup_fn = None
    if args.mixup > 0:
        mixup_fn = Mixup(mixup_alpha=args.mixup, label_smoothing=args.smoothing, num_classes=args.num_classes)

    output_dir = get_outdir(args.output, args.experiment)
    saver = CheckpointSaver(
        model=task.get_trainable_module(),
        optimizer=optimizer,
        args=args,
        amp_scaler=loss_scaler,
        checkpoint_dir=output_dir,
        recovery_dir=output_dir,
        max_history=args.checkpoint_hist,
        task=task,
    )
    updates_per_epoch = (len(loaders["train"]) + args.grad_accum_steps - 1) // args.grad_accum_steps
    lr_scheduler, num_epochs = create_scheduler_v2(
        optimizer, **scheduler_kwargs(args), updates_per_epoch=updates_per_epoch
    )
    start_epoch = resume_epoch or 0
    if lr_scheduler is not None and start_epoch > 0:
        if args.sched_on_updates:
            lr_scheduler.step_update(start_epoch * updates_per_epoch)
        else:
            lr_scheduler.step(start_epoch)

    for epoch in range(start_epoch, min(num_epochs, args.stop_epoch or num_epochs)):
        train_metrics = train_one_epoch(
            epoch, task, loaders["train"], optimizer, args, lr_scheduler, saver, autocast, loss_scaler, mixup_fn
        )
        eval_metrics = validate(task.get_eval_model(), task, loaders["validation"], device, autocast)
        if args.model_ema:
            eval_metrics = validate(task.get_eval_model(ema=True), task, loaders["validation"], device, autocast)
        lrs = [group["lr"] for group in optimizer.param_groups]
        update_summary(
            epoch, train_metrics, eval_metrics, filename=os.path.join(output_dir, "summary.csv"), lr=sum(lrs) / len(lrs)
        )
        best_metric, best_epoch = saver.save_checkpoint(epoch, metric=eval_metrics["top1"])
        if lr_scheduler is not None:
            lr_scheduler.step(epoch + 1, eval_metrics["top1"])
        _logger.info("*** Best metric: %s (epoch %s), in %s", best_metric, best_epoch, Path(output_dir).name)


def train_one_epoch(epoch, task, loader, optimizer, args, lr_scheduler, saver, autocast, loss_scaler, mixup_fn):
    task.train()
    losses = AverageMeter()
    updates_per_epoch = (len(loader) + args.grad_accum_steps - 1) // args.grad_accum_steps
    num_updates = epoch * updates_per_epoch
    optimizer.zero_grad()
    for batch_idx, (input, target) in enumerate(loader):
        need_update = batch_idx == len(loader) - 1 or (batch_idx + 1) % args.grad_accum_steps == 0
        if mixup_fn is not None:
            input, target = mixup_fn(input, target)
        if args.channels_last:
            input = input.contiguous(memory_format=torch.channels_last)
        with autocast():
            loss = task(input, target)["loss"] / args.grad_accum_steps
        parameters = model_parameters(task.get_trainable_module(), exclude_head="agc" in args.clip_mode)
        if loss_scaler is not None:
            loss_scaler(
                loss, optimizer, clip_grad=args.clip_grad, clip_mode=args.clip_mode, parameters=parameters,
                need_update=need_update,
            )  # fmt: skip
        else:
            loss.backward()
            if need_update:
                if args.clip_grad is not None:
                    dispatch_clip_grad(parameters, value=args.clip_grad, mode=args.clip_mode)
                optimizer.step()
        losses.update(loss.item() * args.grad_accum_steps, input.size(0))
        if not need_update:
            continue
        num_updates += 1
        optimizer.zero_grad()
        task.update_ema(step=num_updates)
        if args.recovery_interval and (batch_idx + 1) % args.recovery_interval == 0:
            saver.save_recovery(epoch, batch_idx=batch_idx)
        if lr_scheduler is not None:
            lr_scheduler.step_update(num_updates=num_updates, metric=losses.avg)
    return {"loss": losses.avg}


def validate(model, task, loader, device, autocast):
    evaluator = task.create_evaluator()
    model.eval()
    with torch.inference_mode():
        for input, target in loader:
            with autocast():
                output = model(input.to(device))
            evaluator.update(output, target.to(device))
    return evaluator.compute()


if __name__ == "__main__":
    main()

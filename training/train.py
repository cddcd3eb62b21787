"""
Trains I-MedSAM with Accelerate, on one device or several:

    python -m imedsam.training.train --model_name_or_path facebook/sam-vit-base --dataset_name DATA --output_dir DIR
    accelerate launch --num_processes 4 -m imedsam.training.train ...
    torchrun --nproc-per-node 4 -m imedsam.training.train ...

Every random number depends on the seed and the position in the run alone, so a run that was stopped anywhere and is
resumed ends with the same weights as one that was not.
"""

import argparse
import time
from contextlib import nullcontext
from pathlib import Path

import torch
import transformers
from accelerate import Accelerator, DistributedDataParallelKwargs, PartialState
from accelerate.utils import gather_object, set_seed
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import get_scheduler

from imedsam.modeling_imedsam import IMedSamModel
from imedsam.modeling_sf_recsam import SFRecSamModel
from imedsam.processing.image_processing_imedsam import IMedSamImageProcessor
from imedsam.processing.processing_imedsam import IMedSamProcessor
from imedsam.training.arguments import parse_args
from imedsam.training.averaging import WeightAverage
from imedsam.training.baselines import METHODS, find_model_class, load_model
from imedsam.training.checkpoints import TrainerState, find_best, resume, save_checkpoint, save_model
from imedsam.training.data import EpochSampler, PromptedSegmentationDataset, collate_prompts
from imedsam.training.evaluation import class_means, evaluate_masks, floor_metrics
from imedsam.training.examples import Examples, load_examples, read_labels, without_empty_masks
from imedsam.training.loop import (
    batch_statistics,
    check_finite,
    count_epochs_and_steps,
    flatten,
    refusals_in_a_line,
    remaining_batches,
    seed_step,
    share_batch_statistics,
    show_progress,
)
from imedsam.training.machine import describe_machine
from imedsam.training.metrics import MetricTable
from imedsam.training.model_card import is_hub_name
from imedsam.training.report import weights_hash, write_report

# Which flag holds the learning rate of which part of the model.
LEARNING_RATES = {
    "pixel decoder": "learning_rate",
    "ellipse prior": "learning_rate",
    "coarse field": "learning_rate",
    "fine field": "learning_rate",
    "convolutional head": "learning_rate",
    "mask head": "learning_rate",
    "U-Net": "learning_rate",
    "frequency gates": "learning_rate",
    "LoRA": "adapter_learning_rate",
    "frequency adapters": "adapter_learning_rate",
    "prompt encoder": "adapter_learning_rate",
    "upscaling": "adapter_learning_rate",
    "image encoder": "encoder_learning_rate",
    "mask decoder": "encoder_learning_rate",
    "positions": "adapter_learning_rate",
    "convolutional branch": "learning_rate",
    "cross attention": "learning_rate",
    "spectral filter": "learning_rate",
    "adapters": "learning_rate",
    "learned corrector": "learning_rate",
}
LAST_COARSE_WEIGHT = 0.1


def command(argv: list[str] | None = None) -> None:
    """`main` for a command line, which says in a line what is refused, as argparse does of wrong flags."""
    args = parse_args(argv, __doc__)
    with refusals_in_a_line():
        parts = prepare(args)
    run(args, *parts)


def main(argv: list[str] | None = None) -> None:
    """
    Trains, evaluates and writes the model to `--output_dir`. The flags are the command line's unless given.

    Raises:
        ValueError, OSError: data, a checkpoint or flags that cannot be, before anything is trained.
    """
    args = parse_args(argv, __doc__)
    run(args, *prepare(args))


def prepare(args: argparse.Namespace) -> tuple:
    """All that a training takes, and where it stands."""
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        log_with=args.report_to if args.with_tracking else None,
        project_dir=args.output_dir,
        step_scheduler_with_optimizer=False,
        # Which class heads and prompt embeddings get a gradient changes from batch to batch.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    if not accelerator.is_main_process:
        transformers.utils.logging.set_verbosity_error()
    set_seed(args.seed)
    examples = get_examples(args)
    model, processor = get_model_and_processor(args, examples["train"])
    if accelerator.is_main_process:
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        model.print_trainable_parameters()
    train_loader = get_dataloaders(args, examples["train"], processor)
    optimizer = torch.optim.AdamW(get_parameter_groups(model, args))

    model, optimizer, train_loader = accelerator.prepare(model, optimizer, train_loader)
    args.num_train_epochs, args.max_train_steps = count_epochs_and_steps(args, len(train_loader))
    scheduler = accelerator.prepare(
        get_scheduler(args.lr_scheduler_type, optimizer, args.num_warmup_steps, args.max_train_steps)
    )
    average = None
    if args.ema_decay:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        average = WeightAverage([*trained, *batch_statistics(model)], args.ema_decay)
        accelerator.register_save_state_pre_hook(average.save)
        accelerator.register_load_state_pre_hook(average.load)
    if args.with_tracking:
        scalars = {key: value for key, value in vars(args).items() if isinstance(value, (int, float, str))}
        accelerator.init_trackers("imedsam", config=scalars)
    state = resume(accelerator, args)
    return accelerator, model, processor, train_loader, examples, optimizer, scheduler, average, state


def run(args, accelerator, model, processor, train_loader, examples, optimizer, scheduler, average, state) -> None:
    """Trains what is prepared, to the end."""
    if accelerator.is_main_process:
        (Path(args.output_dir) / "metrics.json").unlink(missing_ok=True)  # the sign of a finished run
    train(
        accelerator, model, processor, train_loader, examples["validation"], optimizer, scheduler, average, args, state
    )
    finish(accelerator, processor, examples, args, state)
    accelerator.end_training()
    accelerator.free_memory()


def train(accelerator, model, processor, train_loader, validation, optimizer, scheduler, average, args, state) -> None:
    """Trains from `state` on; evaluates, keeps the best weights and saves checkpoints on the way."""
    bar = tqdm(
        total=args.max_train_steps,
        initial=state.global_step,
        desc="Training",
        disable=not accelerator.is_main_process,
    )
    # A run stopped between its last step and its last validation has batches behind it and no step before it.
    while state.epoch < args.num_train_epochs and (state.global_step < args.max_train_steps or state.batch):
        train_epoch(accelerator, model, train_loader, optimizer, scheduler, average, args, state, bar)
        row = {
            "epoch": state.epoch,
            "step": state.global_step,
            "loss": state.loss_sum / max(1, state.batch),
            "coarse_loss_weight": get_coarse_loss_weight(args, state.epoch, state.batch, len(train_loader)),
            "learning_rates": {group["name"]: group["lr"] for group in optimizer.param_groups},
        }
        started_at = time.perf_counter()
        last = state.epoch + 1 >= args.num_train_epochs or state.global_step >= args.max_train_steps
        if last or (state.epoch + 1) % args.eval_every == 0:
            options = {"output_size": args.evaluation_size, "mode": None, "metrics": ("overlap",)}
            share_batch_statistics(model)
            with average.applied() if average else nullcontext():
                table = evaluate(accelerator, model, processor, validation, args, **options)
                row["validation"] = table.mean()
                row["frequency_ratio"] = get_frequency_ratio(accelerator, model, processor, validation)
                if row["validation"]["dice"] > state.best_score:
                    state.best_score, state.best_epoch = row["validation"]["dice"], state.epoch
                    save_model(accelerator, model, processor, Path(args.output_dir) / "best")
            show_progress(bar, row["loss"], state)
            accelerator.log(flatten({"validation": row["validation"]}), step=state.global_step)
            accelerator.log(flatten({"frequency_ratio": row["frequency_ratio"]}), step=state.global_step)
        state.seconds += time.perf_counter() - started_at
        state.history.append(row)
        state.epoch, state.batch, state.loss_sum = state.epoch + 1, 0, 0.0
        if args.checkpointing_steps == "epoch":
            save_checkpoint(accelerator, args, state)
    bar.close()


def train_epoch(accelerator, model, train_loader, optimizer, scheduler, average, args, state, bar) -> None:
    """One epoch, or what is left of it."""
    model.train()
    if state.global_step >= args.max_train_steps:
        return
    loader = remaining_batches(train_loader, state)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    options = {
        "spectral_loss_weight": args.spectral_weight,
        "uncertainty_loss_weight": args.uncertainty_weight,
    }
    if args.num_candidates:
        options["num_points"] = args.num_points
    started_at = time.perf_counter()
    for batch in loader:
        del batch["original_sizes"]
        seed_step(args.seed, state.epoch, state.batch, accelerator.process_index)
        weight = get_coarse_loss_weight(args, state.epoch, state.batch, len(train_loader))
        with accelerator.accumulate(model):
            loss = model(**batch, coarse_loss_weight=weight, **options).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(trainable, args.max_grad_norm)
            optimizer.step()
            if accelerator.sync_gradients and not accelerator.optimizer_step_was_skipped:
                scheduler.step()
                if average:
                    average.update()
            optimizer.zero_grad()
        loss = accelerator.reduce(loss.detach(), "mean").item()
        check_finite(loss, state)
        state.seconds, started_at = state.seconds + time.perf_counter() - started_at, time.perf_counter()
        state.batch += 1
        state.loss_sum += loss
        if not accelerator.sync_gradients:
            continue
        state.global_step += 1
        bar.update()
        show_progress(bar, loss, state)
        rates = {f"learning_rate/{g['name']}": g["lr"] for g in optimizer.param_groups}
        accelerator.log({"train/loss": loss, "train/coarse_loss_weight": weight, **rates}, step=state.global_step)
        if isinstance(args.checkpointing_steps, int) and state.global_step % args.checkpointing_steps == 0:
            save_checkpoint(accelerator, args, state)
        if state.global_step >= args.max_train_steps:
            loader.end()
            break


def evaluate(accelerator, model, processor, examples: Examples, args, **options) -> MetricTable:
    """`evaluate_masks` with every process taking its share of the images; all of them get the whole table."""
    table = evaluate_masks(
        accelerator.unwrap_model(model),
        processor,
        examples,
        prompt=args.prompt,
        seed=args.seed,
        batch_size=args.per_device_eval_batch_size,
        indices=range(accelerator.process_index, len(examples), accelerator.num_processes),
        progress=accelerator.is_main_process,
        **options,
    )
    table.rows = sorted(gather_object(table.rows), key=lambda row: row["name"])
    return table


def finish(accelerator, processor, examples: dict[str, Examples], args, state: TrainerState) -> None:
    """Makes the output folder the best model's, with its metrics at the images' own size."""
    output_dir = Path(args.output_dir)
    model = load_model(find_best(accelerator, output_dir, state)).to(accelerator.device)
    report = {
        "arguments": vars(args),
        "on_hub": [name for name in (args.model_name_or_path, args.dataset_name) if is_hub_name(name)],
        "image_size": model.config.image_size,
        "classes": examples["train"].id2label,
        "num_images": {split: len(part) for split, part in examples.items()},
        "trainable_parameters": {name: sum(p.numel() for p in part) for name, part in model.parameter_parts().items()},
        "seconds": round(state.seconds, 1),
        "machine": describe_machine(),
        "num_processes": accelerator.num_processes,
        "best_epoch": state.best_epoch,
        "history": state.history,
    }
    for split in ("validation", "test") if args.do_test else ("validation",):
        part = examples[split]
        # Masks as `imedsam predict` renders them: exactly, a hundred images of 500 pixels take ten minutes.
        table = evaluate(accelerator, model, processor, part, args, mode=None)
        report[split] = table.mean()
        if part.labels is not None:
            report[f"{split}_classes"] = class_means(table, part)
        if args.box_jitter and args.prompt == "box":
            jittered = evaluate(accelerator, model, processor, part, args, mode=None, box_jitter=args.box_jitter)
            report[f"{split}_jittered"] = jittered.mean()
        report[f"{split}_objects"] = table.rows
        floors = "floors" if split == "validation" else f"{split}_floors"
        if accelerator.is_main_process:
            report[floors] = {name: floor.mean() for name, floor in floor_metrics(part).items()}
    if accelerator.is_main_process:
        model.save_pretrained(output_dir)
        processor.save_pretrained(output_dir)
        write_report(output_dir, {**report, "weights": weights_hash(str(output_dir))})
    accelerator.wait_for_everyone()


def get_examples(args: argparse.Namespace) -> dict[str, Examples]:
    labels = None if args.labels is None else read_labels(Path(args.labels))
    counts = {"train": args.num_train_images, "validation": args.num_eval_images, "test": args.num_eval_images}
    return {
        split: without_empty_masks(
            load_examples(
                args.dataset_name,
                split,
                seed=args.seed,
                labels=labels,
                num_images=counts[split],
                image_size=args.phantom_size,
                num_classes=args.num_classes,
            )
        )
        for split in (("train", "validation", "test") if args.do_test else ("train", "validation"))
    }


def get_model_and_processor(args: argparse.Namespace, examples: Examples) -> tuple[IMedSamModel, IMedSamProcessor]:
    """Of the method, from a SAM checkpoint, or from one of its own to train on."""
    path, method = args.model_name_or_path, METHODS[args.method]
    if find_model_class(path) is None:
        if args.train_corrector:
            raise ValueError(
                f"Expected an SF-RecSAM checkpoint for --train_corrector, got a SAM at {path}: train it first."
            )
        model = method.model_class.from_sam_pretrained(
            path, image_size=args.image_size, id2label=examples.id2label, **method.get_values(args.config)
        )
        size, mode = model.config.image_size, args.resize_mode or "stretch"
        return model, IMedSamProcessor(IMedSamImageProcessor(size=size, resize_mode=mode, window=args.window))
    model, processor = load_model(path), IMedSamProcessor.from_pretrained(path)
    changed = [key for key, value in args.config.items() if getattr(model.config, key) != value]
    own = {"image_size": model.config.image_size, "resize_mode": processor.image_processor.resize_mode}
    own["window"] = processor.image_processor.window and list(processor.image_processor.window)
    changed += [f"--{key}" for key, value in own.items() if getattr(args, key) not in (None, value)]
    if changed:
        raise ValueError(
            f"Expected the configuration and processor of {path}, got another {', '.join(changed)}: it is a "
            "checkpoint to train on and keeps its own; start from a SAM checkpoint to change them."
        )
    if not method.made(model):
        made = [name for name, other in METHODS.items() if other.made(model)]
        raise ValueError(f"Expected --model {made[-1]}, which {path} was trained with, got {args.method}.")
    if model.config.num_labels != len(examples.id2label):
        raise ValueError(
            f"Expected {model.config.num_labels} classes in {args.dataset_name}, which {path} was trained for, got "
            f"{len(examples.id2label)}: start from a SAM checkpoint."
        )
    if examples.labels is not None and model.config.id2label != examples.id2label:
        raise ValueError(
            f"Expected the classes {model.config.id2label} in {args.dataset_name}, which {path} was trained for, got "
            f"{examples.id2label}: name and number them alike, or start from a SAM checkpoint."
        )
    if args.train_corrector:
        add_corrector(model, path)
    return model, processor


def add_corrector(model: IMedSamModel, path: str) -> None:
    """The second stage's start."""
    if not isinstance(model, SFRecSamModel):
        raise ValueError(
            f"Expected an SF-RecSAM checkpoint for --train_corrector, got one of type {model.config.model_type!r} at "
            f"{path}: any model's masks are corrected without parameters by `imedsam predict --correct`."
        )
    if model.learned_corrector is None:  # else that one is trained on
        model.add_corrector()


def get_dataloaders(args: argparse.Namespace, examples: Examples, processor: IMedSamProcessor) -> DataLoader:
    """The batches of the training images; validation images are read one by one at their own sizes."""
    dataset = PromptedSegmentationDataset(
        examples,
        processor,
        prompt=args.prompt,
        num_points=args.num_candidates or args.num_points,
        uniform_share=args.uniform_share,
        boundary_share=args.boundary_share,
        point_weighting=args.point_weighting,
        box_jitter=args.box_jitter,
        augmentation=args.augmentation,
        copy_paste=args.copy_paste,
        supervision=args.supervision,
        label_size=args.label_size or processor.image_processor.size["height"],
        seed=args.seed,
    )
    return DataLoader(
        dataset,
        batch_size=args.per_device_train_batch_size,
        # An incomplete last batch would be filled up with images of the first one if there are several processes.
        drop_last=len(dataset) >= args.per_device_train_batch_size * PartialState().num_processes,
        sampler=EpochSampler(dataset, args.seed),
        collate_fn=collate_prompts,
        num_workers=args.dataloader_num_workers,
        persistent_workers=args.dataloader_num_workers > 0,
        pin_memory=torch.cuda.is_available(),
    )


def get_parameter_groups(model: IMedSamModel, args: argparse.Namespace) -> list[dict]:
    """AdamW's groups: a learning rate per part, and no weight decay on biases, norms and gates."""
    groups = []
    biases = {parameter for name, parameter in model.named_parameters() if name.endswith("bias")}  # a row per class
    for name, parameters in model.parameter_parts().items():
        decays = [p.ndim > 1 and p not in biases and name != "frequency gates" for p in parameters]
        for decay in (True, False):
            chosen = [p for p, decayed in zip(parameters, decays, strict=True) if decayed == decay]
            if chosen:
                groups.append(
                    {
                        "name": name if decay else f"{name} (no decay)",
                        "params": chosen,
                        "lr": getattr(args, LEARNING_RATES[name]),
                        "weight_decay": args.weight_decay if decay else 0.0,
                    }
                )
    return groups


def get_coarse_loss_weight(args: argparse.Namespace, epoch: int, batch: int, batches_per_epoch: int) -> float:
    """Falls from 1 to 0.1 over `--coarse_ramp_epochs`; the rest is the merged output's."""
    if args.coarse_ramp_epochs == 0:
        return LAST_COARSE_WEIGHT
    progress = min(1.0, (epoch + batch / batches_per_epoch) / args.coarse_ramp_epochs)
    return 1.0 - (1.0 - LAST_COARSE_WEIGHT) * progress


def get_frequency_ratio(accelerator, model, processor, examples: Examples) -> list[float]:
    """How much the frequency branch adds to each block, on the first validation image; [] without a branch."""
    model = accelerator.unwrap_model(model)
    if model.frequency_branch is None:
        return []
    inputs = processor.image_processor(examples[0]["image"]).to(model.device)
    return model.frequency_ratio(inputs["pixel_values"], inputs["reshaped_input_sizes"]).tolist()


if __name__ == "__main__":
    command()

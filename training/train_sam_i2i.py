"""
Trains SAM-I2I, which translates one MR contrast into another, with Accelerate, on one device or several:

    accelerate launch -m imedsam.training.train_sam_i2i --model_name_or_path facebook/sam2.1-hiera-tiny \\
        --source DIR/t1 --target DIR/t2 --output_dir DIR

Every random number depends on the seed and the position in the run alone, so a run that was stopped anywhere and is
resumed ends with the same weights as one that was not.
"""

import argparse
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import transformers
from accelerate import Accelerator, DistributedDataParallelKwargs, PartialState
from accelerate.utils import gather_object, set_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import get_scheduler
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel

from imedsam.configuration.configuration_sam_i2i import SamI2IConfig
from imedsam.modeling_sam_i2i import SamI2IModel
from imedsam.processing.image_processing_sam_i2i import SamI2IImageProcessor
from imedsam.training.checkpoints import TrainerState, find_best, resume, save_checkpoint, save_model
from imedsam.training.data import EpochSampler
from imedsam.training.discriminator import (
    ClipFeatures,
    DiscriminatorHeads,
    discriminator_loss,
    generator_loss,
    held_still,
)
from imedsam.training.loop import (
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
from imedsam.training.model_card import is_hub_name
from imedsam.training.pairs import SlicePair, SlicePairs, batches_of_one_size, find_pairs, split_patients
from imedsam.training.report import weights_hash, write_report
from imedsam.training.translation_arguments import parse_args
from imedsam.training.translation_card import translation_card
from imedsam.training.translation_metrics import TRANSLATION_METRICS, mean_metrics, slice_metrics
from imedsam.training.translators import TRANSLATORS, TranslationUNet, TranslationUNetConfig, find_translator


@dataclass
class Player:
    """A network that is trained, the generator's or the discriminator's, as Accelerate prepared it."""

    model: nn.Module
    optimizer: Any
    scheduler: Any

    def step(self, accelerator: Accelerator, max_grad_norm: float | None) -> None:
        if accelerator.sync_gradients and max_grad_norm is not None:
            accelerator.clip_grad_norm_([p for p in self.model.parameters() if p.requires_grad], max_grad_norm)
        self.optimizer.step()
        if accelerator.sync_gradients and not accelerator.optimizer_step_was_skipped:
            self.scheduler.step()
        self.optimizer.zero_grad()


@dataclass
class Adversary:
    """The discriminator: what a frozen CLIP sees, which is neither trained nor saved, and heads on it."""

    features: ClipFeatures
    heads: Player


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
    distribution = DistributedDataParallelKwargs()
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        log_with=args.report_to if args.with_tracking else None,
        project_dir=args.output_dir,
        step_scheduler_with_optimizer=False,
        kwargs_handlers=[distribution],
    )
    if accelerator.mixed_precision == "fp16" and not args.no_gan:  # which `accelerate launch` may have set
        raise ValueError(
            "Expected --mixed_precision bf16 or no with a discriminator, got fp16: one scale of the losses cannot "
            "serve two optimisers."
        )
    if not accelerator.is_main_process:
        transformers.utils.logging.set_verbosity_error()
    set_seed(args.seed)
    model, processor = get_model_and_processor(args)
    # The last layers of some backbones have no part in their stages.
    distribution.find_unused_parameters = getattr(model.config, "train_backbone", False)
    with accelerator.main_process_first():
        pairs = get_pairs(args, processor, progress=accelerator.is_main_process)
    train_loader = accelerator.prepare(get_dataloaders(args, pairs["train"], processor))
    args.num_train_epochs, args.max_train_steps = count_epochs_and_steps(args, len(train_loader))
    generator = make_player(accelerator, model, args.learning_rate, args)
    adversary = None if args.no_gan else get_adversary(accelerator, args)
    if args.with_tracking:
        scalars = {key: value for key, value in vars(args).items() if isinstance(value, (int, float, str))}
        accelerator.init_trackers("sam_i2i", config=scalars)
    return accelerator, generator, adversary, processor, train_loader, pairs, resume(accelerator, args)


def run(args, accelerator, generator, adversary, processor, train_loader, pairs, state) -> None:
    """Trains what is prepared, to the end."""
    if accelerator.is_main_process:
        (Path(args.output_dir) / "metrics.json").unlink(missing_ok=True)  # the sign of a finished run
    train(accelerator, generator, adversary, processor, train_loader, pairs["validation"], args, state)
    finish(accelerator, generator.model, processor, pairs, args, state)
    accelerator.end_training()
    accelerator.free_memory()


def train(accelerator, generator, adversary, processor, train_loader, validation, args, state) -> None:
    """Trains from `state` on; evaluates, keeps the best weights and saves checkpoints on the way."""
    bar = tqdm(
        total=args.max_train_steps,
        initial=state.global_step,
        desc="Training",
        disable=not accelerator.is_main_process,
    )
    # A run stopped between its last step and its last validation has batches behind it and no step before it.
    while state.epoch < args.num_train_epochs and (state.global_step < args.max_train_steps or state.batch):
        train_epoch(accelerator, generator, adversary, train_loader, args, state, bar)
        means = {name: total / max(1, state.batch) for name, total in state.sums.items()}
        row = {"epoch": state.epoch, "step": state.global_step, "loss": state.loss_sum / max(1, state.batch), **means}
        started_at = time.perf_counter()
        last = state.epoch + 1 >= args.num_train_epochs or state.global_step >= args.max_train_steps
        if validation and (last or (state.epoch + 1) % args.eval_every == 0):
            share_batch_statistics(generator.model)
            row["validation"] = get_means(evaluate(accelerator, generator.model, processor, validation, args))
            if row["validation"]["psnr"] > state.best_score:
                state.best_score, state.best_epoch = row["validation"]["psnr"], state.epoch
                save_model(accelerator, generator.model, processor, Path(args.output_dir) / "best")
            show_progress(bar, row["loss"], state, "psnr")
            accelerator.log(flatten({"validation": row["validation"]}), step=state.global_step)
        state.seconds += time.perf_counter() - started_at
        state.history.append(row)
        state.epoch, state.batch, state.loss_sum, state.sums = state.epoch + 1, 0, 0.0, {}
        if args.checkpointing_steps == "epoch":
            save_checkpoint(accelerator, args, state)
    bar.close()


def train_epoch(accelerator, generator, adversary, train_loader, args, state, bar) -> None:
    """One epoch, or what is left of it."""
    players = [generator] if adversary is None else [generator, adversary.heads]
    for player in players:
        player.model.train()
    if state.global_step >= args.max_train_steps:
        return
    loader = remaining_batches(train_loader, state)
    started_at = time.perf_counter()
    for batch in loader:
        seed_step(args.seed, state.epoch, state.batch, accelerator.process_index)
        with accelerator.accumulate(*(player.model for player in players)):
            losses = backward(accelerator, generator, adversary, batch, args)
            for player in players:
                player.step(accelerator, args.max_grad_norm)
        means = {name: accelerator.reduce(loss.detach(), "mean").item() for name, loss in losses.items()}
        for loss in means.values():
            check_finite(loss, state)
        state.seconds, started_at = state.seconds + time.perf_counter() - started_at, time.perf_counter()
        state.batch += 1
        loss = means.pop("loss")
        state.loss_sum += loss
        state.sums = {name: state.sums.get(name, 0.0) + value for name, value in means.items()}
        if not accelerator.sync_gradients:
            continue
        state.global_step += 1
        bar.update()
        show_progress(bar, loss, state, "psnr")
        rate = generator.scheduler.get_last_lr()[0]
        accelerator.log(flatten({"train": {"loss": loss, **means, "learning_rate": rate}}), step=state.global_step)
        if isinstance(args.checkpointing_steps, int) and state.global_step % args.checkpointing_steps == 0:
            save_checkpoint(accelerator, args, state)
        if state.global_step >= args.max_train_steps:
            loader.end()
            break


def backward(accelerator, generator: Player, adversary: Adversary | None, batch, args) -> dict[str, Tensor]:
    """The gradients of both players for one batch; returns the losses, `loss` being the generator's (equation 3)."""
    labels = batch["labels"]
    output = generator.model(batch["pixel_values"], labels)
    if adversary is None:
        loss = args.l1_weight * output.loss
        accelerator.backward(loss)
        return {"loss": loss, "l1": output.loss}
    heads = adversary.heads.model
    with accelerator.autocast():
        fake = adversary.features(output.reconstruction)
    unwrapped = accelerator.unwrap_model(heads)
    with held_still(unwrapped):
        gan = generator_loss(unwrapped(fake))
        loss = args.l1_weight * output.loss + args.gan_weight * gan
        accelerator.backward(loss)
    with torch.no_grad(), accelerator.autocast():
        real = adversary.features(labels)
    # In one call, as each of them moves the spectral norms' vectors.
    both = heads([torch.cat([a, b.detach()]) for a, b in zip(real, fake, strict=True)])
    discriminator = discriminator_loss(*zip(*(part.chunk(2) for part in both), strict=True))
    accelerator.backward(discriminator)
    return {"loss": loss, "l1": output.loss, "gan": gan, "discriminator": discriminator}


@torch.no_grad()
def evaluate(accelerator, model, processor, pairs: Sequence[SlicePair], args) -> list[dict]:
    """
    PSNR, SSIM and NRMSE of every slice in [0, 1] at its own size, without padding, `labels` being the truth. Every
    process takes its share of the slices; all of them get all rows, `name`, `patient` and values.
    """
    model = accelerator.unwrap_model(model)
    training = model.training
    model.eval()
    dataset = SlicePairs(pairs, processor)
    batches = batches_of_one_size(pairs, args.per_device_eval_batch_size)
    own = batches[accelerator.process_index :: accelerator.num_processes]
    loader = DataLoader(
        dataset, batch_sampler=own, collate_fn=dataset.collate, num_workers=args.dataloader_num_workers
    )
    rows = []
    for indices, batch in zip(
        tqdm(own, desc="Evaluating", leave=False, disable=not accelerator.is_main_process), loader, strict=True
    ):
        reconstruction = model(batch["pixel_values"].to(accelerator.device)).reconstruction.float().cpu()
        for index, made, truth, (height, width) in zip(
            indices, reconstruction[:, 0], batch["labels"][:, 0], batch["original_sizes"].tolist(), strict=True
        ):
            values = slice_metrics(made[:height, :width], truth[:height, :width])
            rows.append({"name": pairs[index].name, "patient": pairs[index].patient, **values})
    model.train(training)
    return sorted(gather_object(rows), key=lambda row: (row["patient"], row["name"]))


def get_means(rows: list[dict]) -> dict[str, float]:
    """Of the slices that have a value."""
    values = {name: [row[name] for row in rows if not math.isnan(row[name])] for name in TRANSLATION_METRICS}
    return {name: fmean(found) if found else math.nan for name, found in values.items()}


def finish(accelerator, model, processor, pairs: dict[str, list[SlicePair]], args, state: TrainerState) -> None:
    """Makes the output folder the best model's, or without validation the last one's, with its metrics."""
    output_dir = Path(args.output_dir)
    model = accelerator.unwrap_model(model)
    if pairs["validation"]:
        model = type(model).from_pretrained(find_best(accelerator, output_dir, state))
    if accelerator.is_main_process:
        model.save_pretrained(output_dir)
        processor.save_pretrained(output_dir)
    accelerator.wait_for_everyone()
    # As everyone else loads it: while it was trained, it computed in what --mixed_precision says.
    model = type(model).from_pretrained(output_dir).to(accelerator.device)
    names = [args.model_name_or_path, None if args.no_gan else args.clip_name_or_path]
    report = {
        "arguments": vars(args),
        "on_hub": [name for name in names if name is not None and is_hub_name(name)],
        "patients": {split: sorted({pair.patient for pair in part}) for split, part in pairs.items()},
        "num_slices": {split: len(part) for split, part in pairs.items()},
        "parameters": sum(p.numel() for p in model.parameters()),
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "seconds": round(state.seconds, 1),
        "machine": describe_machine(),
        "num_processes": accelerator.num_processes,
        "best_epoch": state.best_epoch,
        "history": state.history,
    }
    for split in ("validation", "test") if args.do_test else ("validation",):
        if pairs[split]:
            rows = evaluate(accelerator, model, processor, pairs[split], args)
            report[split], report[f"{split}_slices"] = get_means(rows), rows
            intervals = mean_metrics(rows, [row["patient"] for row in rows])
            report[f"{split}_intervals"] = {name: [one.low, one.high] for name, one in intervals.items()}
    if accelerator.is_main_process:
        report["weights"] = weights_hash(str(output_dir))
        write_report(output_dir, report, translation_card, score="psnr")
    accelerator.wait_for_everyone()


def get_pairs(args: argparse.Namespace, processor, progress: bool = False) -> dict[str, list[SlicePair]]:
    """The pairs of each split."""
    cache_dir = Path(args.cache_dir or Path(args.output_dir) / "volumes")
    pairs = find_pairs(Path(args.source), Path(args.target), processor, cache_dir, args.tissue_share, progress)
    patients = {pair.patient for pair in pairs}
    splits = split_patients(patients, args.validation_patients, args.test_patients, args.seed)
    return {split: [pair for pair in pairs if pair.patient in names] for split, names in splits.items()}


def get_model_and_processor(args: argparse.Namespace) -> tuple[PreTrainedModel, SamI2IImageProcessor]:
    """New, from a backbone's checkpoint, or from one of its own to train on."""
    path = args.model_name_or_path
    if path is not None:
        model_type = PreTrainedConfig.get_config_dict(path)[0].get("model_type")
        found = find_translator(model_type)
        if found == args.model:
            return load_to_train_on(args)
        if found or args.model == "unet":
            raise ValueError(
                f"Expected a checkpoint of --model {args.model} in {path}, got {found or model_type}: name another, "
                "or leave --model_name_or_path out."
            )
    model: SamI2IModel | TranslationUNet
    if path is not None:
        model = SamI2IModel.from_backbone_pretrained(path, **args.config)
    elif args.model == "unet":
        model = TranslationUNet(TranslationUNetConfig(**args.config))
    else:
        model = SamI2IModel(SamI2IConfig(**args.config))
    return model, SamI2IImageProcessor(size_divisor=model.config.size_divisor)


def load_to_train_on(args: argparse.Namespace) -> tuple[PreTrainedModel, SamI2IImageProcessor]:
    path = args.model_name_or_path
    model = TRANSLATORS[args.model].from_pretrained(path)
    if changed := [key for key, value in args.config.items() if getattr(model.config, key) != value]:
        raise ValueError(
            f"Expected the configuration of {path}, got another {', '.join(changed)}: it is a checkpoint to train on "
            "and keeps its own; start from a backbone to change it."
        )
    return model, SamI2IImageProcessor.from_pretrained(path)


def get_dataloaders(args: argparse.Namespace, pairs: Sequence[SlicePair], processor) -> DataLoader:
    """The batches of the training slices; `evaluate` makes its own."""
    dataset = SlicePairs(pairs, processor)
    return DataLoader(
        dataset,
        batch_size=args.per_device_train_batch_size,
        # An incomplete last batch would be filled up with slices of the first one if there are several processes.
        drop_last=len(dataset) >= args.per_device_train_batch_size * PartialState().num_processes,
        sampler=EpochSampler(dataset, args.seed),
        collate_fn=dataset.collate,
        num_workers=args.dataloader_num_workers,
        persistent_workers=args.dataloader_num_workers > 0,
        pin_memory=torch.cuda.is_available(),
    )


def get_adversary(accelerator: Accelerator, args: argparse.Namespace) -> Adversary:
    features = ClipFeatures.from_pretrained(args.clip_name_or_path).to(accelerator.device)
    heads = DiscriminatorHeads(features.clip.config)
    return Adversary(features, make_player(accelerator, heads, args.discriminator_learning_rate, args))


def make_player(accelerator: Accelerator, model: nn.Module, learning_rate: float, args: argparse.Namespace) -> Player:
    """Without weight decay, AdamW is the paper's Adam."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, learning_rate, weight_decay=args.weight_decay)
    model, optimizer = accelerator.prepare(model, optimizer)
    scheduler = get_scheduler(args.lr_scheduler_type, optimizer, args.num_warmup_steps, args.max_train_steps)
    return Player(model, optimizer, accelerator.prepare(scheduler))


if __name__ == "__main__":
    command()

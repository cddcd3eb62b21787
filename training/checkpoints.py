"""Folders that a training run saves to and resumes from: complete or not there, whenever the run is stopped."""

import json
import shutil
from argparse import Namespace
from dataclasses import asdict, dataclass, field
from pathlib import Path

from accelerate import Accelerator
from transformers.utils import logging

from imedsam.training.report import write_json

logger = logging.get_logger(__name__)

KEPT_CHECKPOINTS = 2
STATE_FILE = "trainer_state.json"
# Arguments that may differ when a run is resumed without changing its result.
FREE_ARGUMENTS = {
    "output_dir",
    "resume_from_checkpoint",
    "dataloader_num_workers",
    "checkpointing_steps",
    "with_tracking",
    "report_to",
    "do_test",
    "per_device_eval_batch_size",
    "cache_dir",
}
# Arguments that say what a checkpoint holds.
FIXED_ARGUMENTS = {"ema_decay": "average its weights", "no_gan": "do without an adversary"}


@dataclass
class TrainerState:
    """
    Where a run is; saved with every checkpoint.

    Args:
        epoch: the current one, from 0.
        batch: batches of it that are done, per process.
        global_step: optimisation steps done.
        loss_sum: over the done batches of the epoch.
        sums: of the loss's parts, over the same.
        best_score: mean on validation of the best epoch, Dice or PSNR.
        history: a row per finished epoch.
        seconds: of training so far.
    """

    epoch: int = 0
    batch: int = 0
    global_step: int = 0
    loss_sum: float = 0.0
    sums: dict[str, float] = field(default_factory=dict)
    best_score: float = -1.0
    best_epoch: int = -1
    history: list[dict] = field(default_factory=list)
    seconds: float = 0.0


def save_model(accelerator: Accelerator, model, processor, folder: Path) -> None:
    if accelerator.is_main_process:
        temporary = new_temporary_folder(folder)
        accelerator.unwrap_model(model).save_pretrained(temporary)
        processor.save_pretrained(temporary)
        replace_folder(temporary, folder)
    accelerator.wait_for_everyone()


def save_checkpoint(accelerator: Accelerator, args: Namespace, state: TrainerState) -> None:
    """Everything that a resumed run needs, in `output_dir/step_N`; the two newest are kept."""
    folder = Path(args.output_dir) / f"step_{state.global_step}"
    temporary = folder.with_name(folder.name + ".tmp")
    if accelerator.is_main_process:
        new_temporary_folder(folder)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(temporary))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_json(temporary / STATE_FILE, {**asdict(state), "arguments": _arguments(accelerator, args)})
        replace_folder(temporary, folder)
        checkpoints = find_checkpoints(Path(args.output_dir))
        newest = checkpoints.index(folder)
        # Those after it are of an earlier run.
        for other in checkpoints[: max(0, newest + 1 - KEPT_CHECKPOINTS)] + checkpoints[newest + 1 :]:
            shutil.rmtree(other)
    accelerator.wait_for_everyone()


def resume(accelerator: Accelerator, args: Namespace) -> TrainerState:
    """The state of the checkpoint that `--resume_from_checkpoint` names, with all weights loaded; else a new one."""
    with accelerator.main_process_first():
        checkpoints = find_checkpoints(Path(args.output_dir))
    if args.resume_from_checkpoint is None:
        if checkpoints:
            logger.warning(
                f"Starting anew in {args.output_dir}, which holds {checkpoints[-1].name} of an earlier run and will "
                "lose it: to go on from there, stop and add --resume_from_checkpoint latest."
            )
        return _start_anew(accelerator, args)
    folder = Path(args.resume_from_checkpoint)
    if args.resume_from_checkpoint == "latest":
        if not checkpoints:
            logger.warning(f"Starting anew: there is no checkpoint in {args.output_dir}.")
            return _start_anew(accelerator, args)
        folder = checkpoints[-1]
    if not (folder / STATE_FILE).exists():
        raise FileNotFoundError(f"Expected a checkpoint with {STATE_FILE} in {folder}, got none.")
    saved = json.loads((folder / STATE_FILE).read_text())
    before, now = saved.pop("arguments"), json.loads(json.dumps(_arguments(accelerator, args)))
    changed = sorted(k for k in now if k not in FREE_ARGUMENTS and now[k] != before.get(k))
    for name, what in FIXED_ARGUMENTS.items():
        if bool(before.get(name)) != bool(now.get(name)):
            raise ValueError(
                f"Expected --{name} {before.get(name, 0.0)} as in {folder}, got {now.get(name)}: a run cannot begin "
                f"to {what}, or stop it, on the way."
            )
    if changed:
        changes = ", ".join(f"{key} {before.get(key)} -> {now[key]}" for key in changed)
        logger.warning(f"Resuming {folder} with other arguments, so not the run that it was: {changes}.")
    accelerator.load_state(str(folder))
    state = TrainerState(**saved)
    if accelerator.is_main_process and state.best_epoch >= 0:
        take_best(folder.absolute().parent / "best", Path(args.output_dir).absolute() / "best")
    accelerator.wait_for_everyone()
    return state


def take_best(source: Path, target: Path) -> None:
    """The best model so far belongs to a run's state: a run that goes on in another folder takes a copy along."""
    recover_folder(source)
    if not source.is_dir():
        raise FileNotFoundError(
            f"Expected the best model so far in {source}, got none: put it back beside its checkpoint, or train anew "
            "without --resume_from_checkpoint."
        )
    if source.resolve() != target.resolve():
        temporary = new_temporary_folder(target)
        shutil.copytree(source, temporary, dirs_exist_ok=True)
        replace_folder(temporary, target)


def find_best(accelerator: Accelerator, output_dir: Path, state: TrainerState) -> Path:
    """The folder of the best model, at the end of a run."""
    best = output_dir / "best"
    with accelerator.main_process_first():
        recover_folder(best)
    if not best.is_dir():
        raise FileNotFoundError(
            f"Expected the best model in {best}, got none (best epoch {state.best_epoch}): put it back, or train anew "
            "without --resume_from_checkpoint."
        )
    return best


def find_checkpoints(output_dir: Path) -> list[Path]:
    """The complete checkpoints, oldest first."""
    for stale in output_dir.glob("step_*.old"):
        recover_folder(stale.with_suffix(""))
    folders = [p for p in output_dir.glob("step_*") if p.suffix == "" and (p / STATE_FILE).exists()]
    return sorted(folders, key=lambda p: int(p.name.removeprefix("step_")))


def new_temporary_folder(folder: Path) -> Path:
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    return temporary


def replace_folder(temporary: Path, folder: Path) -> None:
    """Puts a complete folder in another's place; at every moment one of the two is there (see `recover_folder`)."""
    old = folder.with_name(folder.name + ".old")
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.replace(old)
    temporary.replace(folder)
    shutil.rmtree(old, ignore_errors=True)


def recover_folder(folder: Path) -> None:
    """Undoes a replacement that was stopped half-way."""
    old = folder.with_name(folder.name + ".old")
    if old.exists() and not folder.exists():
        old.replace(folder)


def _start_anew(accelerator, args):
    if accelerator.is_main_process:
        for name in ("best", "best.old"):
            shutil.rmtree(Path(args.output_dir) / name, ignore_errors=True)
    accelerator.wait_for_everyone()
    return TrainerState()


def _arguments(accelerator, args):
    return {**vars(args), "num_processes": accelerator.num_processes}

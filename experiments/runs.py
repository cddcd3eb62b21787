"""Runs, what they are scored on, and the tables that are made of them. A run is what its flags say: see `Run.name`."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

from transformers.configuration_utils import PreTrainedConfig

from imedsam.configuration.configuration_imedsam import IMedSamConfig
from imedsam.training.arguments import parse_args
from imedsam.training.baselines import METHODS

# Of every run: equally many steps, so that rows of a table cost the same, with the flags that were chosen on the
# validation split of Kvasir-Sessile (docs/results.md).
RECIPE = (
    "--image_size 384 --max_train_steps 1000 --per_device_train_batch_size 2 --num_points 2500 --uniform_share 0.3 "
    "--point_weighting none --box_jitter 0.01 --copy_paste 0.3 --learning_rate 1e-3 --adapter_learning_rate 1e-3 "
    "--encoder_learning_rate 2e-4 --weight_decay 0.1 --ema_decay 0.997 --evaluation_size 128 "
    "--eval_every 3 --augmentation light"
)
# The paper's fields, which every run has unless its flags say otherwise, and what the model has by default.
PAPER, WITH_PRIOR = "ellipse_prior=false", "--config ellipse_prior=true"
# Convolutions before the fields, which are so much smaller that the model has as many parameters as without.
WITH_PIXEL_DECODER = (
    f"{WITH_PRIOR} pixel_decoder_width=192 coarse_widths=[256,128] coarse_features=128 fine_widths=[128,128]"
)
# What a start point needs beside its folder: the medical one's encoder is frozen but for its adapters.
STARTS = {
    "medical": ("medical-tiny-sam-384", f"--config lora_rank=16 lora_alpha=16 train_mask_decoder=true {PAPER}"),
    "imagenet": (
        "deit-tiny-sam-384",
        "--augmentation strong --num_warmup_steps 50 "
        f"--config lora_rank=0 train_image_encoder=true train_mask_decoder=true {PAPER}",
    ),
}
# Methods that have no SAM.
WITHOUT_SAM = ("unet", "unet_without_prompt")
# What counts in epochs is to happen after as many steps as on Kvasir-Sessile's 117 training images.
DATASETS = {
    "kvasir_sessile": "",
    "busi": "--eval_every 1 --coarse_ramp_epochs 1.5",
    "acdc": "--eval_every 1 --coarse_ramp_epochs 2",
    "phantoms:ultrasound": "--num_train_images 120 --num_eval_images 40 --phantom_size 384",
}
# Of phantoms when scored: they are drawn at any size.
PHANTOM_SIZE, NUM_PHANTOMS = 896, 60
MACHINE_DEPENDENT = ("model_name_or_path", "dataset_name", "output_dir", "resume_from_checkpoint")
# To parse flags where it does not matter on which machine.
PLACES = ("--model_name_or_path", "", "--dataset_name", "", "--output_dir", "")
# Follow from `--max_train_steps` and the number of images.
DERIVED = ("num_train_epochs",)


@dataclass(frozen=True)
class Run:
    """
    A training. Runs of the same name are the same one.

    Args:
        data: a folder of $IMEDSAM_DATA/data, or "phantoms:KIND".
        fold: train on four of the five folds and validate on this one; None for the data set's own splits.
        flags: of the training script, beyond those of the recipe, the start and the data set.
    """

    method: str = "imedsam"
    data: str = "kvasir_sessile"
    fold: int | None = None
    start: str = "medical"
    seed: int = 0
    flags: str = ""

    @property
    def name(self) -> str:
        """Says where the run differs from the recipe; what is written out but equal to a default does not count."""
        return _name(self)

    @property
    def first_stage(self) -> "Run | None":
        """The run whose model this one trains on; None for a start point."""
        stage = "--train_corrector"
        return replace(self, flags=self.flags.replace(stage, "").strip()) if stage in self.flags else None

    def arguments(self, extra: Sequence[str] = ()) -> list[str]:
        """The flags of the training script but for folders and files; `extra` ones come last, and so prevail."""
        flags = [*RECIPE.split(), *self._start_flags(), *DATASETS[self.data].split(), *self.flags.split(), *extra]
        method = [] if self.method == "imedsam" else ["--model", self.method]
        return [*method, *flags, "--seed", str(self.seed), "--resume_from_checkpoint", "latest"]

    def _start_flags(self) -> list[str]:
        flags = STARTS[self.start][1]
        # The start's `--config` is of I-MedSAM, whose keys another model does not have.
        of_imedsam = issubclass(METHODS[self.method].model_class.config_class, IMedSamConfig)
        return (flags if of_imedsam else flags.partition("--config")[0]).split()


@cache
def _name(run: Run) -> str:
    asked_for, usual = (_parse(one) for one in (run, replace(run, flags="")))
    config, usual_config = (get_config(run.method, values.pop("config")) for values in (asked_for, usual))
    changes = {key: value for key, value in asked_for.items() if value != usual[key]}
    changes |= {key: value for key, value in config.items() if value != usual_config[key]}
    fold = [] if run.fold is None else [f"fold{run.fold}"]
    written = [f"{key}={'x'.join(map(str, v)) if isinstance(v, list) else v}" for key, v in sorted(changes.items())]
    return "-".join([run.data.replace(":", "_"), *fold, run.start, run.method, *written, f"seed{run.seed}"])


def _parse(run: Run) -> dict[str, Any]:
    return vars(parse_args([*PLACES, *run.arguments()]))


def get_config(method: str, values: dict[str, Any]) -> dict[str, Any]:
    """Every value of the method's own configuration, given or not, but for the SAM's."""
    config = METHODS[method].model_class.config_class(**METHODS[method].get_values(values))
    inherited = {field.name for field in fields(PreTrainedConfig)}
    own = {field.name for field in fields(config)} - inherited - {"sam_config"}
    return {key: getattr(config, key) for key in own}


@dataclass(frozen=True)
class Scoring:
    """
    How a trained model is scored, and on what; the changes are made to the trained model.

    Args:
        data, split: on these images.
        box_jitter: as in training; 0 are the exact boxes.
        output_size: side of the masks compared; the images' own size by default.
        input_size: side of the model's square; the one that it was trained with by default.
        upsampled: render on the model's square, and interpolate those logits bilinearly at the output's pixels.
        within_box: leave out what lies outside of the prompt's box.
        config: values of the configuration, as ("key", value), such as of the selection and the uncertainty.
        mode: of rendering: "exact", or None for adaptive where that is possible.
        prompt: "box" or "click".
        noise: standard deviation of the Gaussian noise that is added to the images, as a share of their range.
        correct: how to correct the masks, by several "prompts" or by "dropout"; None not to.
    """

    data: str
    split: str
    box_jitter: float = 0.0
    output_size: int | None = None
    input_size: int | None = None
    upsampled: bool = False
    within_box: bool = False
    config: tuple[tuple[str, Any], ...] = ()
    mode: str | None = "exact"
    prompt: str = "box"
    noise: float = 0.0
    correct: str | None = None

    @property
    def name(self) -> str:
        changes = {key: value for key, value in asdict(self).items() if key not in ("data", "split", "config")}
        changes |= dict(self.config)
        usual = asdict(Scoring("", ""))
        parts = [f"{key}={value}" for key, value in changes.items() if key not in usual or value != usual[key]]
        return "-".join([self.data.replace(":", "_"), self.split, *parts])


@dataclass(frozen=True)
class Row:
    """
    A row of a table: runs that are repetitions of each other, seeds or folds, and how they are scored.

    Args:
        runs: none for a floor.
        changes: of the `Scoring`, such as {"box_jitter": 0.1}.
        floor: "filled box" or "inscribed ellipse"; of the changes, the box's and the output's hold for it too.
        against: the label of the row to compare with, object by object; the table's reference by default.
        x: the number on the plot's axis, if the table has one, where `series` says which line it is on.
    """

    label: str
    runs: tuple[Run, ...] = ()
    changes: tuple[tuple[str, Any], ...] = ()
    floor: str | None = None
    against: str = ""
    x: float | None = None
    series: str = ""


@dataclass(frozen=True)
class Table:
    """
    Args:
        name: of its plots.
        scored_on: (data set, split) each; "test" only if that is asked for.
        reference: the label of the row that the others are compared with.
        columns: of metrics.
        compared: those of them that are compared with the reference's, and plotted.
        x: name of the plot's axis; without one it has a line per row.
        about: a sentence below the title.
    """

    name: str
    title: str
    rows: tuple[Row, ...]
    scored_on: tuple[tuple[str, str], ...]
    reference: str
    columns: tuple[str, ...] = ("dice", "iou", "hd", "hd95", "nsd")
    compared: tuple[str, ...] = ("dice",)
    x: str = ""
    about: str = ""

    def scorings(self, test: bool) -> dict[Run, list[Scoring]]:
        """What each run is scored on for this table."""
        wanted: dict[Run, list[Scoring]] = {}
        for row in self.rows:
            for run in row.runs:
                wanted.setdefault(run, []).extend(self.scoring(row, *part) for part in self.parts(test))
        return wanted

    def parts(self, test: bool) -> list[tuple[str, str]]:
        return [part for part in self.scored_on if test or part[1] != "test"]

    def scoring(self, row: Row, data: str, split: str) -> Scoring:
        return Scoring(data, split, **dict(row.changes))


def changes(**values: Any) -> tuple[tuple[str, Any], ...]:
    """For a row: changes(box_jitter=0.1), changes(config={"selection": "top_k"})."""
    return tuple((key, tuple(value.items()) if key == "config" else value) for key, value in values.items())


def seeds(run: Run, *numbers: int) -> tuple[Run, ...]:
    return tuple(replace(run, seed=number) for number in numbers)


def folds(run: Run, number: int = 5) -> tuple[Run, ...]:
    return tuple(replace(run, fold=fold) for fold in range(number))


FLOORS = (Row("filled box", floor="filled box"), Row("inscribed ellipse", floor="inscribed ellipse"))


def start_folder(root: Path, start: str) -> str:
    return str(root / "checkpoints" / STARTS[start][0])

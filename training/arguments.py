"""The flags of the training script."""

import argparse
import json
import math

from huggingface_hub.errors import StrictDataclassError
from transformers import SchedulerType

from imedsam.processing.image_processing_imedsam import RESIZE_MODES
from imedsam.training.augmentation import STRENGTHS
from imedsam.training.baselines import METHODS
from imedsam.training.data import PROMPTS


def parse_args(argv: list[str] | None = None, description: str | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--model_name_or_path", required=True, help="SAM checkpoint to start from, or I-MedSAM checkpoint to train on."
    )
    add(
        "--model",
        "--method",
        dest="method",
        choices=METHODS,
        default="imedsam",
        help="I-MedSAM, or a baseline: see imedsam.training.baselines.",
    )
    add(
        "--dataset_name",
        required=True,
        help='"phantoms" or "phantoms:KIND", a folder with images/ and masks/, or a `datasets` name.',
    )
    add("--labels", help='JSON file {"0": "background", "1": ...} for label maps that come without one.')
    add(
        "--num_train_images",
        type=positive_int,
        help="Train on the first so many images, all of them by default; how many phantoms to draw, 20 by default.",
    )
    add("--num_eval_images", type=positive_int, help="The same for validation and test.")
    add("--num_classes", type=int, choices=(1, 2), default=1, help="Of phantoms: 1 or 2.")
    add("--phantom_size", type=positive_int, default=256, help="Side of phantoms in pixels.")
    add("--image_size", type=positive_int, help="Side of the model's square; 384 by default, 256 of SF-RecSAM.")
    add("--resize_mode", choices=RESIZE_MODES, help='"stretch" by default.')
    add(
        "--window",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="Intensities of the images that become 0 and 1, for those that are not of 8 or 16 bits without sign.",
    )
    add(
        "--prompt",
        choices=PROMPTS,
        default="box",
        help="A box per object, or a click, drawn from its pixels to train and in its middle to evaluate.",
    )
    add("--num_points", type=positive_int, default=4096, help="Supervised points per prompt.")
    add(
        "--num_candidates",
        type=positive_int,
        help="Draw so many points per prompt, and supervise --num_points of them, chosen by their uncertainty.",
    )
    add(
        "--uniform_share",
        type=share,
        default=0.5,
        help="Share of them from the whole image; the others are from around the box.",
    )
    add("--boundary_share", type=share, default=0.0, help="Share of them from near the object's boundary.")
    add("--point_weighting", choices=("importance", "none"), default="importance")
    add("--supervision", choices=("points", "dense"), default="points")
    add(
        "--spectral_weight",
        type=not_negative,
        default=0.0,
        help="Of the correlation of the masks' amplitude spectra in the loss, such as 0.5; with --supervision dense.",
    )
    add(
        "--uncertainty_weight",
        type=not_negative,
        default=0.0,
        help="Of the loss in which the entropy of the prediction is to say where it errs.",
    )
    add(
        "--train_corrector",
        action="store_true",
        help="Second stage: add the learned corrector to an SF-RecSAM checkpoint, and train that alone.",
    )
    add("--label_size", type=positive_int, help="Side of the dense labels; the model's square by default.")
    add(
        "--box_jitter",
        type=less_than_half,
        default=0.1,
        help="Largest move of a box's side, as a share of the box; not with --prompt click.",
    )
    add("--augmentation", choices=STRENGTHS, default="strong")
    add("--copy_paste", type=share, default=0.0, help="Share of the images that get another image's objects too.")
    add(
        "--learning_rate",
        type=not_negative,
        default=1e-3,
        help="Of the fields, the frequency gates, and a baseline's head or U-Net.",
    )
    add(
        "--adapter_learning_rate",
        type=not_negative,
        default=5e-5,
        help="Of the adapters, prompt encoder and upscaling.",
    )
    add(
        "--encoder_learning_rate",
        type=not_negative,
        default=1e-4,
        help="Of image encoder and mask decoder, if trained.",
    )
    add(
        "--ema_decay",
        type=less_than_one,
        default=0.0,
        help="Validate and keep the weights' moving average over about 1 / (1 - EMA_DECAY) steps; 0 is none.",
    )
    add(
        "--coarse_ramp_epochs",
        type=not_negative,
        default=5,
        help="Epochs in which the coarse loss's weight falls to 0.1.",
    )
    add("--evaluation_size", type=positive_int, default=256, help="Side of the masks compared while training.")
    add_shared_flags(parser)
    args = parser.parse_args(argv)
    try:
        args.config = dict(parse_config(item) for item in args.config)
        if derived := {"id2label", "num_labels", "sam_config"} & set(args.config):
            raise ValueError(f"{min(derived)} follows from the data and the SAM checkpoint: leave it out.")
        if "image_size" in args.config:
            raise ValueError("image_size has a flag of its own, --image_size.")
        method = METHODS[args.method]
        if args.config.get("learned_corrector"):
            raise ValueError("learned_corrector comes in a second stage, by --train_corrector.")
        method.model_class.config_class(**method.get_values(args.config))
    except (TypeError, ValueError, StrictDataclassError) as error:
        parser.error(f"argument --config: {error}")
    if args.uniform_share + args.boundary_share > 1:
        parser.error(
            f"argument --boundary_share: Expected at most 1 - uniform_share = {1 - args.uniform_share:g}, got "
            f"{args.boundary_share:g}"
        )
    if args.spectral_weight and args.supervision == "points":
        parser.error("argument --spectral_weight: Expected --supervision dense, got points: they have no spectrum")
    if args.prompt == "click" and "unet" in args.method:
        parser.error("argument --prompt: Expected box for a U-Net, got click: it sees boxes alone")
    if args.num_candidates is not None and args.supervision == "dense":
        parser.error("argument --num_candidates: Expected --supervision points, got dense: it supervises every pixel")
    if args.num_candidates is not None and args.num_candidates < args.num_points:
        parser.error(
            f"argument --num_candidates: Expected at least --num_points = {args.num_points}, got {args.num_candidates}"
        )
    args.lr_scheduler_type = args.lr_scheduler_type.value
    return args


def add_shared_flags(parser: argparse.ArgumentParser) -> None:
    """What every training script takes; `parser.set_defaults` gives one its own defaults."""
    add = parser.add_argument
    add("--output_dir", required=True)
    add(
        "--config",
        nargs="*",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="Values of the model's configuration, as JSON.",
    )
    add("--per_device_train_batch_size", type=positive_int, default=4)
    add("--per_device_eval_batch_size", type=positive_int, default=4)
    add("--weight_decay", type=not_negative, default=0.01)
    add("--num_train_epochs", type=positive_int, default=100)
    add("--max_train_steps", type=positive_int, help="Takes precedence over the epochs.")
    add("--gradient_accumulation_steps", type=positive_int, default=1)
    add("--lr_scheduler_type", type=SchedulerType, choices=list(SchedulerType), default=SchedulerType.COSINE)
    add("--num_warmup_steps", type=non_negative_int, default=0)
    add("--max_grad_norm", type=positive, default=1.0)
    add("--mixed_precision", choices=("no", "fp16", "bf16"))
    add("--seed", type=non_negative_int, default=0)
    add("--dataloader_num_workers", type=non_negative_int, default=0)
    add("--eval_every", type=positive_int, default=1, help="Epochs between validations.")
    add("--do_test", action="store_true", help="Score the test split, once, at the end.")
    add("--checkpointing_steps", type=_int_or_epoch, default="epoch", help='Number of steps, or "epoch".')
    add("--resume_from_checkpoint", help='A folder step_N, or "latest" for the newest in --output_dir, if any.')
    add("--with_tracking", action="store_true")
    add("--report_to", default="all", help="Tracker, such as tensorboard.")


def parse_config(item: str) -> tuple[str, object]:
    """'lora_rank=8' -> ("lora_rank", 8); what is no JSON is a string."""
    key, equals, value = item.partition("=")
    if not equals:
        raise ValueError(f"Expected KEY=VALUE after --config, got {item!r}.")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


def positive_int(value: str) -> int:
    return _int_from(1, value)


def non_negative_int(value: str) -> int:
    return _int_from(0, value)


def positive(value: str) -> float:
    return _float_if(lambda number: number > 0, "above 0", value)


def not_negative(value: str) -> float:
    return _float_if(lambda number: number >= 0, "from 0 on", value)


def share(value: str) -> float:
    return _float_if(lambda number: 0 <= number <= 1, "in [0, 1]", value)


def less_than_one(value: str) -> float:
    return _float_if(lambda number: 0 <= number < 1, "in [0, 1)", value)


def less_than_half(value: str) -> float:
    return _float_if(lambda number: 0 <= number < 0.5, "in [0, 0.5)", value)


def _float_if(holds, range_, value):
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not (math.isfinite(number) and holds(number)):
        raise argparse.ArgumentTypeError(f"Expected a number {range_}, got {value!r}.")
    return number


def _int_from(least, value):
    if not value.isdecimal() or int(value) < least:
        raise argparse.ArgumentTypeError(f"Expected a whole number from {least} on, got {value!r}.")
    return int(value)


def _int_or_epoch(value):
    return value if value == "epoch" else positive_int(value)

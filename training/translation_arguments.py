"""The flags of SAM-I2I's training script."""

import argparse

from huggingface_hub.errors import StrictDataclassError
from transformers import SchedulerType

from imedsam.processing.volumes import TISSUE_SHARE
from imedsam.training.arguments import add_shared_flags, not_negative, parse_config, share
from imedsam.training.translators import TRANSLATOR_CONFIGS


def parse_args(argv: list[str] | None = None, description: str | None = None) -> argparse.Namespace:
    """The defaults are the paper's (section 3); where it is silent they change nothing: no decay, no clipping."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--model_name_or_path",
        help="SAM 2, SAM or AutoBackbone checkpoint to start from, or one of --model to train on. Without it all is "
        "new: the U-Net, or a backbone, which then has to be trained (--config train_backbone=true).",
    )
    add("--model", choices=TRANSLATOR_CONFIGS, default="sam_i2i", help="SAM-I2I, or MONAI's U-Net, a baseline.")
    add("--source", required=True, help="Folder of slices (PNG, TIFF) or volumes (.nii, .nii.gz), PATIENT_*.")
    add("--target", required=True, help="Folder of the other contrast, with files of the same names.")
    add(
        "--validation_patients",
        nargs="*",
        default=[],
        metavar="NAME",
        help="Patients, or a share of all to draw by the seed, by whom the best weights are chosen. None by default: "
        "the last weights are kept.",
    )
    add(
        "--test_patients",
        nargs="*",
        default=["0.2"],
        metavar="NAME",
        help="Patients that are neither trained nor validated on, or a share of all; 0.2 by default.",
    )
    add(
        "--tissue_share",
        type=share,
        default=TISSUE_SHARE,
        help="Slices of NIfTI volumes are taken where more than this share of the source is no background.",
    )
    add("--cache_dir", help="Where NIfTI volumes are unpacked; OUTPUT_DIR/volumes by default. Runs can share one.")
    add("--l1_weight", type=not_negative, default=50.0)
    add("--gan_weight", type=not_negative, default=1.0)
    add("--no_gan", action="store_true", help="L1 alone, without a discriminator.")
    add(
        "--clip_name_or_path",
        default="openai/clip-vit-base-patch16",
        help="CLIP, of whose frozen image encoder the discriminator is made.",
    )
    add("--learning_rate", type=not_negative, default=2e-5)
    add("--discriminator_learning_rate", type=not_negative, default=2e-5)
    add_shared_flags(parser)
    parser.set_defaults(
        per_device_train_batch_size=2,
        num_train_epochs=20,
        lr_scheduler_type=SchedulerType.CONSTANT,
        weight_decay=0.0,
        max_grad_norm=None,
    )
    args = parser.parse_args(argv)
    args.validation_patients = parse_patients(args.validation_patients)
    args.test_patients = parse_patients(args.test_patients)
    args.lr_scheduler_type = args.lr_scheduler_type.value
    try:
        args.config = dict(parse_config(item) for item in args.config)
        if args.model_name_or_path is not None and "backbone_config" in args.config:
            raise ValueError("backbone_config is the checkpoint's: leave it out, or leave --model_name_or_path out.")
        TRANSLATOR_CONFIGS[args.model](**args.config)
    except (TypeError, ValueError, StrictDataclassError) as error:
        parser.error(f"argument --config: {error}")
    if args.model == "sam_i2i" and args.model_name_or_path is None and not args.config.get("train_backbone"):
        parser.error(
            "argument --model_name_or_path: Expected a checkpoint for a backbone that is not trained, got none: name "
            "one, or add --config train_backbone=true to start from nothing"
        )
    return args


def parse_patients(values: list[str]) -> list[str] | float:
    """["0.2"] -> 0.2, a share; else names."""
    try:
        number = float(values[0]) if len(values) == 1 else 0.0
    except ValueError:
        return values
    return number if 0 < number < 1 else values

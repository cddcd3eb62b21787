"""
The demonstration: a small I-MedSAM, trained from nothing on drawn phantoms in a few minutes on two cores.

    python -m imedsam.training.demo --output_dir outputs/demo
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from transformers import set_seed

from imedsam.configuration.configuration_imedsam import IMedSamConfig
from imedsam.modeling_imedsam import IMedSamModel
from imedsam.pipeline import IMedSamPipeline
from imedsam.processing.image_processing_imedsam import IMedSamImageProcessor
from imedsam.processing.processing_imedsam import IMedSamProcessor
from imedsam.training.evaluation import evaluate_masks, floor_metrics
from imedsam.training.examples import Examples, load_examples
from imedsam.training.metrics import MetricTable, box_from_mask, otsu_in_box, segmentation_metrics
from imedsam.training.model_card import markdown_table
from imedsam.training.pictures import overlay, save_sheet, uncertainty_picture
from imedsam.training.report import write_json
from imedsam.training.train import main as train

SEED = 0
DATASET = "phantoms:ultrasound"  # one modality, as in a user's own data
IMAGE_SIZE, PATCH_SIZE = 128, 8  # of the model and of the phantoms
NUM_TRAIN_IMAGES, NUM_VALIDATION_IMAGES, NUM_TEST_IMAGES = 1250, 20, 60
TRAINING = (
    "--num_train_epochs 4 --per_device_train_batch_size 4 --num_warmup_steps 50 --augmentation none "
    "--learning_rate 1.5e-3 --adapter_learning_rate 1.5e-3 --encoder_learning_rate 7e-4 --coarse_ramp_epochs 2 "
    "--num_points 1024 --uniform_share 0.3 --point_weighting none --box_jitter 0.05 "
    "--evaluation_size 128 --eval_every 2"
)
INITIALIZER_RANGE = 0.08  # about the inverse root of the width, where SAM's 0.02 is made for wider layers
EXAMPLE, EXAMPLE_BOX = 2, (24, 4, 86, 67)  # a test image that is kept as example.png, and its lesion's box


def main(output_dir: Path) -> None:
    """Trains, scores phantoms that the model has not seen beside three floors, and draws some of them."""
    started = time.monotonic()
    begin = output_dir / "start"
    set_seed(SEED)
    IMedSamModel(demo_config()).save_pretrained(begin)
    IMedSamProcessor(IMedSamImageProcessor(size=IMAGE_SIZE)).save_pretrained(begin)
    train(
        f"--model_name_or_path {begin} --output_dir {output_dir} --dataset_name {DATASET} --seed {SEED} "
        f"--phantom_size {IMAGE_SIZE} --num_train_images {NUM_TRAIN_IMAGES} "
        f"--num_eval_images {NUM_VALIDATION_IMAGES} {TRAINING}".split()
    )

    pipeline = IMedSamPipeline.from_pretrained(output_dir)
    test = load_examples(DATASET, "test", seed=SEED, num_images=NUM_TEST_IMAGES, image_size=IMAGE_SIZE)
    tables = {"this model": evaluate_masks(pipeline.model, pipeline.processor, test)}
    tables |= {**floor_metrics(test), "Otsu in the box": otsu_metrics(test)}
    minutes = (time.monotonic() - started) / 60
    means = {name: table.mean() for name, table in tables.items()}
    write_json(output_dir / "demo.json", means | {"minutes": minutes})
    table = markdown_table(means)
    (output_dir / "table.md").write_text(table)
    draw(pipeline, test, output_dir / "demo.png")
    test[EXAMPLE]["image"].convert("RGB").save(output_dir / "example.png")
    print(f"\n{NUM_TEST_IMAGES} unseen phantoms, prompted with their boxes:\n\n{table}\nIn {minutes:.1f} minutes.")


def demo_config() -> IMedSamConfig:
    """A SAM small enough to be trained whole, with the frequency branch and narrow fields; nothing is frozen."""
    width = 128
    sam_config = {
        "vision_config": {
            "hidden_size": width,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "mlp_dim": 3 * width,
            "output_channels": width,
            "num_pos_feats": width // 2,
            "image_size": IMAGE_SIZE,
            "patch_size": PATCH_SIZE,
            "window_size": 0,
            "use_rel_pos": False,
            "initializer_range": INITIALIZER_RANGE,
            "scale": 1.0,
        },
        "prompt_encoder_config": {"hidden_size": width, "image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE},
        "mask_decoder_config": {"hidden_size": width, "mlp_dim": 256, "num_attention_heads": 4},
    }
    return IMedSamConfig(
        sam_config=sam_config,
        lora_rank=0,
        train_image_encoder=True,
        train_mask_decoder=True,
        coarse_widths=[256, 128],
        coarse_features=64,
        fine_widths=[128],
        fine_head_width=64,
        dropout=0.1,
        coordinate_octaves=4,
        initializer_range=INITIALIZER_RANGE,
    )


def otsu_metrics(examples: Examples) -> MetricTable:
    """The metrics of Otsu's threshold inside the exact box."""
    table = MetricTable()
    for example in examples:
        mask = example["mask"] > 0
        table.add(
            example["name"], segmentation_metrics(otsu_in_box(np.asarray(example["image"]), box_from_mask(mask)), mask)
        )
    return table


def draw(pipeline: IMedSamPipeline, examples: Examples, path: Path, indices: Sequence[int] = range(6)) -> None:
    """A sheet with image and box, true mask, prediction and uncertainty (each white at its largest) of examples."""
    rows, names = [], []
    for index in indices:
        example = examples[index]
        mask, image = example["mask"] > 0, example["image"]
        box = box_from_mask(mask)
        segmentation = pipeline(image, input_boxes=[list(box)])
        prediction, uncertainty = segmentation.masks[0, :1], segmentation.uncertainty[0, 0]
        dice = segmentation_metrics(prediction[0], mask)["dice"]
        rows.append(
            [
                overlay(image, mask[None] & False, [box]),
                overlay(image, mask[None]),
                overlay(image, prediction, [box]),
                uncertainty_picture(uncertainty, uncertainty.max()),
            ]
        )
        names.append(f"{example['name']}\nDice {100 * dice:.1f}")
    save_sheet(rows, ["image and box", "true mask", "prediction", "uncertainty"], path, names)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/demo"))
    main(parser.parse_args().output_dir)

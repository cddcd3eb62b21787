"""
The demonstration: a small I-MedSAM trained from nothing on drawn phantoms, in a few minutes on two cores.

    python -m imedsam.training.demo --output_dir outputs/demo
"""

import argparse
import time
from pathlib import Path

import torch
from transformers import set_seed

from imedsam.configuration.configuration_imedsam import IMedSamConfig
from imedsam.modeling_imedsam import IMedSamModel
from imedsam.pipeline import IMedSamPipeline
from imedsam.processing.image_processing_imedsam import IMedSamImageProcessor
from imedsam.processing.processing_imedsam import IMedSamProcessor
from imedsam.training.data import load_examples
from imedsam.training.evaluation import evaluate_masks, floor_metrics
from imedsam.training.metrics import MetricTable, box_from_mask, otsu_in_box, segmentation_metrics
from imedsam.training.pictures import overlay, save_sheet, uncertainty_picture
from imedsam.training.report import write_json
from imedsam.training.train import main as train

IMAGE_SIZE = 128
NUM_TRAIN_IMAGES, NUM_TEST_IMAGES = 600, 60
METRICS = {"dice": "Dice", "iou": "IoU", "hd": "HD (px)", "hd95": "HD95 (px)"}


def main(output_dir: Path) -> None:
    """Trains, scores unseen phantoms beside two floors, and draws some of them."""
    start = time.monotonic()
    set_seed(0)
    start_dir = output_dir / "start"
    IMedSamModel(demo_config()).save_pretrained(start_dir)
    IMedSamProcessor(IMedSamImageProcessor(size=IMAGE_SIZE)).save_pretrained(start_dir)
    train(
        ["--model_name_or_path", str(start_dir), "--dataset_name", "phantoms", "--output_dir", str(output_dir)]
        + ["--num_train_images", str(NUM_TRAIN_IMAGES), "--num_eval_images", "20"]
        + TRAINING_FLAGS
    )

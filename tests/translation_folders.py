"""Tiny CLIP and SAM 2 checkpoints, and folders of two contrasts."""

from pathlib import Path

import nibabel
import numpy as np
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig, Sam2Config, Sam2Model, Sam2VisionConfig
from transformers.models.sam2.configuration_sam2 import Sam2HieraDetConfig

CLIP = CLIPVisionConfig(
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=2,
    image_size=32,
    patch_size=16,
    intermediate_size=64,
    projection_dim=16,
)
HIERA = {
    "hidden_size": 8,
    "embed_dim_per_stage": [8, 16, 32, 64],
    "blocks_per_stage": [1, 1, 2, 1],
    "num_attention_heads_per_stage": [1, 1, 1, 1],
    "global_attention_blocks": [3],
}


def save_clip(folder: Path) -> Path:
    """A whole CLIP, with its text encoder, as OpenAI's are."""
    text = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "vocab_size": 9,
    }
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=CLIP.to_dict(), projection_dim=16)).save_pretrained(folder)
    return folder


def save_sam2(folder: Path) -> Path:
    torch.manual_seed(0)
    vision = Sam2VisionConfig(
        backbone_config=Sam2HieraDetConfig(**HIERA),
        backbone_channel_list=HIERA["embed_dim_per_stage"][::-1],
        backbone_feature_sizes=[[32, 32], [16, 16], [8, 8]],
    )
    Sam2Model(Sam2Config(vision_config=vision)).save_pretrained(folder)
    return folder


def draw_slice(seed: int, side: int = 32) -> np.ndarray:
    """A smooth blob on black, (side, side) uint8."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:side, :side] / side
    x, y = rng.uniform(0.35, 0.65, 2)
    return (240 * np.exp(-12 * ((columns - x) ** 2 + (rows - y) ** 2)) * rng.uniform(0.6, 1)).astype(np.uint8)


def write_pictures(folder: Path, patients: dict[str, int], side: int = 32) -> Path:
    """`source` and `target`, a number of slices of each patient; the target is the source's negative."""
    for name in ("source", "target"):
        (folder / name).mkdir(parents=True)
    for patient, count in patients.items():
        for index in range(count):
            grey = draw_slice(100 * len(patient) + ord(patient[-1]) + 7 * index, side)
            Image.fromarray(grey).save(folder / "source" / f"{patient}_{index}.png")
            Image.fromarray(np.where(grey > 20, 255 - grey, 0).astype(np.uint8)).save(
                folder / "target" / f"{patient}_{index}.png"
            )
    return folder


def write_volumes(folder: Path, slices: np.ndarray, name: str = "p1_scan.nii.gz", factor: float = 2.0) -> Path:
    """Slices (S, H, W) as radiologists see them, for both contrasts; the target is the source times a factor."""
    for contrast, scale in (("source", 1), ("target", factor)):
        (folder / contrast).mkdir(parents=True, exist_ok=True)
        canonical = (slices * scale)[:, ::-1, ::-1].transpose(2, 1, 0)
        nibabel.save(nibabel.Nifti1Image(canonical.astype(np.int16), np.eye(4)), folder / contrast / name)
    return folder

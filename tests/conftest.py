"""Tiny models on random weights, so that the tests take seconds."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import json

import pytest
import torch
from drawn_folders import disk, make_processor, write_folder
from transformers import SamConfig, SamModel

from imedsam.configuration.configuration_imedsam import IMedSamConfig
from imedsam.modeling_imedsam import IMedSamModel

torch.set_num_threads(1)


def sam_config(image_size=64, **vision):
    vision_config = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": image_size,
        "patch_size": 16,
        "mlp_dim": 64,
        "output_channels": 32,
        "num_pos_feats": 16,
        "window_size": 2,
        "global_attn_indexes": [1],
        "initializer_range": 0.02,
        "scale": 1.0,
    }
    return {
        "vision_config": {**vision_config, **vision},
        "prompt_encoder_config": {"hidden_size": 32, "image_size": image_size, "patch_size": 16},
        "mask_decoder_config": {"hidden_size": 32, "mlp_dim": 64, "num_attention_heads": 2, "iou_head_hidden_dim": 32},
        "initializer_range": 0.02,
    }


def move(parameters, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


@pytest.fixture(scope="session")
def tiny_config():
    """`tiny_config(image_size=64, **values)`: an `IMedSamConfig` for a SAM with 2 blocks of width 32."""

    def make(image_size=64, **values):
        small = {
            "sam_config": sam_config(image_size),
            "coarse_widths": [48, 24],
            "coarse_features": 8,
            "fine_widths": [24, 16],
            "fine_head_width": 8,
            "selection_lattice": 16,
        }
        return IMedSamConfig(**{**small, **values})

    return make


@pytest.fixture(scope="session")
def randomised():
    """`randomised(model, seed=0)`: the model, every trainable parameter moved away from where it starts."""

    def randomise(model, seed=0):
        move([p for p in model.parameters() if p.requires_grad], seed)
        return model

    return randomise


@pytest.fixture(scope="session")
def tiny_sam():
    """`tiny_sam(image_size=64, **vision)`: a stock SAM, every parameter random, positions included."""

    def make(image_size=64, **vision):
        torch.manual_seed(0)
        sam = SamModel(SamConfig(**sam_config(image_size, **vision))).eval()
        move(sam.parameters(), 0)
        return sam

    return make


@pytest.fixture(scope="session")
def sam_folder(tiny_sam, tmp_path_factory):
    """A folder with a tiny stock SAM for 64 x 64 pixels."""
    folder = tmp_path_factory.mktemp("sam")
    tiny_sam().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def from_sam(tiny_config, sam_folder, randomised):
    """`from_sam(image_size=64, seed=0, **values)`: a model on the tiny SAM, its trained parts as after a training."""

    def make(image_size=64, seed=0, **values):
        small = tiny_config(lora_rank=0).to_dict()
        widths = {key: small[key] for key in ("coarse_widths", "coarse_features", "fine_widths", "fine_head_width")}
        torch.manual_seed(0)
        model = IMedSamModel.from_sam_pretrained(sam_folder, image_size, selection_lattice=16, **widths, **values)
        return randomised(model, seed)

    return make


@pytest.fixture
def inputs():
    """Two images with two boxes each, for 64 x 64 pixels."""
    generator = torch.Generator().manual_seed(1)
    return {
        "pixel_values": torch.randn(2, 3, 64, 64, generator=generator),
        "input_boxes": torch.tensor(
            [[[8.0, 12.0, 40.0, 50.0], [20.0, 4.0, 60.0, 30.0]], [[0.0, 0.0, 64.0, 64.0], [30.0, 33.0, 50.0, 41.0]]]
        ),
    }


@pytest.fixture(params=["stretch", "longest_side"])
def processor(request):
    return make_processor(request.param)


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "data", [disk(40, 60, 12 + 4 * i, 20, 8 + i) for i in range(5)])


@pytest.fixture
def label_folder(tmp_path):
    masks = [disk(40, 60, 15, 20, 9), disk(40, 60, 15, 20, 9) + disk(40, 60, 45, 20, 6, value=2)]
    folder = write_folder(tmp_path / "labels", [*masks, *masks], scale=1)
    (folder / "labels.json").write_text(json.dumps({"0": "background", "1": "organ", "2": "lesion"}))
    (folder / "splits.json").write_text(json.dumps({"train": ["a", "b", "c"], "val": ["d"]}))
    return folder

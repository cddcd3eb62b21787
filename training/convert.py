"""Checkpoints of the SAM family, and encoders that were trained here, as stock `SamModel` folders."""

import os
from pathlib import Path

from transformers import SamModel

from imedsam.configuration.configuration_imedsam import IMedSamConfig
from imedsam.sam_checkpoints import WEIGHTS, load_sam, read_config
from imedsam.training.baselines import load_model
from imedsam.training.report import new_folder


def convert_to_folder(
    model: str, output: Path, *, base_model: str | None = None, revision: str | None = None
) -> SamModel:
    """
    Writes a folder that `SamModel.from_pretrained` loads, without a processor: transformers' `SamProcessor` prepares
    images for SAM's own weights alone.

    Args:
        model: an original file of SAM, MedSAM or SAM-Med2D; a `SamModel`; or an I-MedSAM without a frequency branch,
            whose LoRA is merged (see `IMedSamModel.to_sam`).
        output: a new folder.
        base_model: the SAM of an adapter, if it is not where the adapter says.
        revision: branch, tag or commit of the model on the Hub.
    """
    with new_folder(output) as folder:
        sam = to_sam(model, base_model, revision)
        sam.save_pretrained(folder)
    return sam


def to_sam(model: str, base_model: str | None, revision: str | None) -> SamModel:
    if os.path.isdir(model) or not (os.path.isfile(model) or model.endswith(WEIGHTS)):
        model_type = read_config(model, revision=revision).get("model_type")
        if model_type == IMedSamConfig.model_type:
            return load_model(model, base_model_name_or_path=base_model, revision=revision).to_sam()
    return load_sam(model, revision=revision).to_model()

"""
What I-MedSAM is compared with, and a variant of it: models that are trained and evaluated by the same code, with the
same data, prompts, schedule, augmentation and seeds.

| `--model` | mask comes from | starts from | knows the box by |
|---|---|---|---|
| `imedsam` | the implicit decoder | SAM | SAM's prompt encoder, the prompt's frame, the ellipse in it |
| `imedsam_box_mask` | the same | SAM | the same, and the box rasterised as SAM's mask prompt |
| `sam_decoder` | SAM's own mask decoder, fine-tuned as in MedSAM | SAM | SAM's prompt encoder |
| `sam_decoder_box_mask` | the same | SAM | the same, and the box rasterised as SAM's mask prompt |
| `sf_recsam` | SAM's own mask decoder, frozen | SAM, its encoder fused with convolutions | SAM's prompt encoder |
| `convolutional` | convolutions of as many parameters | SAM | as `imedsam` |
| `unet` | MONAI's U-Net | nothing | a fourth channel |
| `unet_without_prompt` | MONAI's U-Net | nothing | - |

All but the first two give logits on a grid (SAM's decoder at stride 4, the others at the size of `pixel_values`),
which is interpolated bilinearly at the points to supervise and the pixels to render. To its callers every model here
is an [`IMedSamModel`]; `load_model` loads the folder of any of them.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

from imedsam.modeling_imedsam import IMedSamModel
from imedsam.modeling_sf_recsam import SFRecSamModel
from imedsam.pipeline import IMedSamPipeline
from imedsam.sam_checkpoints import only_finding, read_config
from imedsam.training.box_mask import BoxMaskModel
from imedsam.training.convolutional import ConvolutionalModel
from imedsam.training.unet import UNetModel


def load_model(pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> IMedSamModel:
    """
    Loads I-MedSAM or a baseline, whichever the checkpoint's configuration says.

    Args:
        pretrained_model_name_or_path: Hub name or folder, such as the output folder of a training.
        kwargs: of `IMedSamModel.from_pretrained`.

    Raises:
        ValueError: a checkpoint of another kind, or whose configuration has unknown keys or values of a wrong type.
    """
    model_class = check_model_class(pretrained_model_name_or_path, **only_finding(kwargs))
    return model_class.from_pretrained(pretrained_model_name_or_path, **kwargs)


def load_pipeline(
    pretrained_model_name_or_path: str | os.PathLike, device: str | torch.device = "cpu", **kwargs: Any
) -> IMedSamPipeline:
    """`IMedSamPipeline.from_pretrained` for I-MedSAM or a baseline, with the errors of `load_model`."""
    model_class = check_model_class(pretrained_model_name_or_path, **only_finding(kwargs))
    return IMedSamPipeline.from_pretrained(pretrained_model_name_or_path, device, model_class, **kwargs)


def check_model_class(path: str | os.PathLike, **finding: Any) -> type[IMedSamModel]:
    """`find_model_class`, of a checkpoint whose configuration can be read."""
    model_class = find_model_class(path, **finding)
    if model_class is None:
        return IMedSamModel  # which says what is wrong with it
    try:
        model_class.config_class.from_pretrained(path, **finding)
    except (TypeError, StrictDataclassError) as error:  # of a newer version, or changed by hand
        raise ValueError(f"Expected a configuration of this version in {path}/config.json, got: {error}") from error
    return model_class


def find_model_class(pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> type[IMedSamModel] | None:
    """The class of a checkpoint's model; None if it is not one of ours, such as a SAM."""
    model_type = read_config(str(pretrained_model_name_or_path), **kwargs).get("model_type")
    classes = (method.model_class for method in METHODS.values())
    return next((found for found in classes if found.config_class.model_type == model_type), None)


@dataclass(frozen=True)
class Method:
    """
    Args:
        model_class: what is trained.
        description: for the model card.
        values: of the configuration, that make the method what it is.
    """

    model_class: type[IMedSamModel]
    description: str
    values: Mapping[str, Any] = field(default_factory=dict)

    def get_values(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """
        The values of the configuration to use.

        Raises:
            ValueError: given ones that contradict the method's.
        """
        for key, value in self.values.items():
            if given.get(key, value) != value:
                raise ValueError(f"Expected {key} {value!r} for this method, got {given[key]!r}: leave it out.")
        return {**given, **self.values}

    def made(self, model: IMedSamModel) -> bool:
        return type(model) is self.model_class and all(
            getattr(model.config, key) == value for key, value in self.values.items()
        )


METHODS = {
    "imedsam": Method(IMedSamModel, "I-MedSAM (implicit medical image segmentation with Segment Anything, ECCV 2024)"),
    "imedsam_box_mask": Method(
        BoxMaskModel,
        "I-MedSAM (implicit medical image segmentation with Segment Anything, ECCV 2024) with the box as a mask "
        "prompt beside its corners",
        {"implicit_decoder": True},
    ),
    "sam_decoder": Method(
        IMedSamModel, "A baseline of I-MedSAM: SAM's own mask decoder, fine-tuned", {"implicit_decoder": False}
    ),
    "sam_decoder_box_mask": Method(
        BoxMaskModel,
        "A baseline of I-MedSAM: SAM's own mask decoder, fine-tuned with the box as a mask prompt beside its corners",
        {"implicit_decoder": False},
    ),
    "sf_recsam": Method(
        SFRecSamModel, "SF-RecSAM (SAM for breast ultrasound with spatial and frequency features, ECCV 2024)"
    ),
    "convolutional": Method(
        ConvolutionalModel, "A baseline of I-MedSAM: convolutions in the place of the implicit decoder"
    ),
    "unet": Method(
        UNetModel, "A baseline of I-MedSAM: MONAI's U-Net with the box as a fourth channel", {"box_channel": True}
    ),
    "unet_without_prompt": Method(
        UNetModel, "A baseline of I-MedSAM: MONAI's U-Net without a prompt", {"box_channel": False}
    ),
}

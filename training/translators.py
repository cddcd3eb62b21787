"""The models that translate: SAM-I2I, and a baseline, MONAI's U-Net, which starts from nothing."""

from dataclasses import fields
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_outputs import ImageSuperResolutionOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.generic import can_return_tuple

from imedsam.configuration.configuration_sam_i2i import SamI2IConfig
from imedsam.configuration.sam_based import INHERITED_KEYS
from imedsam.modeling_sam_i2i import SamI2IModel


@strict
class TranslationUNetConfig(PreTrainedConfig):
    """
    Configuration of [`TranslationUNet`].

    Args:
        channels (list[int], defaults to [22, 44, 88, 176, 352]):
            Channels of the levels, each of half the resolution of the one before. The defaults make 3.1 M parameters,
            about as many as are trained of SAM-I2I on SAM 2's tiny Hiera (2.9 M).
        num_res_units (int, defaults to 2):
            Convolutions per level, with a residual connection around them; 0 is one without.
    """

    model_type = "sam_i2i_unet"

    channels: list[int] | tuple[int, ...] = (22, 44, 88, 176, 352)
    num_res_units: int = 2

    def __post_init__(self, **kwargs: Any):
        if unknown := sorted(set(kwargs) - INHERITED_KEYS):
            own = {item.name for item in fields(self)} - {item.name for item in fields(PreTrainedConfig)}
            raise TypeError(
                f"Unknown configuration key {unknown[0]!r}: TranslationUNetConfig takes {', '.join(sorted(own))}. "
                "Correct or remove it."
            )
        super().__post_init__(**kwargs)
        if len(self.channels) < 2 or min(self.channels) < 1 or self.num_res_units < 0:
            raise ValueError(
                "Expected at least 2 positive numbers of channels and num_res_units of at least 0, got "
                f"{list(self.channels)} and {self.num_res_units}."
            )

    @property
    def size_divisor(self) -> int:
        """The height and width of `pixel_values` are multiples of it."""
        return 2 ** (len(self.channels) - 1)


class TranslationUNet(PreTrainedModel):
    """MONAI's `UNet` with a sigmoid, called as [`SamI2IModel`] is. Its instance norms keep no running statistics."""

    config_class = TranslationUNetConfig
    config: TranslationUNetConfig
    main_input_name = "pixel_values"
    input_modalities = ["image"]

    def __init__(self, config: TranslationUNetConfig):
        from monai.networks.nets import UNet

        super().__init__(config)
        self.network = UNet(
            spatial_dims=2,
            in_channels=3,
            out_channels=1,
            channels=config.channels,
            strides=[2] * (len(config.channels) - 1),
            num_res_units=config.num_res_units,
        )
        self.post_init()

    @can_return_tuple
    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> ImageSuperResolutionOutput:
        """
        Args:
            pixel_values: (B, 3, H, W), normalised; H and W are multiples of `config.size_divisor`, and of more than
                one of them, as a single value has no variance to be normalised by.
            labels: (B, 1, H, W), the target contrast in [0, 1].

        Returns:
            `reconstruction` (B, 1, H, W) in [0, 1], and with labels `loss`, its mean absolute difference to them.

        Raises:
            ValueError: sides that are no multiples.
        """
        divisor = self.config.size_divisor
        if any(side % divisor for side in pixel_values.shape[-2:]):
            raise ValueError(
                f"Expected pixel_values with sides that are multiples of {divisor}, got {tuple(pixel_values.shape)}: "
                f"SamI2IImageProcessor(size_divisor={divisor}) makes them."
            )
        reconstruction = self.network(pixel_values.to(self.dtype)).float().sigmoid()
        loss = None if labels is None else F.l1_loss(reconstruction, labels.float())
        return ImageSuperResolutionOutput(loss=loss, reconstruction=reconstruction)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if reset := getattr(module, "reset_parameters", None):
            reset()  # PyTorch's, which MONAI relies on


# By what `--model` calls them.
TRANSLATORS: dict[str, type[PreTrainedModel]] = {"sam_i2i": SamI2IModel, "unet": TranslationUNet}
TRANSLATOR_CONFIGS: dict[str, type[PreTrainedConfig]] = {"sam_i2i": SamI2IConfig, "unet": TranslationUNetConfig}


def find_translator(model_type: str | None) -> str | None:
    """The name of the model of this type; None if it is none that translates."""
    return next((name for name, one in TRANSLATOR_CONFIGS.items() if one.model_type == model_type), None)

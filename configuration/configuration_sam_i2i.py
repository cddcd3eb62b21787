"""Configuration of SAM-I2I."""

from copy import deepcopy
from dataclasses import fields
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig
from transformers.backbone_utils import BackboneConfigMixin
from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec

from imedsam.configuration.sam_based import INHERITED_KEYS

NUM_STAGES = 4
STRIDE = 32  # of the last stage


@strict
class SamI2IConfig(PreTrainedConfig):
    """
    Configuration of [`SamI2IModel`]. The defaults are the paper's, with SAM 2's tiny Hiera.

    Args:
        backbone_config (PreTrainedConfig or dict, optional):
            The backbone, by its `model_type`: SAM 2's Hiera (`sam2_hiera_det_model`, the default); SAM's ViT
            (`sam_vision_model`), of whose one scale a pyramid makes four; or any backbone of `AutoBackbone`, whose
            last four stages are taken, such as a `resnet`.
        train_backbone (bool, defaults to False):
            Train the backbone too, for one that starts from nothing.
        upsampling (int, defaults to 4):
            How many times a slice is enlarged before the backbone, whose first stage has a quarter of what it sees:
            with 4 that is the slice's own size. With less, what the decoder puts out is enlarged instead: faster, and
            coarser.
        decoder_heads (list[int], defaults to [4, 2, 1]):
            Attention heads of the decoder's blocks, from the coarse one to the fine one.
        decoder_windows (list[int], defaults to [16, 8, 4]):
            Sides of their mask units: larger ones at lower resolutions.

    Raises:
        TypeError: an unknown key.
        ValueError: values that contradict each other.
        huggingface_hub.errors.StrictDataclassFieldValidationError: a value of the wrong type.
    """

    model_type = "sam_i2i"
    sub_configs_defaults = {
        "backbone_config": SubConfigSpec(config_class=AutoConfig, model_type="sam2_hiera_det_model")
    }

    backbone_config: Any = None  # a `PreTrainedConfig` once initialised
    train_backbone: bool = False
    upsampling: int = 4
    decoder_heads: list[int] | tuple[int, ...] = (4, 2, 1)
    decoder_windows: list[int] | tuple[int, ...] = (16, 8, 4)
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any):
        if unknown := sorted(set(kwargs) - INHERITED_KEYS):
            own = {item.name for item in fields(self)} - {item.name for item in fields(PreTrainedConfig)}
            raise TypeError(
                f"Unknown configuration key {unknown[0]!r}: SamI2IConfig takes {', '.join(sorted(own))}. "
                "Correct or remove it."
            )
        super().__post_init__(**kwargs)
        self._refuse_contradictions()
        backbone: Any = self.backbone_config
        is_staged = isinstance(backbone, BackboneConfigMixin)
        if is_staged and len(backbone.out_features) == 1:
            self.backbone_config = deepcopy(backbone)  # the caller's stays as it is
            self.backbone_config.out_features = backbone.stage_names[-NUM_STAGES:]

    @property
    def size_divisor(self) -> int:
        """The height and width of `pixel_values` are multiples of it."""
        return STRIDE // self.upsampling

    def _refuse_contradictions(self) -> None:
        if self.upsampling not in (1, 2, 4):
            raise ValueError(
                f"Expected upsampling 1, 2 or 4, got {self.upsampling}: with 4 the finest stage has the slice's size."
            )
        for name, values in (("decoder_heads", self.decoder_heads), ("decoder_windows", self.decoder_windows)):
            if len(values) != NUM_STAGES - 1 or min(values) < 1:
                raise ValueError(
                    f"Expected {name} as three positive numbers, from coarse to fine, got {list(values)}."
                )

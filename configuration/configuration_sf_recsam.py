"""Configuration of SF-RecSAM."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, ClassVar, Literal, cast

from huggingface_hub.dataclasses import strict
from transformers import SamConfig

from imedsam.configuration.false_corrector import FalseCorrectorConfig
from imedsam.configuration.sam_based import SamBasedConfig


@strict
class SFRecSamConfig(SamBasedConfig):
    """
    Configuration of [`SFRecSamModel`]. The defaults are those of the authors' code: SAM ViT-B at 256 x 256 pixels,
    whose layers with global attention are fused with a convolutional branch on the image and its high-frequency image.

    Args:
        sam_config (SamConfig or dict, optional):
            The underlying SAM. By default ViT-B for 256 x 256 pixels. With `overlapping_patches` its `patch_size` is
            the distance of the tokens, half the side of a patch.
        overlapping_patches (bool, defaults to True):
            Take SAM's patches at half their distance, from the image enlarged by half a patch: 32 x 32 tokens of 256
            pixels instead of 16 x 16.
        fusion (str or None, defaults to "spatial_frequency"):
            What the image encoder is fused with, by attention to it: a convolutional branch on the image ("spatial"),
            on its high-frequency image ("frequency") or on both ("spatial_frequency"); its own features after a
            learnable spectral filter ("spectral_filter"); or nothing (`None`), which leaves the adapters alone.
        fusion_layers (list[int], optional):
            The layers that fuse. By default SAM's with global attention; in a trunk without windows every third one.
        adapter_hidden (int, optional):
            Width of the adapters' bottleneck; by default a quarter of the encoder's width.
        adapter_scale (float, defaults to 0.5):
            Factor of the adapters beside the fusing layers' MLPs.
        side_scale (float, defaults to 0.5):
            Factor with which the convolutional branch is added to the encoder's last tokens.
        learned_corrector (bool, defaults to False):
            Look at suspicious places of a mask again with two small heads, which a second stage of training adds
            ([`~imedsam.modeling_sf_recsam.SFRecSamModel.add_corrector`]); all else is then frozen.
        corrector_samples (int, defaults to 5):
            N, the decodings of each mask whose disagreement makes places suspicious.
        corrector_click_radius (float, defaults to 5.0):
            M: clicks are drawn from a disc of the object's shorter side divided by M.
        corrector_foreground (float, defaults to 0.5):
            Share of its largest value that the mean of the decodings exceeds in the mask.
        corrector_suspicion (float, defaults to 0.9):
            Share of the range of the uncertainty above which a place is suspicious.
        corrector_brightness (float, defaults to 1.4):
            Suspicious pixels are of the object if they are less than this times as bright as it is on average.
        corrector_box_jitter (float, defaults to 0.1):
            Share of a box's width or height by which its sides move at most between the decodings.
        train_mask_decoder (bool, defaults to False):
            Train SAM's mask decoder too, for a start point whose decoder knows nothing.
        base_model_sha256 (str, optional):
            SHA-256 of the weights of the SAM that the model starts from, which `from_sam_pretrained` notes.
        id2label (dict[int, str], optional):
            Names of the classes; or give `num_labels`. SAM's decoder gives one mask whatever the class.

    Raises:
        TypeError: an unknown key.
        ValueError: values that contradict each other.
        huggingface_hub.errors.StrictDataclassFieldValidationError: a value of the wrong type.
    """

    model_type = "sf_recsam"
    default_image_size: ClassVar[int] = 256

    overlapping_patches: bool = True
    fusion: Literal["spatial", "frequency", "spatial_frequency", "spectral_filter"] | None = "spatial_frequency"
    fusion_layers: list[int] | tuple[int, ...] | None = None
    adapter_hidden: int | None = None
    adapter_scale: float | int = 0.5
    side_scale: float | int = 0.5
    learned_corrector: bool = False
    corrector_samples: int = 5
    corrector_click_radius: float | int = 5.0
    corrector_foreground: float | int = 0.5
    corrector_suspicion: float | int = 0.9
    corrector_brightness: float | int = 1.4
    corrector_box_jitter: float | int = 0.1

    def __post_init__(self, **kwargs: Any):
        super().__post_init__(**kwargs)
        vision = self.sam_config.vision_config
        if self.fusion_layers is None:
            depth, layers = vision.num_hidden_layers, list(self._global_layers())
            self.fusion_layers = layers if len(layers) < depth else list(range(2, depth, 3)) or [depth - 1]
        if self.adapter_hidden is None:
            self.adapter_hidden = max(1, vision.hidden_size // 4)
        self._refuse_other_layers()
        _ = self.false_corrector  # which checks its numbers

    @property
    def adapter_width(self) -> int:
        """`adapter_hidden`, which is a number once initialised."""
        return cast(int, self.adapter_hidden)

    @property
    def fused_layers(self) -> list[int]:
        """`fusion_layers`, which are a list once initialised."""
        return list(cast(Sequence[int], self.fusion_layers))

    @property
    def false_corrector(self) -> FalseCorrectorConfig:
        """The corrector's numbers."""
        names = (item.name for item in fields(FalseCorrectorConfig))
        return FalseCorrectorConfig(**{name: getattr(self, f"corrector_{name}") for name in names})

    def default_sam_config(self) -> dict[str, Any]:
        sam_config = super().default_sam_config()
        for part in sam_config.values():
            part["patch_size"] = 8 if self.overlapping_patches else 16
        return sam_config

    @classmethod
    def on_sam(cls, sam_config: SamConfig, image_size: int | None = None, **values: Any) -> Any:
        """As for every configuration on a SAM; with overlapping patches the tokens are half as far apart."""
        parts: Any = SamConfig(**sam_config.to_dict())
        if values.get("overlapping_patches", True):
            for part in (parts.vision_config, parts.prompt_encoder_config):
                part.patch_size //= 2
        return super().on_sam(parts, image_size, **values)

    def _global_layers(self) -> range | list[int]:
        vision = self.sam_config.vision_config
        return vision.global_attn_indexes if vision.window_size > 0 else range(vision.num_hidden_layers)

    def _refuse_other_layers(self) -> None:
        layers, usable = self.fused_layers, list(self._global_layers())
        if not layers or sorted(set(layers)) != layers or not set(layers) <= set(usable):
            raise ValueError(
                f"Expected fusion_layers as layers with global attention in order, out of {usable}, got {layers}."
            )
        if self.fusion in ("spatial", "frequency", "spatial_frequency") and (
            self.patch_size < 2 or self.patch_size & (self.patch_size - 1)
        ):
            raise ValueError(
                f"Expected tokens at a distance of a power of 2 pixels, got {self.patch_size}: the convolutional "
                'branch comes there by halving. Use fusion="spectral_filter" or None.'
            )
        if self.adapter_width < 1:
            raise ValueError(f"Expected adapter_hidden of at least 1, got {self.adapter_width}.")

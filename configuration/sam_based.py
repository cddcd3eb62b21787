"""What the configurations of models on SAM share: the SAM itself, the classes, and what is refused."""

from dataclasses import fields
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import SamConfig
from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec

# Keys that `PreTrainedConfig` understands without declaring them as fields.
INHERITED_KEYS = {
    "_attn_implementation",
    "_name_or_path",
    "attn_implementation",
    "auto_map",
    "model_type",
    "name_or_path",
    "num_labels",
    "output_attentions",
    "quantization_config",
    "torch_dtype",
}


@strict
class SamBasedConfig(PreTrainedConfig):
    """
    Base of the configurations of models on SAM.

    Args:
        sam_config (SamConfig or dict, optional):
            The underlying SAM. By default ViT-B for squares of `default_image_size` pixels.
        train_mask_decoder (bool, defaults to False):
            Train SAM's mask decoder too.
        base_model_sha256 (str, optional):
            SHA-256 of the weights of the SAM that the model starts from, which `from_sam_pretrained` notes.
        id2label (dict[int, str], optional):
            Names of the classes; or give `num_labels`. One class by default.
    """

    sub_configs_defaults = {"sam_config": SubConfigSpec(config_class=SamConfig)}
    default_image_size: ClassVar[int] = 384

    sam_config: Any = None  # a `SamConfig` once initialised
    train_mask_decoder: bool = False
    base_model_sha256: str | None = None
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any):
        self._refuse_unknown_keys(kwargs)
        self._name_classes(kwargs.pop("num_labels", None))
        if self.sam_config is None:
            self.sam_config = self.default_sam_config()
        super().__post_init__(**kwargs)
        self._refuse_contradictions()

    def default_sam_config(self) -> dict[str, Any]:
        # A `SamConfig` on its own initialises weights at 1e-10 and its Fourier matrix at half the width.
        size = self.default_image_size
        return {
            "vision_config": {"image_size": size, "initializer_range": 0.02, "scale": 1.0},
            "prompt_encoder_config": {"image_size": size},
        }

    @classmethod
    def on_sam(cls, sam_config: SamConfig, image_size: int | None = None, **values: Any) -> Any:
        """
        The configuration of a model on a SAM.

        Args:
            image_size: side of the model's square; `default_image_size` by default.
            values: of the configuration.
        """
        parts = sam_config.to_dict()
        for part in (parts["vision_config"], parts["prompt_encoder_config"]):
            part["image_size"] = cls.default_image_size if image_size is None else image_size
        parts["prompt_encoder_config"].pop("image_embedding_size", None)
        parts.pop("_name_or_path", None)  # a folder of this machine, which others need not know
        return cls(sam_config=parts, **values)

    @classmethod
    def configuration_keys(cls) -> set[str]:
        """What this configuration takes, beside what every `PreTrainedConfig` does."""
        inherited = {field.name for field in fields(PreTrainedConfig)}
        return {field.name for field in fields(cls)} - inherited | {"num_labels", "id2label"}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Values given beside the dictionary are held to the same rules as those in it."""
        given = {name: kwargs.pop(name) for name in list(kwargs) if name in cls.configuration_keys()}
        return super().from_dict({**config_dict, **given}, **kwargs)

    @property
    def image_size(self) -> int:
        """Side of the square `pixel_values`."""
        return self.sam_config.vision_config.image_size

    @property
    def patch_size(self) -> int:
        """Distance of the image encoder's tokens in pixels."""
        return self.sam_config.vision_config.patch_size

    @property
    def trains_mask_decoder(self) -> bool:
        """Whether SAM's two-way transformer is trained."""
        return self.train_mask_decoder

    @property
    def num_labels(self) -> int:
        """Number of classes."""
        return len(self.id2label or {})

    @num_labels.setter
    def num_labels(self, num_labels: int) -> None:
        self._name_classes(num_labels)

    def to_diff_dict(self) -> dict[str, Any]:
        """What is saved, always with the classes: `PreTrainedConfig` leaves out names that are its own default."""
        return {**super().to_diff_dict(), "id2label": self.id2label}

    def _name_classes(self, num_labels: int | None) -> None:
        if num_labels is not None and (not isinstance(num_labels, int) or isinstance(num_labels, bool)):
            raise ValueError(f"Expected num_labels as an integer, got {num_labels!r}.")
        if self.id2label is not None and not isinstance(self.id2label, dict):
            raise ValueError(f'Expected id2label as {{0: "name", ...}}, got {self.id2label!r}.')
        if self.id2label is None:
            num_labels = 1 if num_labels is None else num_labels
            self.id2label = {0: "object"} if num_labels == 1 else {i: f"object {i + 1}" for i in range(num_labels)}
        elif num_labels is not None and num_labels != len(self.id2label):
            raise ValueError(
                f"Expected num_labels and id2label to agree, got {num_labels} and {len(self.id2label)} names: "
                "give one of the two."
            )
        self.label2id = {name: int(index) for index, name in self.id2label.items()}
        if len(self.label2id) < len(self.id2label):
            raise ValueError(f"Expected a name of its own for each class, got {list(self.id2label.values())}.")

    def _refuse_unknown_keys(self, kwargs: dict[str, Any]) -> None:
        unknown = sorted(set(kwargs) - INHERITED_KEYS)
        if unknown:
            known = sorted(self.configuration_keys() - {"num_labels", "id2label"})
            raise TypeError(
                f"Unknown configuration key{'s' if len(unknown) > 1 else ''} {', '.join(map(repr, unknown))}: "
                f"{type(self).__name__} takes {', '.join(known)} and num_labels. Correct or remove it; in a "
                "checkpoint it may be of a newer version: update imedsam's repository, and `pip install` its path."
            )
        if isinstance(self.sam_config, dict):
            parts = {field.name for field in fields(SamConfig)} | INHERITED_KEYS
            if others := sorted(set(self.sam_config) - parts):
                raise TypeError(
                    f"Unknown key {others[0]!r} in sam_config: it takes vision_config, prompt_encoder_config and "
                    "mask_decoder_config. Correct or remove it."
                )

    def _refuse_contradictions(self) -> None:
        vision, prompt = self.sam_config.vision_config, self.sam_config.prompt_encoder_config
        if not isinstance(vision.image_size, int) or not isinstance(vision.patch_size, int):
            raise ValueError(
                f"Expected a square image_size and patch_size given as integers, got {vision.image_size} and "
                f"{vision.patch_size}: models here work on squares, the processor maps any image onto one."
            )
        if vision.image_size <= 0 or vision.image_size % vision.patch_size:
            raise ValueError(
                f"Expected an image_size divisible by the patch size {vision.patch_size}, got {vision.image_size}: "
                f"use {max(1, round(vision.image_size / vision.patch_size)) * vision.patch_size}."
            )
        if (prompt.image_size, prompt.patch_size) != (vision.image_size, vision.patch_size):
            raise ValueError(
                "Expected the same image_size and patch_size in sam_config's vision_config and prompt_encoder_config, "
                f"got {vision.image_size}/{vision.patch_size} and {prompt.image_size}/{prompt.patch_size}: every box "
                "would be wrong. Set both, or use the model's from_sam_pretrained(..., image_size=...)."
            )
        widths = (vision.output_channels, prompt.hidden_size, self.sam_config.mask_decoder_config.hidden_size)
        if len(set(widths)) > 1:
            raise ValueError(
                "Expected one width for vision_config.output_channels, prompt_encoder_config.hidden_size and "
                f"mask_decoder_config.hidden_size, got {widths}: SAM adds and multiplies what they put out."
            )
        if not self.id2label:
            raise ValueError("Expected at least 1 class, got 0: set num_labels=1 for a binary task.")
        if sorted(self.id2label) != list(range(len(self.id2label))):
            raise ValueError(
                f"Expected id2label to number the classes from 0, got {sorted(self.id2label)}: "
                "the background is no class."
            )

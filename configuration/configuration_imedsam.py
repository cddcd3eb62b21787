"""Configuration of I-MedSAM."""

from dataclasses import fields
from typing import Any, Literal

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
class IMedSamConfig(PreTrainedConfig):
    r"""
    Configuration of [`IMedSamModel`]. The defaults are the paper's setting: SAM ViT-B at 384 x 384 pixels, LoRA of
    rank 4 on queries and values, a frequency branch on the amplitude spectrum, and a coarse and a fine implicit field;
    and two parts of ours that tell the fields where the box is, `prompt_frame` and `ellipse_prior`.

    Every ablation is a value here, not other code: `lora_rank=0`, `frequency_view=None | "phase" | "haar"`,
    `implicit_decoder=False` (SAM's own mask decoder instead), `selection=None | "top_k"`, `prompt_frame=False`,
    `ellipse_prior=False`.

    Args:
        sam_config (SamConfig or dict, optional):
            The underlying SAM. By default ViT-B for 384 x 384 pixels.
        lora_rank (int, defaults to 4):
            Rank of the low-rank adapters; 0 trains without LoRA.
        lora_alpha (int, defaults to 4):
            LoRA's scale is `lora_alpha / lora_rank`.
        lora_targets (list[str], optional):
            Projections of every attention of the image encoder that get an adapter, out of `q_proj`, `k_proj`,
            `v_proj`; by default `q_proj` and `v_proj`, and none with `lora_rank=0`.
        frequency_view (str or None, defaults to "amplitude"):
            Picture of the spectrum that feeds the frequency branch; `None` leaves the branch out.
        frequency_log (bool, defaults to True):
            Take log(1 + amplitude). Without it everything but the zero frequency is near 0.
        frequency_hidden (int, defaults to 4):
            Width of a frequency adapter's bottleneck.
        implicit_decoder (bool, defaults to True):
            Decode with the implicit field. `False` decodes with SAM's mask decoder, which gives one mask whatever the
            class.
        coordinate_octaves (int, defaults to 10):
            L of Eq. 4: octaves of the Fourier features of a point's position in the image.
        prompt_frame (bool, defaults to True):
            Add the point's position in the prompt's own frame (box centre at 0, box edge at 1).
        prompt_frame_octaves (int, defaults to 4):
            Octaves of the Fourier features of that position.
        ellipse_prior (bool, defaults to True):
            Add the fields' outputs to a learnt multiple of the ellipse inscribed in the prompt's frame, so that a mask
            starts as that ellipse. `False` for the paper's fields, which have to learn what a box is. A single point
            has a circle, a sixteenth of the square in radius: for prompts other than boxes, train with them.
        pixel_decoder_width (int or None, defaults to None):
            Width of three convolutions that the image features pass on their way to the fields, a multiple of 4.
            `None` for none, as in the paper.
        coarse_widths (list[int], defaults to [1024, 512]):
            Widths of the coarse field's hidden layers.
        coarse_features (int, defaults to 256):
            Number of features that the coarse field hands to the fine one.
        fine_widths (list[int], defaults to [256, 256]):
            Widths of the fine field's hidden layers, shared by the classes.
        fine_head_width (int, defaults to 128):
            Width of the hidden layer of each class's fine head.
        dropout (float, defaults to 0.5):
            Dropout probability before the coarse head (Eq. 7).
        uncertainty (str, defaults to "closed_form"):
            `"closed_form"` (T = infinity, no randomness) or `"monte_carlo"`.
        monte_carlo_samples (int, defaults to 8):
            T of Eq. 7.
        selection (str or None, defaults to "threshold"):
            Which points the fine field refines: `"threshold"` (those more uncertain than the (1 - share) quantile on a
            fixed lattice, so that the result at a point depends on nothing else), `"top_k"` (the paper's rule: the
            most uncertain share of the rendered grid), or `None` (none: the coarse field alone).
        selection_share (float, defaults to 0.125):
            Share of points to refine, in (0, 1]. 1 refines all of them.
        selection_lattice (int, defaults to 32):
            Side of the lattice on which the threshold is computed.
        train_image_encoder (bool, defaults to False):
            Train the whole image encoder; needs `lora_rank=0`. For a start point that is not SAM.
        train_mask_decoder (bool, defaults to False):
            Train SAM's two-way transformer too. With `implicit_decoder=False` it is trained in any case.
        base_model_sha256 (str, optional):
            SHA-256 of the weights of the SAM that the model starts from, which `from_sam_pretrained` notes: an adapter
            is put on no other one.
        id2label (dict[int, str], optional):
            Names of the classes; or give `num_labels`. One class by default.

    Raises:
        TypeError: an unknown key.
        ValueError: values that contradict each other.
        huggingface_hub.errors.StrictDataclassFieldValidationError: a value of the wrong type.
    """

    model_type = "imedsam"
    sub_configs_defaults = {"sam_config": SubConfigSpec(config_class=SamConfig)}

    sam_config: Any = None  # a `SamConfig` once initialised
    lora_rank: int = 4
    lora_alpha: int = 4
    lora_targets: list[str] | tuple[str, ...] | None = None
    frequency_view: Literal["amplitude", "phase", "haar"] | None = "amplitude"
    frequency_log: bool = True
    frequency_hidden: int = 4
    implicit_decoder: bool = True
    coordinate_octaves: int = 10
    prompt_frame: bool = True
    prompt_frame_octaves: int = 4
    ellipse_prior: bool = True
    pixel_decoder_width: int | None = None
    coarse_widths: list[int] | tuple[int, ...] = (1024, 512)
    coarse_features: int = 256
    fine_widths: list[int] | tuple[int, ...] = (256, 256)
    fine_head_width: int = 128
    dropout: float | int = 0.5
    uncertainty: Literal["closed_form", "monte_carlo"] = "closed_form"
    monte_carlo_samples: int = 8
    selection: Literal["threshold", "top_k"] | None = "threshold"
    selection_share: float | int = 0.125
    selection_lattice: int = 32
    train_image_encoder: bool = False
    train_mask_decoder: bool = False
    base_model_sha256: str | None = None
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any):
        self._refuse_unknown_keys(kwargs)
        self._name_classes(kwargs.pop("num_labels", None))
        if self.lora_targets is None:
            self.lora_targets = ["q_proj", "v_proj"] if self.lora_rank > 0 else []
        if self.sam_config is None:
            # A `SamConfig` on its own initialises weights at 1e-10 and its Fourier matrix at half the width.
            self.sam_config = {
                "vision_config": {"image_size": 384, "initializer_range": 0.02, "scale": 1.0},
                "prompt_encoder_config": {"image_size": 384},
            }
        super().__post_init__(**kwargs)
        self._refuse_contradictions()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """
        Values given beside the dictionary are held to the same rules as those in it. What was saved before there was
        an ellipse prior has none.
        """
        given = {name: kwargs.pop(name) for name in list(kwargs) if name in CONFIGURATION_KEYS}
        return super().from_dict({"ellipse_prior": False, **config_dict, **given}, **kwargs)

    @property
    def image_size(self) -> int:
        """Side of the square `pixel_values`."""
        return self.sam_config.vision_config.image_size

    @property
    def patch_size(self) -> int:
        return self.sam_config.vision_config.patch_size

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
            known = sorted(field.name for field in fields(self) if field.name not in _PRETRAINED_FIELDS)
            raise TypeError(
                f"Unknown configuration key{'s' if len(unknown) > 1 else ''} {', '.join(map(repr, unknown))}: "
                f"IMedSamConfig takes {', '.join(known)} and num_labels. Correct or remove it; in a checkpoint it may "
                "be of a newer version: pip install --upgrade imedsam."
            )

        if isinstance(self.sam_config, dict):
            parts = {field.name for field in fields(SamConfig)} | INHERITED_KEYS
            if others := sorted(set(self.sam_config) - parts):
                raise TypeError(
                    f"Unknown key {others[0]!r} in sam_config: it takes vision_config, prompt_encoder_config and "
                    "mask_decoder_config. Correct or remove it."
                )

    def _refuse_contradictions(self) -> None:
        targets = list(self.lora_targets or [])
        vision, prompt = self.sam_config.vision_config, self.sam_config.prompt_encoder_config
        if not isinstance(vision.image_size, int) or not isinstance(vision.patch_size, int):
            raise ValueError(
                f"Expected a square image_size and patch_size given as integers, got {vision.image_size} and "
                f"{vision.patch_size}: I-MedSAM works on squares, the processor maps any image onto one."
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
                "would be wrong. Set both, or use IMedSamModel.from_sam_pretrained(..., image_size=...)."
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
        if not 0.0 < self.selection_share <= 1.0:
            raise ValueError(
                f"Expected selection_share in (0, 1], got {self.selection_share}: "
                "to refine no point use selection=None."
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"Expected dropout in [0, 1), got {self.dropout}: the paper uses 0.5.")
        if self.implicit_decoder and self.selection is not None and self.selection_share < 1.0 and self.dropout == 0.0:
            raise ValueError(
                "Expected dropout > 0 with a selection, got 0.0: the uncertainty would be 0 everywhere. "
                "Set dropout=0.5, selection_share=1.0 (refine every point) or selection=None."
            )
        if self.lora_rank < 0 or (self.lora_rank > 0 and self.lora_alpha <= 0):
            raise ValueError(
                f"Expected lora_rank >= 0 and lora_alpha > 0, got {self.lora_rank} and {self.lora_alpha}: "
                "use lora_rank=0 with lora_targets=[] to train without LoRA."
            )
        if self.lora_rank == 0 and targets:
            raise ValueError(
                f"Expected no lora_targets with lora_rank 0, got {targets}: "
                "leave lora_targets out or set a rank of at least 1."
            )
        if self.lora_rank > 0 and not set(targets) <= {"q_proj", "k_proj", "v_proj"}:
            raise ValueError(f"Expected lora_targets out of q_proj, k_proj, v_proj, got {targets}.")
        if self.lora_rank > 0 and not targets:
            raise ValueError(
                f"Expected lora_targets with lora_rank {self.lora_rank}, got none: "
                "set lora_rank=0 to train without LoRA."
            )
        if self.train_image_encoder and self.lora_rank > 0:
            raise ValueError(
                "Expected lora_rank=0 with train_image_encoder=True, got "
                f"{self.lora_rank}: LoRA adapts a frozen encoder. Choose one of the two."
            )
        at_least = {
            "frequency_hidden": 1,
            "coarse_features": 1,
            "fine_head_width": 1,
            "coordinate_octaves": 1,
            "prompt_frame_octaves": 0,
            "selection_lattice": 1,
        }
        for name, least in at_least.items():
            if getattr(self, name) < least:
                raise ValueError(f"Expected {name} of at least {least}, got {getattr(self, name)}.")
        if self.monte_carlo_samples < 2:
            raise ValueError(
                f"Expected monte_carlo_samples of at least 2, got {self.monte_carlo_samples}: "
                "one pass has no variance."
            )
        if (width := self.pixel_decoder_width) is not None and (width <= 0 or width % 4):
            raise ValueError(
                f"Expected pixel_decoder_width as a positive multiple of 4, got {width}: for none use None."
            )
        if self.pixel_decoder_width is not None and not self.implicit_decoder:
            raise ValueError(
                f"Expected no pixel_decoder_width with implicit_decoder=False, got {self.pixel_decoder_width}: "
                "SAM's mask decoder has no fields to feed. Leave one of the two out."
            )
        for name in ("coarse_widths", "fine_widths"):
            if len(getattr(self, name)) == 0 or min(getattr(self, name)) < 1:
                raise ValueError(f"Expected {name} to hold positive layer widths, got {list(getattr(self, name))}.")


_PRETRAINED_FIELDS = {field.name for field in fields(PreTrainedConfig)}
CONFIGURATION_KEYS = {field.name for field in fields(IMedSamConfig)} - _PRETRAINED_FIELDS | {"num_labels", "id2label"}

"""Configuration of I-MedSAM."""

from typing import Any, Literal

from huggingface_hub.dataclasses import strict

from imedsam.configuration.sam_based import SamBasedConfig


@strict
class IMedSamConfig(SamBasedConfig):
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

    def __post_init__(self, **kwargs: Any):
        if self.lora_targets is None:
            self.lora_targets = ["q_proj", "v_proj"] if self.lora_rank > 0 else []
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As for every configuration here. What was saved before there was an ellipse prior has none."""
        return super().from_dict({"ellipse_prior": False, **config_dict}, **kwargs)

    @property
    def trains_mask_decoder(self) -> bool:
        """Whether SAM's two-way transformer is trained; its own masks need it."""
        return self.train_mask_decoder or not self.implicit_decoder

    def _refuse_contradictions(self) -> None:
        super()._refuse_contradictions()
        targets = list(self.lora_targets or [])
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

"""I-MedSAM: SAM's encoder with two small adapters, and an implicit field that answers at any coordinate."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from peft import PeftConfig, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import SamConfig, SamModel
from transformers import initialization as init
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.sam.modeling_sam import SamPreTrainedModel
from transformers.utils import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_SAFE_WEIGHTS_NAME,
    CONFIG_NAME,
    SAFE_WEIGHTS_NAME,
    ModelOutput,
    cached_file,
    find_adapter_config_file,
)

from imedsam.configuration.configuration_imedsam import IMedSamConfig
from imedsam.frequency import FrequencyBranch, FrequencyView
from imedsam.image_encoder import IMedSamVisionEncoder, resize_positions
from imedsam.implicit_decoder import ClassLinear, HiddenLinear, ImplicitDecoder
from imedsam.lora import get_peft_config, split_qkv
from imedsam.losses import segmentation_loss
from imedsam.mask_field import FieldValues, ImplicitMaskField, InterpolatedMaskField, MaskField
from imedsam.prompt_fusion import PromptEncoder, PromptFusion, Prompts
from imedsam.rendering import pixel_centres


@dataclass
class IMedSamOutput(ModelOutput):
    """
    Output of [`IMedSamModel`]. B images, P prompts per image, M masks per prompt: one with `class_labels` or one
    class, else one per class.

    Args:
        loss (`Tensor` of shape `()`): with `labels`.
        pred_masks (`Tensor` of shape `(B, P, M, H, W)`):
            Logits over the model's square at `output_size`; a padded prompt's are -100. Not rendered with
            `coordinates`, nor with `labels` unless there is an `output_size`.
        iou_scores (`Tensor` of shape `(B, P, M)`):
            The Dice that each mask is expected to have by its own probabilities p: 2 sum_mask p / (sum p + |mask|).
        coarse_masks (`Tensor` of shape `(B, P, M, H, W)`): the coarse field's logits alone.
        uncertainty (`Tensor` of shape `(B, P, M, H, W)`): variance of the coarse probability.
        point_logits (`Tensor` of shape `(B, P, M, N)`): logits at `coordinates`.
        image_embeddings (`Tensor` of shape `(B, 256, S / patch, S / patch)`).
    """

    loss: Tensor | None = None
    pred_masks: Tensor | None = None
    iou_scores: Tensor | None = None
    coarse_masks: Tensor | None = None
    uncertainty: Tensor | None = None
    point_logits: Tensor | None = None
    image_embeddings: Tensor | None = None


class IMedSamModel(SamPreTrainedModel):
    """
    I-MedSAM (Wei et al., ECCV 2024; arXiv:2311.17081).

    `IMedSamModel(config)` is the base: SAM, with the frequency branch and the implicit decoder at their start, which
    leave the encoder as it is. `add_adapter()` puts the trainable parts on it as a PEFT adapter; `from_sam_pretrained`
    and `from_pretrained` do so by themselves. Boxes and points are in pixels of `pixel_values`, (0, 0) being the upper
    left corner of the upper left pixel; the processor brings them there.
    """

    config: IMedSamConfig  # type: ignore[assignment]  # SAM's base class has its own
    config_class = IMedSamConfig
    base_model_prefix = "imedsam"

    def __init__(self, config: IMedSamConfig):
        super().__init__(config)
        sam = config.sam_config
        self.vision_encoder = IMedSamVisionEncoder(sam.vision_config)
        self.prompt_encoder = PromptEncoder(sam)
        sam.mask_decoder_config._attn_implementation = config._attn_implementation
        self.mask_decoder = PromptFusion(sam.mask_decoder_config)
        self.frequency_view: FrequencyView | None = None
        self.frequency_branch: FrequencyBranch | None = None
        if config.frequency_view is not None:
            self.frequency_view = FrequencyView(config.frequency_view, config.frequency_log)
            self.frequency_branch = FrequencyBranch(config)
        self.implicit_decoder = ImplicitDecoder(config) if config.implicit_decoder else None
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor | None = None,
        input_boxes: Tensor | None = None,
        input_points: Tensor | None = None,
        input_labels: Tensor | None = None,
        input_masks: Tensor | None = None,
        class_labels: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        image_embeddings: Tensor | None = None,
        reshaped_input_sizes: Tensor | None = None,
        output_size: Sequence[int] | None = None,
        coordinates: Tensor | None = None,
        labels: Tensor | None = None,
        point_weights: Tensor | None = None,
        coarse_loss_weight: float = 0.5,
        **kwargs: Any,
    ) -> IMedSamOutput:
        """
        Args:
            pixel_values: (B, 3, S, S), from the processor. This or `image_embeddings`.
            input_boxes, input_points, input_labels, input_masks, class_labels: as in `get_mask_field`.
            prompt_attention_mask: (B, P), False for padded prompts.
            image_embeddings: (B, 256, S / patch, S / patch), from `get_image_embeddings`.
            reshaped_input_sizes: (B, 2), height and width of each image inside a padded square.
            output_size: (height, width) of the masks over the model's square; S x S by default.
            coordinates: (B, P, N, 2), points to supervise; (x, y) in [-1, 1] over the model's square.
            labels: 0 or 1 at the coordinates, (B, P, N), or without coordinates on a grid over the model's square,
                (B, P, H, W). With several classes, `class_labels` says which class a prompt's labels are of.
            point_weights: (B, P, N), areas that the coordinates stand for.
            coarse_loss_weight: weight of the coarse field's loss; the merged output's has the rest.
        """
        if pixel_values is not None and image_embeddings is None:
            image_embeddings = self.get_image_embeddings(pixel_values, reshaped_input_sizes)
        elif pixel_values is not None or image_embeddings is None:
            raise ValueError("Expected one of pixel_values and image_embeddings, got both or neither.")
        field = self.get_mask_field(
            image_embeddings, input_boxes, input_points, input_labels, input_masks, class_labels
        )
        shape = (field.batch_size, field.num_prompts)
        if prompt_attention_mask is not None and tuple(prompt_attention_mask.shape) != shape:
            raise ValueError(
                f"Expected prompt_attention_mask of shape (B, P) = {shape}, got {tuple(prompt_attention_mask.shape)}."
            )
        output: dict[str, Tensor] = {}
        if labels is not None:
            values, labels = self._values_at_labels(field, coordinates, labels, point_weights)
            output["loss"] = _mean_loss(values, labels, point_weights, coarse_loss_weight, prompt_attention_mask)
            output["point_logits"] = values.logits
        elif coordinates is not None:
            output["point_logits"], _ = field(coordinates)
        if coordinates is None and (labels is None or output_size is not None):
            masks = field.render(output_size or (self.config.image_size, self.config.image_size))
            output["pred_masks"], output["coarse_masks"] = masks.logits, masks.coarse_logits
            output["uncertainty"], output["iou_scores"] = masks.uncertainty, masks.scores
            if prompt_attention_mask is not None:
                padded = ~prompt_attention_mask.bool()[:, :, None, None, None]
                output["pred_masks"] = masks.logits.masked_fill(padded, -100.0)
        return IMedSamOutput(**output, image_embeddings=image_embeddings)

    def get_image_embeddings(self, pixel_values: Tensor, reshaped_input_sizes: Tensor | None = None) -> Tensor:
        """
        (B, 3, S, S) -> (B, 256, S / patch, S / patch), with gradients where they are enabled.

        Args:
            reshaped_input_sizes: (B, 2), height and width of each image inside a padded square.
        """
        size = self.config.image_size
        if pixel_values.ndim != 4 or pixel_values.shape[1:] != (3, size, size):
            raise ValueError(
                f"Expected pixel_values of shape (B, 3, {size}, {size}), got {tuple(pixel_values.shape)}: "
                "use IMedSamProcessor with this model's image_size."
            )
        injections = self._injections(pixel_values, reshaped_input_sizes)
        return self.vision_encoder(pixel_values.to(self.dtype), injections)

    def get_mask_field(
        self,
        image_embeddings: Tensor,
        input_boxes: Tensor | None = None,
        input_points: Tensor | None = None,
        input_labels: Tensor | None = None,
        input_masks: Tensor | None = None,
        class_labels: Tensor | None = None,
    ) -> MaskField:
        """
        Binds the decoder to images and prompts. Without any prompt, each image gets one field of the whole image.

        Args:
            image_embeddings: (B, 256, S / patch, S / patch).
            input_boxes: (B, P, 4), x0, y0, x1, y1 in pixels of `pixel_values`.
            input_points: (B, P, N, 2), x, y in pixels of `pixel_values`.
            input_labels: (B, P, N), 1 inside, 0 outside, -10 padding; all 1 by default.
            input_masks: (B, P, S / patch * 4, S / patch * 4), logits of a previous mask.
            class_labels: (B, P), the class to decode for each prompt; all classes by default.
        """
        batch_size, side = len(image_embeddings), self.config.image_size // self.config.patch_size
        if image_embeddings.ndim != 4 or tuple(image_embeddings.shape[2:]) != (side, side):
            raise ValueError(
                f"Expected image_embeddings of shape (B, C, {side}, {side}), got {tuple(image_embeddings.shape)}: "
                "they come from get_image_embeddings of this model."
            )
        prompts = Prompts.check(batch_size, 4 * side, input_boxes, input_points, input_labels, input_masks)
        self._check_class_labels(class_labels, prompts.shape)
        encoded = self.prompt_encoder(prompts)
        features, mask_token = self.mask_decoder.fuse(
            image_embeddings.repeat_interleave(prompts.shape[1], dim=0), self.prompt_encoder.image_positions(), encoded
        )
        if self.implicit_decoder is None or self._adapter_disabled:
            return InterpolatedMaskField(self.mask_decoder.predict(features, mask_token).unflatten(0, prompts.shape))
        if class_labels is None:
            classes = torch.arange(self.config.num_labels, device=features.device).expand(len(features), -1)
        else:
            classes = class_labels.reshape(-1, 1)
        frame = prompts.frame(self.config.image_size).to(features.device)
        features = self.implicit_decoder.normalise(features)
        return ImplicitMaskField(
            self.implicit_decoder, self.config, features, encoded.mean, frame, classes, batch_size
        )

    @classmethod
    def from_sam_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, image_size: int = 384, **kwargs: Any
    ) -> IMedSamModel:
        """
        Starts from a `SamModel` checkpoint (`facebook/sam-vit-base`, MedSAM in that format, a local folder), with the
        adapter that the configuration asks for.

        Args:
            pretrained_model_name_or_path: Hub name or folder.
            image_size: side of the model's square; positions are resized to it.
            kwargs: values of [`IMedSamConfig`]; `dtype`, `attn_implementation` and what `from_pretrained` takes to
                find files (`revision`, `token`, `cache_dir`, `local_files_only`, ...).
        """
        loading = {key: kwargs.pop(key) for key in list(kwargs) if key in _LOADING_KEYS}
        sam_config = SamConfig.from_pretrained(pretrained_model_name_or_path, **_only_finding(loading)).to_dict()
        sam_config["vision_config"]["image_size"] = sam_config["prompt_encoder_config"]["image_size"] = image_size
        sam_config["prompt_encoder_config"].pop("image_embedding_size", None)
        config = cls.config_class(sam_config=sam_config, **kwargs)
        model = cls._base_from_sam(pretrained_model_name_or_path, config, **loading)
        if config.lora_rank > 0:
            model.add_adapter()
        model.set_trainable()
        return model.eval()

    @classmethod
    def from_pretrained(  # type: ignore[override]  # names the arguments that it passes on
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *args: Any,
        base_model_name_or_path: str | os.PathLike | None = None,
        **kwargs: Any,
    ) -> IMedSamModel:
        """
        Loads what `save_pretrained` wrote, or an adapter from `save_adapter` together with the SAM it names.

        Args:
            pretrained_model_name_or_path: Hub name or folder.
            base_model_name_or_path: where an adapter's SAM is, if not where the adapter says.
        """
        path, finding = str(pretrained_model_name_or_path), _only_finding(kwargs)
        if find_adapter_config_file(path, **finding) is None:
            _refuse_sam_checkpoint(path, finding)
            model = super().from_pretrained(path, *args, **kwargs)
        elif (folder := _folder_of_whole_model(path, finding)) is not None:
            located = {key: value for key, value in kwargs.items() if key not in _PLACE_KEYS}
            model = super().from_pretrained(folder, *args, **located)
        else:
            config = kwargs.pop("config", None) or cls.config_class.from_pretrained(path, **finding)
            base = base_model_name_or_path or PeftConfig.from_pretrained(path, **finding).base_model_name_or_path
            if not base:
                raise ValueError(
                    f"Expected the adapter at {path} to name the SAM that it belongs to, got no name: "
                    "give base_model_name_or_path."
                )
            kwargs.setdefault("dtype", "auto")
            model = cls._base_from_sam(
                base, config, **{key: value for key, value in kwargs.items() if key not in _PLACE_KEYS}
            )
            model.load_adapter(path, adapter_kwargs=finding)
        model.set_trainable()
        return model.eval()

    @classmethod
    def _base_from_sam(cls, path: str | os.PathLike, config: IMedSamConfig, **loading: Any) -> IMedSamModel:
        """The base of a configuration, with SAM's weights and no adapter."""
        dtype = loading.pop("dtype", None)
        if isinstance(dtype, str):
            dtype = config.dtype if dtype == "auto" else getattr(torch, dtype)
        # Declared to return the model alone.
        loaded: Any = SamModel.from_pretrained(path, dtype=torch.float32, output_loading_info=True, **loading)
        sam, found = loaded
        if "attn_implementation" in loading:
            config._attn_implementation = loading["attn_implementation"]
        model = cls(config)
        state_dict = sam.state_dict()
        positions = state_dict.pop("shared_image_embedding.positional_embedding")
        state_dict["prompt_encoder.shared_embedding.positional_embedding"] = positions
        state_dict = split_qkv(resize_positions(state_dict, config.sam_config.vision_config))
        missing, unexpected = model.load_state_dict(state_dict, strict=False)
        missing = [key for key in missing if not key.startswith(("frequency_branch.", "implicit_decoder."))]
        missing += sorted(found["missing_keys"])  # which transformers filled at random
        if missing or unexpected:
            raise ValueError(f"Expected SAM's weights at {path}, got missing {missing} and unexpected {unexpected}.")
        model.name_or_path = str(path)
        return model if dtype is None else model.to(dtype)

    def save_pretrained(  # type: ignore[override]  # names the arguments that it uses
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """
        Writes the whole model: `config.json`, `model.safetensors` and, with an adapter, the adapter's two files beside
        them (a complete model with an embedded adapter, as transformers calls it). Without one, an adapter that lies
        in the folder from before is removed: it would be loaded on top.
        """
        if push_to_hub:
            raise ValueError("Expected a folder to write, got push_to_hub=True: use model.push_to_hub(repo_id).")
        if not self._hf_peft_config_loaded:
            for name in (ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME) if is_main_process else ():
                Path(save_directory, name).unlink(missing_ok=True)
            return super().save_pretrained(save_directory, is_main_process, **kwargs)
        if not is_main_process:
            return
        self.save_adapter(save_directory)
        save_torch_state_dict(self._base_state_dict(), str(save_directory))

    def save_adapter(self, save_directory: str | os.PathLike) -> None:
        """
        Writes the active adapter alone, a few MB that name the SAM they belong to: a PEFT checkpoint
        (`adapter_config.json`, `adapter_model.safetensors`) and `config.json`.
        """
        if not self._hf_peft_config_loaded:
            raise ValueError(
                "Expected a model with an adapter, got one without: use save_pretrained (lora_rank is 0)."
            )
        self.config.architectures = [type(self).__name__]
        self.config.dtype = self.dtype
        self.config.save_pretrained(save_directory)
        super().save_pretrained(save_directory)

    def add_adapter(self, adapter_config: PeftConfig | None = None, adapter_name: str | None = None) -> None:
        """
        Puts a new adapter on the model: LoRA, and copies of the frequency branch, the prompt encoder, the upscaling
        convolutions and the implicit decoder. While it is disabled the model is SAM itself.

        Args:
            adapter_config: by default the one that the configuration describes.
        """
        super().add_adapter(adapter_config or get_peft_config(self.config), adapter_name)

    def load_adapter(
        self, peft_model_id: str | None = None, adapter_name: str | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """
        Loads a further adapter; `set_adapter(adapter_name)` switches to it.

        Raises:
            ValueError: an adapter of another configuration.
        """
        if peft_model_id is not None:
            other = self.config_class.from_pretrained(
                peft_model_id, **_only_finding(kwargs.get("adapter_kwargs") or {})
            )
            for key in _SHARED_BY_ADAPTERS:
                if getattr(other, key) != getattr(self.config, key):
                    raise ValueError(
                        f"Expected an adapter with {key} {getattr(self.config, key)!r}, got {getattr(other, key)!r} "
                        f"at {peft_model_id}: load it by itself with from_pretrained."
                    )
        info = super().load_adapter(peft_model_id, adapter_name, *args, **kwargs)
        # transformers counts other adapters' parameters as missing too.
        missing = [key for key in info.missing_and_mismatched() if _adapter_of(key) == (adapter_name or "default")]
        if missing or info.unexpected_keys:
            raise ValueError(
                f"Expected an adapter for this model's configuration, got one with missing {sorted(missing)} and "
                f"unexpected {sorted(info.unexpected_keys)}: load it by itself with from_pretrained."
            )
        self.set_trainable()
        return info

    def get_adapter_state_dict(
        self, adapter_name: str | None = None, state_dict: dict[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """The parameters of an adapter, by default of the active one."""
        # PEFT would ask the Hub whether the base's vocabulary was changed.
        return get_peft_model_state_dict(
            self, state_dict, adapter_name or self.active_adapters()[0], save_embedding_layers=False
        )

    def set_adapter(self, adapter_name: list[str] | str) -> None:
        """Makes another loaded adapter the active one."""
        super().set_adapter(adapter_name)
        self.set_trainable()

    def enable_adapters(self) -> None:
        """Takes back `disable_adapters`."""
        super().enable_adapters()
        # transformers enables the LoRA layers alone.
        for module in self.modules():
            if isinstance(module, ModulesToSaveWrapper):
                module.enable_adapters(enabled=True)
        self.set_trainable()

    def merge_and_unload(self) -> IMedSamModel:
        """
        Merges LoRA into the encoder and keeps the active adapter's other parts, in place: the same function without
        PEFT. The configuration's `lora_rank` becomes 0.
        """
        if not self._hf_peft_config_loaded:
            return self
        for name, module in list(self.named_modules()):
            parent, _, child = name.rpartition(".")
            if isinstance(module, LoraLayer):
                module.merge()
                setattr(self.get_submodule(parent), child, module.get_base_layer())
            elif isinstance(module, ModulesToSaveWrapper):
                setattr(self.get_submodule(parent), child, module.modules_to_save[module.active_adapters[0]])
        del self.peft_config
        self._hf_peft_config_loaded = False
        self._weight_conversions = None  # of the adapter's names, which transformers would undo on saving
        self.config.lora_rank, self.config.lora_targets = 0, []
        self.set_trainable()
        return self

    def set_trainable(self) -> None:
        """Sets `requires_grad` of every parameter to what the configuration says is trained."""
        trained = {id(parameter) for part in self._parts().values() for parameter in part}
        for parameter in self.parameters():
            parameter.requires_grad_(id(parameter) in trained)

    def parameter_parts(self) -> dict[str, list[nn.Parameter]]:
        """The trainable parameters by part of the method: `"LoRA"`, `"frequency adapters"`, `"coarse field"`, ..."""
        parts = {name: [p for p in part if p.requires_grad] for name, part in self._parts().items()}
        return {name: part for name, part in parts.items() if part}

    def print_trainable_parameters(self) -> None:
        """Prints a table of the trainable parameters by part."""
        counts = {name: sum(p.numel() for p in part) for name, part in self.parameter_parts().items()}
        total = sum(p.numel() for name, p in self.named_parameters() if "original_module" not in name)
        for name, count in counts.items():
            print(f"{name:<20} {count:>12,}")
        trained = sum(counts.values())
        print(f"{'trainable':<20} {trained:>12,}  {100 * trained / total:.2f} % of {total:,}")

    @torch.no_grad()
    def frequency_ratio(self, pixel_values: Tensor, reshaped_input_sizes: Tensor | None = None) -> Tensor:
        """
        |g f| / |x| per block: how much the frequency branch adds to what the block puts out, (depth,). A branch that
        stays silent proves nothing in an ablation.
        """
        injections = self._injections(pixel_values, reshaped_input_sizes)
        if injections is None:
            raise ValueError(
                "Expected a model with a frequency branch, got frequency_view=None or a disabled adapter."
            )
        hidden_states, ratios = self.vision_encoder.embed(pixel_values.to(self.dtype)), []
        for block, injection in zip(self.vision_encoder.layers, injections, strict=True):
            hidden_states = block(hidden_states)
            ratios.append(injection.norm() / hidden_states.norm())
            hidden_states = hidden_states + injection
        return torch.stack(ratios)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ClassLinear):
            module.reset_parameters()
        elif isinstance(module, HiddenLinear):
            init.kaiming_normal_(module.weight, nonlinearity="relu")
        elif isinstance(module, FrequencyBranch):
            init.zeros_(module.gates)

    def _injections(self, pixel_values: Tensor, reshaped_input_sizes: Tensor | None) -> list[Tensor] | None:
        """What the frequency branch adds to the blocks' outputs; None without one."""
        if self.frequency_view is None or self.frequency_branch is None or self._adapter_disabled:
            return None
        # Of the pixels as they are given: half precision would add its rounding noise to every frequency.
        spectrum = self.frequency_view(pixel_values, reshaped_input_sizes).to(self.dtype)
        return self.frequency_branch(self.vision_encoder.embed(spectrum))

    @property
    def _adapter_disabled(self) -> bool:
        return isinstance(self.prompt_encoder, ModulesToSaveWrapper) and self.prompt_encoder.disable_adapters

    def _base_state_dict(self) -> dict[str, Tensor]:
        """What the state dict would be without an adapter."""
        return {
            key.replace("original_module.", "").replace("base_layer.", ""): value
            for key, value in self.state_dict().items()
            if "modules_to_save." not in key and "lora_" not in key
        }

    def _parts(self) -> dict[str, list[nn.Parameter]]:
        """The parameters that the configuration trains, by part, of the active adapter if there is one."""
        parts: dict[str, list[nn.Parameter]] = {name: [] for name, _ in _PARTS}
        active = self.active_adapters()[0] if self._hf_peft_config_loaded else None
        for name, parameter in self.named_parameters():
            if "original_module" in name or _adapter_of(name) not in (None, active):
                continue
            name = _ADAPTER_NAME.sub("", name)
            part = next((part for part, pattern in _PARTS if re.match(pattern, name)), None)
            if part == "image encoder" and not self.config.train_image_encoder:
                continue
            if part == "mask decoder" and self.config.implicit_decoder and not self.config.train_mask_decoder:
                continue
            if part is not None:
                parts[part].append(parameter)
        return parts

    def _values_at_labels(
        self, field: MaskField, coordinates: Tensor | None, labels: Tensor, point_weights: Tensor | None
    ) -> tuple[FieldValues, Tensor]:
        """The field where the labels are: at the coordinates, or on the labels' grid."""
        shape = (field.batch_size, field.num_prompts)
        if coordinates is None:
            if labels.ndim != 4 or tuple(labels.shape[:2]) != shape:
                raise ValueError(
                    f"Expected labels of shape (B, P, H, W) with (B, P) = {shape}, got {tuple(labels.shape)}: "
                    "or give their coordinates."
                )
            square = torch.tensor([[-1.0, -1.0, 1.0, 1.0]], device=labels.device).expand(len(labels), 4)
            coordinates, labels = pixel_centres(labels.shape[-2:], square)[:, None], labels.flatten(2)
        elif tuple(coordinates.shape[:2]) != shape or labels.shape != coordinates.shape[:-1]:
            raise ValueError(
                f"Expected coordinates (B, P, N, 2) and labels (B, P, N) with (B, P) = {shape}, got "
                f"{tuple(coordinates.shape)} and {tuple(labels.shape)}."
            )
        if point_weights is not None and point_weights.shape != labels.shape:
            raise ValueError(
                f"Expected a weight for each label, got point_weights of shape {tuple(point_weights.shape)} and "
                f"labels of shape {tuple(labels.shape)}."
            )
        values = field.values(coordinates, point_weights)
        if values.logits.shape[2] != 1:
            raise ValueError(
                f"Expected class_labels with labels and {values.logits.shape[2]} classes, got none: "
                "say which class the labels of each prompt are of."
            )
        return values, labels

    def _check_class_labels(self, class_labels: Tensor | None, shape: tuple[int, int]) -> None:
        if class_labels is None:
            return
        if tuple(class_labels.shape) != shape:
            raise ValueError(f"Expected class_labels of shape (B, P) = {shape}, got {tuple(class_labels.shape)}.")
        if int(class_labels.min()) < 0 or int(class_labels.max()) >= self.config.num_labels:
            raise ValueError(
                f"Expected class_labels in [0, {self.config.num_labels - 1}], got {class_labels.unique().tolist()}: "
                "the background is no class."
            )


# Parts of the method and the names of their parameters, without PEFT's infixes; the first match counts.
_PARTS = [
    ("LoRA", r".*\.lora_[AB]"),
    ("frequency adapters", r"frequency_branch\.adapters"),
    ("frequency gates", r"frequency_branch\.gates"),
    ("prompt encoder", r"prompt_encoder"),
    ("upscaling", r"mask_decoder\.upscale"),
    ("coarse field", r"implicit_decoder\.coarse"),
    ("fine field", r"implicit_decoder\.fine"),
    ("image encoder", r"vision_encoder"),
    ("mask decoder", r"mask_decoder"),
]
_ADAPTER_NAME = re.compile(r"modules_to_save\.([^.]+)\.|(?<=lora_[AB])\.([^.]+)")
# What changes the function that an adapter's parameters stand for, and not always their shapes.
_SHARED_BY_ADAPTERS = (
    "image_size",
    "frequency_view",
    "frequency_log",
    "implicit_decoder",
    "coordinate_octaves",
    "prompt_frame",
    "prompt_frame_octaves",
)
_FINDING_KEYS = {"cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token"}
_LOADING_KEYS = _FINDING_KEYS | {"dtype", "attn_implementation"}
# Where in the Hub an adapter is, which says nothing about its base.
_PLACE_KEYS = {"revision", "subfolder"}


def _adapter_of(name: str) -> str | None:
    """The adapter that a parameter belongs to, if it does to any."""
    match = _ADAPTER_NAME.search(name)
    return match and (match[1] or match[2])


def _only_finding(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in kwargs.items() if key in _FINDING_KEYS}


def _folder_of_whole_model(path: str, finding: dict[str, Any]) -> str | None:
    """The local folder of a checkpoint that holds a whole model beside its adapter; None for an adapter alone."""
    names = [CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_NAME]
    files = [cached_file(path, name, _raise_exceptions_for_missing_entries=False, **finding) for name in names]
    return None if files[-1] is None else os.path.dirname(files[-1])


def _refuse_sam_checkpoint(path: str, finding: dict[str, Any]) -> None:
    model_type = PreTrainedConfig.get_config_dict(path, **finding)[0].get("model_type")
    if model_type != IMedSamConfig.model_type:
        raise ValueError(
            f"Expected an I-MedSAM checkpoint at {path}, got one of type {model_type!r}: "
            "start from a SAM with IMedSamModel.from_sam_pretrained."
        )


def _mean_loss(
    values: FieldValues,
    labels: Tensor,
    point_weights: Tensor | None,
    coarse_loss_weight: float,
    prompt_attention_mask: Tensor | None,
) -> Tensor:
    """
    The mean over the images of the mean over each image's prompts, so that it does not matter how images are spread
    over processes and accumulation steps.
    """
    labels = labels.to(values.logits.dtype)
    coarse = segmentation_loss(values.coarse_logits[:, :, 0], labels, point_weights)
    merged = segmentation_loss(values.logits[:, :, 0], labels, point_weights)
    loss = coarse_loss_weight * coarse + (1 - coarse_loss_weight) * merged
    present = torch.ones_like(loss) if prompt_attention_mask is None else prompt_attention_mask.to(loss.dtype)
    return ((loss * present).sum(dim=1) / present.sum(dim=1).clamp_min(1)).mean()

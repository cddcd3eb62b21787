"""Adapters: putting them on, switching between them, merging them, and which parameters are trained."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import TYPE_CHECKING, Any

from peft import PeftConfig, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers.models.sam.modeling_sam import SamPreTrainedModel
from transformers.utils import CONFIG_NAME, logging

from imedsam.configuration.configuration_imedsam import IMedSamConfig
from imedsam.implicit_decoder import ImplicitDecoder
from imedsam.lora import get_peft_config, read_adapter, refuse_contradictions
from imedsam.sam_checkpoints import only_finding, read_config, refuse_damaged

if TYPE_CHECKING:
    from typing_extensions import Self


class AdaptedSam(SamPreTrainedModel):
    """What every I-MedSAM model can do with its adapters. One is a PEFT checkpoint, see `imedsam.lora`."""

    config: IMedSamConfig  # type: ignore[assignment]  # SAM's base class has its own
    config_class = IMedSamConfig
    base_model_prefix = "imedsam"
    _base_revision: str | None = None  # the commit of a base from the Hub
    # Parts of the method and the names of their parameters, without PEFT's infixes; the first match counts.
    part_patterns = [
        ("LoRA", r".*\.lora_[AB]"),
        ("frequency adapters", r"frequency_branch\.adapters"),
        ("frequency gates", r"frequency_branch\.gates"),
        ("prompt encoder", r"prompt_encoder"),
        ("upscaling", r"mask_decoder\.upscale"),
        ("mask head", r"mask_decoder\.output_hypernetworks_mlps\.0\."),
        ("pixel decoder", r"implicit_decoder\.pixel_decoder"),
        ("ellipse prior", r"implicit_decoder\.ellipse"),
        ("coarse field", r"implicit_decoder\.coarse"),
        ("fine field", r"implicit_decoder\.fine"),
        ("image encoder", r"vision_encoder"),
        # Without SAM's heads for three masks and their scores, which are not used.
        ("mask decoder", r"mask_decoder\.(?!output_hypernetworks_mlps|iou_prediction_head)"),
    ]

    def __init__(self, config: Any):
        super().__init__(config)
        self._adapter_values: dict[str, dict[str, Any]] = {}  # of the configuration, by the adapter's name
        self._configured_for: str | None = None  # the adapter whose values the configuration has

    def add_adapter(self, adapter_config: PeftConfig | None = None, adapter_name: str | None = None) -> None:
        """
        Puts a new adapter on the model: LoRA, and copies of the frequency branch, the prompt encoder, the upscaling
        convolutions and the implicit decoder. While it is disabled the model is SAM itself.

        Args:
            adapter_config: by default the one that the configuration describes.

        Raises:
            ValueError: a name with a dot, a model without LoRA, or an adapter that contradicts the configuration.
        """
        _refuse_dots(adapter_name)
        if self._lora_rank == 0:
            raise ValueError(
                "Expected lora_rank of at least 1 for an adapter, got 0: such a model is trained and saved whole."
            )
        others: list[Any] = list(self.peft_config.values()) if self._hf_peft_config_loaded else []
        adapter_config = adapter_config or get_peft_config(self.config)
        refuse_contradictions(adapter_config, self.config)
        with self._copying_decoder_of(self.config), _unsurprised():
            super().add_adapter(adapter_config, adapter_name)
        self._adapter_values[adapter_name or "default"] = _own_values(self.config)
        adapter_config.revision = self._base_revision
        for other in others[:1]:  # on the same SAM, also where this model is known by another name
            adapter_config.base_model_name_or_path = other.base_model_name_or_path
            adapter_config.revision = other.revision

    def load_adapter(
        self, peft_model_id: str | None = None, adapter_name: str | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """
        Loads a further adapter, which may have classes of its own; `set_adapter(adapter_name)` switches to it. A first
        one is active at once.

        Args:
            peft_model_id: Hub name or folder.
            kwargs: what says where it is there (`revision`, `subfolder`, `token`, ...), and what transformers'
                `load_adapter` takes.

        Raises:
            ValueError: an adapter of another configuration than that of those which are there, or none to switch from;
                one of which a file is missing, damaged or contradicts another; a name with a dot.
            OSError: there is no such folder.
        """
        _refuse_dots(adapter_name)
        if not self._hf_peft_config_loaded and self._lora_rank == 0:
            raise ValueError(
                f"Expected a model with LoRA to load {peft_model_id} into, got one without, or with LoRA merged into "
                "its weights: load it by itself with from_pretrained."
            )
        name = adapter_name or "default"
        others = list(self.peft_config) if self._hf_peft_config_loaded else []
        active = self.active_adapters()[0] if others else name
        other = self.config
        place = {**(kwargs.pop("adapter_kwargs", None) or {}), **only_finding(kwargs)}
        kwargs = {**{key: value for key, value in kwargs.items() if key not in place}, "adapter_kwargs": place}
        if peft_model_id is not None:
            if os.path.isdir(peft_model_id):
                peft_model_id = os.path.join(peft_model_id, place.pop("subfolder", ""))
            peft_model_id = str(peft_model_id)
            finding = only_finding(place)
            if not read_config(peft_model_id, **finding):
                raise ValueError(
                    f"Expected an adapter with its {CONFIG_NAME} at {peft_model_id}, got none: copy or download it "
                    "again."
                )
            other = self.config_class.from_pretrained(peft_model_id, **finding)
            read_adapter(peft_model_id, other, finding)
            for key in _SHARED_BY_ADAPTERS if others else ["base_model_sha256"]:
                if getattr(other, key) != getattr(self.config, key):
                    raise ValueError(
                        f"Expected an adapter with {key} {getattr(self.config, key)!r}, got {getattr(other, key)!r} "
                        f"at {peft_model_id}: load it by itself with from_pretrained."
                    )
        try:
            with refuse_damaged(str(peft_model_id)), self._copying_decoder_of(other), _unsurprised():
                info = super().load_adapter(peft_model_id, adapter_name, *args, **kwargs)
            # transformers counts other adapters' parameters as missing too.
            missing = [key for key in info.missing_and_mismatched() if _adapter_of(key) == name]
            if missing or info.unexpected_keys:
                raise ValueError(
                    f"Expected an adapter for this model's configuration, got one with missing {sorted(missing)} and "
                    f"unexpected {sorted(info.unexpected_keys)}: load it by itself with from_pretrained."
                )
        except Exception:
            if others and name not in others and name in self.peft_config:
                self.set_adapter(active)
                self.delete_adapter(name)
            raise
        self._adapter_values[name] = _own_values(other)
        self.set_adapter(active)
        return info

    def delete_adapter(self, adapter_names: list[str] | str) -> None:
        """
        Takes an adapter out of memory. If it was the active one, the first of the others becomes it.

        Raises:
            ValueError: no other would be left, which `disable_adapters` and `merge_and_unload` are for; or there is
                none.
        """
        if not self._hf_peft_config_loaded:
            raise ValueError(
                f"Expected a model with adapters to delete {adapter_names} of, got one without: load_adapter puts one "
                "on it."
            )
        gone = {adapter_names} if isinstance(adapter_names, str) else set(adapter_names)
        active, left = self.active_adapters()[0], [name for name in self.peft_config if name not in gone]
        if not left:
            raise ValueError(
                f"Expected an adapter to be left, got {', '.join(sorted(gone))} to delete, which are all: "
                "disable_adapters() gives SAM itself, merge_and_unload() a model without adapters."
            )
        self.set_adapter(active if active in left else left[0])
        super().delete_adapter(adapter_names)
        for name in gone:
            self._adapter_values.pop(name, None)

    def get_adapter_state_dict(
        self, adapter_name: str | None = None, state_dict: dict[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """The parameters of an adapter, by default of the active one."""
        # PEFT would ask the Hub whether the base's vocabulary was changed.
        return get_peft_model_state_dict(
            self, state_dict, adapter_name or self.active_adapters()[0], save_embedding_layers=False
        )

    def set_adapter(self, adapter_name: list[str] | str) -> None:
        """Makes another loaded adapter the active one, with its classes."""
        if self._configured_for in self._adapter_values:  # which may have been changed since
            self._adapter_values[self._configured_for] = _own_values(self.config)
        super().set_adapter(adapter_name)
        self._configured_for = self.active_adapters()[0]
        for key, value in self._adapter_values.get(self._configured_for, {}).items():
            setattr(self.config, key, deepcopy(value))
        classes: Any = self.config.id2label
        self.config.label2id = {name: index for index, name in classes.items()}
        wrapper: Any = getattr(self, "implicit_decoder", None)
        idle = getattr(wrapper, "original_module", None)
        if isinstance(idle, ImplicitDecoder) and idle.num_labels != len(classes):
            # What lies below the adapter, and is saved with the whole model, has its classes too.
            wrapper.original_module = ImplicitDecoder(self.config).to(self.device, self.dtype)
        self.set_trainable()

    def enable_adapters(self) -> None:
        """Takes back `disable_adapters`."""
        super().enable_adapters()
        # transformers enables the LoRA layers alone.
        for module in self.modules():
            if isinstance(module, ModulesToSaveWrapper):
                module.enable_adapters(enabled=True)
        self.set_trainable()

    def merge_and_unload(self) -> Self:
        """
        Merges LoRA into the encoder and keeps the active adapter's other parts, in place: the same function without
        PEFT. The configuration's `lora_rank` becomes 0. As in PEFT, a disabled adapter is merged all the same.
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
        self._adapter_values, self._configured_for = {}, None
        self._weight_conversions = None  # of the adapter's names, which transformers would undo on saving
        self.config.lora_rank, self.config.lora_targets = 0, []
        self.config.base_model_sha256, self.name_or_path = None, ""  # the encoder is no longer that SAM's
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

    @contextmanager
    def _copying_decoder_of(self, config: IMedSamConfig) -> Iterator[None]:
        """While an adapter is put on: PEFT copies the decoder that it finds, which is to have its classes."""
        wrapper: Any = getattr(self, "implicit_decoder", None)
        original = getattr(wrapper, "original_module", None)
        if not isinstance(original, ImplicitDecoder):
            yield
            return
        wrapper.original_module = ImplicitDecoder(config).to(self.device, self.dtype)
        try:
            yield
        finally:
            wrapper.original_module = original

    @property
    def _lora_rank(self) -> int:
        """0 of a model whose configuration knows no LoRA, too."""
        return getattr(self.config, "lora_rank", 0)

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
        parts: dict[str, list[nn.Parameter]] = {name: [] for name, _ in self.part_patterns}
        active = self.active_adapters()[0] if self._hf_peft_config_loaded else None
        for name, parameter in self.named_parameters():
            if "original_module" in name or _adapter_of(name) not in (None, active):
                continue
            name = _ADAPTER_NAME.sub("", name)
            part = next((part for part, pattern in self.part_patterns if re.match(pattern, name)), None)
            if part == "image encoder" and not self.config.train_image_encoder:
                continue
            if part == "mask decoder" and not self.config.trains_mask_decoder:
                continue
            if part == "mask head" and self.implicit_decoder is not None:
                continue
            if part is not None:
                parts[part].append(parameter)
        return parts


# What each adapter has for itself.
_ADAPTERS_OWN = ("id2label", "lora_rank", "lora_alpha", "lora_targets", "monte_carlo_samples")
_ADAPTER_NAME = re.compile(r"modules_to_save\.([^.]+)\.|(?<=lora_[AB])\.([^.]+)")
# What changes the function that an adapter's parameters stand for, and not always their shapes.
_SHARED_BY_ADAPTERS = (
    "base_model_sha256",
    "image_size",
    "frequency_view",
    "frequency_log",
    "implicit_decoder",
    "coordinate_octaves",
    "prompt_frame",
    "prompt_frame_octaves",
    "ellipse_prior",
    "pixel_decoder_width",
    "coarse_widths",
    "coarse_features",
    "fine_widths",
    "fine_head_width",
    "frequency_hidden",
    "train_mask_decoder",
    "dropout",
    "uncertainty",
    "selection",
    "selection_share",
    "selection_lattice",
)


@contextmanager
def _unsurprised() -> Iterator[None]:
    """
    Without what PEFT and transformers say of a further adapter: that there is one already, whose weights are not
    in its file. What is missing is refused in `load_adapter`.
    """
    logger = logging.get_logger("transformers.integrations.peft")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config` attribute")
            yield
    finally:
        logger.setLevel(level)


def _refuse_dots(adapter_name: str | None) -> None:
    if "." in (adapter_name or ""):
        raise ValueError(
            "Expected an adapter's name without dots, as it becomes a part of its parameters' names, got "
            f"{adapter_name!r}: write {str(adapter_name).replace('.', '_')!r}."
        )


def _own_values(config: IMedSamConfig) -> dict[str, Any]:
    return {key: deepcopy(getattr(config, key)) for key in _ADAPTERS_OWN}


def _adapter_of(name: str) -> str | None:
    """The adapter that a parameter belongs to, if it does to any."""
    match = _ADAPTER_NAME.search(name)
    return match and (match[1] or match[2])

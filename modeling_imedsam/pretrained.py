"""Loading, saving and adapters: which weights a model has, where they come from, and which of them are trained."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from huggingface_hub import save_torch_state_dict
from peft import PeftConfig, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import SamModel
from transformers import initialization as init
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.sam.modeling_sam import SamPreTrainedModel
from transformers.utils import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_SAFE_WEIGHTS_NAME,
    CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    cached_file,
    find_adapter_config_file,
    logging,
)

from imedsam.configuration.configuration_imedsam import CONFIGURATION_KEYS, IMedSamConfig
from imedsam.frequency import FrequencyBranch
from imedsam.image_encoder import resize_positions
from imedsam.implicit_decoder import ClassLinear, EllipsePrior, HiddenLinear, ImplicitDecoder
from imedsam.lora import fuse_qkv, get_peft_config, split_qkv
from imedsam.pixel_decoder import HiddenConvolution
from imedsam.sam_checkpoints import FINDING_KEYS, SamCheckpoint, load_sam, only_finding, refuse_damaged

if TYPE_CHECKING:
    from typing_extensions import Self


class IMedSamPreTrainedModel(SamPreTrainedModel):
    """What every I-MedSAM model can do with its weights. An adapter is a PEFT checkpoint, see `imedsam.lora`."""

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
        self._adapter_classes: dict[str, Any] = {}  # `id2label` by the name of the adapter

    @classmethod
    def from_sam_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, image_size: int = 384, **kwargs: Any
    ) -> Self:
        """
        Starts from a checkpoint of the SAM family, with the adapter that the configuration asks for.

        Args:
            pretrained_model_name_or_path: Hub name or folder of a `SamModel` (`facebook/sam-vit-base`), or the
                original file of SAM, MedSAM, SAM-Med2D or EfficientSAM (`sam_vit_b_01ec64.pth`).
            image_size: side of the model's square; positions are resized to it.
            kwargs: values of [`IMedSamConfig`]; `dtype`, `attn_implementation` and what `from_pretrained` takes to
                find files (`revision`, `token`, `cache_dir`, `local_files_only`, ...).
        """
        loading = {key: kwargs.pop(key) for key in list(kwargs) if key in _LOADING_KEYS}
        sam = load_sam(pretrained_model_name_or_path, **only_finding(loading))
        sam_config = sam.config.to_dict()
        sam_config["vision_config"]["image_size"] = sam_config["prompt_encoder_config"]["image_size"] = image_size
        sam_config["prompt_encoder_config"].pop("image_embedding_size", None)
        sam_config.pop("_name_or_path", None)  # a folder of this machine, which others need not know
        config = cls.config_class(sam_config=sam_config, **kwargs)
        model = cls._on_sam(sam, config, loading.get("dtype"), loading.get("attn_implementation"))
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
    ) -> Self:
        """
        Loads what `save_pretrained` wrote, or an adapter from `save_adapter` together with the SAM it names.

        Args:
            pretrained_model_name_or_path: Hub name or folder.
            base_model_name_or_path: where an adapter's SAM is, if not where the adapter says.
            kwargs: values of [`IMedSamConfig`] to change, and what transformers' `from_pretrained` takes.
        """
        if kwargs.get("output_loading_info"):
            raise ValueError("Expected no output_loading_info, got it: the model alone is returned.")
        path = str(pretrained_model_name_or_path)
        if os.path.isdir(path):  # where not every release of transformers looks into the subfolder for an adapter
            path = os.path.join(path, kwargs.pop("subfolder", ""))
        finding = only_finding(kwargs)
        has_adapter = find_adapter_config_file(path, **finding) is not None
        if has_adapter and (fixed := [key for key in ("lora_rank", "lora_alpha", "lora_targets") if key in kwargs]):
            raise ValueError(
                f"Expected the LoRA of the adapter at {path}, got values for {', '.join(fixed)}: leave them out, or "
                "begin anew with from_sam_pretrained."
            )
        if not has_adapter or "config" not in kwargs:
            _refuse_other_checkpoint(path, cls.config_class.model_type, finding)
        with refuse_damaged(path):
            if not has_adapter:
                model = super().from_pretrained(path, *args, **kwargs)
            elif (folder := _folder_of_whole_model(path, finding)) is not None:
                located = {key: value for key, value in kwargs.items() if key not in _PLACE_KEYS}
                model = super().from_pretrained(folder, *args, **located)
            else:
                model = cls._from_adapter(path, base_model_name_or_path, finding, **kwargs)
        model.set_trainable()
        return model.eval()

    @classmethod
    def _from_adapter(cls, path: str, base: str | os.PathLike | None, finding: dict[str, Any], **kwargs: Any) -> Self:
        """An adapter alone, on its SAM."""
        values = {key: kwargs.pop(key) for key in list(kwargs) if key in CONFIGURATION_KEYS}
        if values and "config" in kwargs:
            raise ValueError(f"Expected config or values for it, got both: put {', '.join(values)} into the config.")
        config = kwargs.pop("config", None) or cls.config_class.from_pretrained(path, **finding, **values)
        dtype = kwargs.pop("torch_dtype", None) or kwargs.pop("dtype", "auto")
        loading = {key: value for key, value in kwargs.items() if key not in _PLACE_KEYS}
        sam = _load_base(path, base, finding, loading)
        model = cls._on_sam(sam, config, dtype, kwargs.get("attn_implementation"))
        model.load_adapter(path, adapter_kwargs=finding)
        return model

    @classmethod
    def _on_sam(
        cls,
        sam: SamCheckpoint,
        config: IMedSamConfig,
        dtype: str | torch.dtype | None = None,
        attn_implementation: str | None = None,
    ) -> Self:
        """The base of a configuration, with SAM's weights and no adapter."""
        sha256 = sam.sha256()
        if config.base_model_sha256 not in (None, sha256):
            raise ValueError(
                f"Expected the SAM that the adapter was trained on, whose weights have the SHA-256 "
                f"{config.base_model_sha256}, got {sam.name} with {sha256}: give the place of the right one as "
                "base_model_name_or_path."
            )
        if "mask_decoder." in sam.without and config.implicit_decoder and not config.train_mask_decoder:
            raise ValueError(
                f"Expected train_mask_decoder=True to start from {sam.name}, which has no mask decoder that fits, "
                "got False: its two-way transformer starts at random."
            )
        config.base_model_sha256 = sha256
        if attn_implementation is not None:
            config._attn_implementation = attn_implementation
        model = cls(config)
        state_dict = split_qkv(resize_positions(sam.state_dict, config.sam_config.vision_config))
        missing, unexpected = model.load_state_dict(state_dict, strict=False)
        new = ("frequency_branch.", "implicit_decoder.", *sam.without)
        if (missing := [key for key in missing if not key.startswith(new)]) or unexpected:
            raise ValueError(
                f"Expected SAM's weights at {sam.name}, got missing {missing} and unexpected {unexpected}."
            )
        model.name_or_path, model._base_revision = sam.name, sam.revision
        if isinstance(dtype, str):
            dtype = config.dtype if dtype == "auto" else getattr(torch, dtype)
        return model if dtype is None else nn.Module.to(model, dtype)

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
        self._save_adapter(save_directory)
        save_torch_state_dict(self._base_state_dict(), str(save_directory))

    def save_adapter(self, save_directory: str | os.PathLike) -> None:
        """
        Writes the active adapter alone, a few MB that name the SAM they belong to: a PEFT checkpoint
        (`adapter_config.json`, `adapter_model.safetensors`) and `config.json`. Load it with
        `IMedSamModel.from_pretrained`; `AutoModel` would take the SAM that it names. The processor is saved apart.
        """
        if not self._hf_peft_config_loaded:
            raise ValueError(
                "Expected a model with an adapter, got one without: use save_pretrained (lora_rank is 0)."
            )
        for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME):
            if Path(save_directory, name).exists():
                raise ValueError(
                    f"Expected a folder for the adapter alone, got one with a whole model, {save_directory}: loading "
                    "would put the adapter on that. Choose another folder, or use save_pretrained."
                )
        self._save_adapter(save_directory)

    def _save_adapter(self, save_directory: str | os.PathLike) -> None:
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
        others: list[Any] = list(self.peft_config.values()) if self._hf_peft_config_loaded else []
        adapter_config = adapter_config or get_peft_config(self.config)
        with self._copying_decoder_of(self.config), _unsurprised():
            super().add_adapter(adapter_config, adapter_name)
        self._adapter_classes[adapter_name or "default"] = self.config.id2label
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

        Raises:
            ValueError: an adapter of another configuration than that of those which are there, or none to switch from.
        """
        if not self._hf_peft_config_loaded and self.config.lora_rank == 0:
            raise ValueError(
                f"Expected a model with LoRA to load {peft_model_id} into, got one without, or with LoRA merged into "
                "its weights: load it by itself with from_pretrained."
            )
        other, active = self.config, adapter_name or "default"
        if self._hf_peft_config_loaded:
            active = self.active_adapters()[0]
        if peft_model_id is not None and self._hf_peft_config_loaded:
            finding = only_finding(kwargs.get("adapter_kwargs") or {})
            other = self.config_class.from_pretrained(peft_model_id, **finding)
            for key in _SHARED_BY_ADAPTERS:
                if getattr(other, key) != getattr(self.config, key):
                    raise ValueError(
                        f"Expected an adapter with {key} {getattr(self.config, key)!r}, got {getattr(other, key)!r} "
                        f"at {peft_model_id}: load it by itself with from_pretrained."
                    )
        with self._copying_decoder_of(other), _unsurprised():
            info = super().load_adapter(peft_model_id, adapter_name, *args, **kwargs)
        # transformers counts other adapters' parameters as missing too.
        missing = [key for key in info.missing_and_mismatched() if _adapter_of(key) == (adapter_name or "default")]
        if missing or info.unexpected_keys:
            if active != (adapter_name or "default"):
                self.set_adapter(active)
                self.delete_adapter(adapter_name or "default")
            raise ValueError(
                f"Expected an adapter for this model's configuration, got one with missing {sorted(missing)} and "
                f"unexpected {sorted(info.unexpected_keys)}: load it by itself with from_pretrained."
            )
        self._adapter_classes[adapter_name or "default"] = other.id2label
        self.set_adapter(active)
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
        """Makes another loaded adapter the active one, with its classes."""
        super().set_adapter(adapter_name)
        classes: Any = self._adapter_classes.get(self.active_adapters()[0], self.config.id2label)
        self.config.id2label = dict(classes)
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
        self.config.base_model_sha256, self.name_or_path = None, ""  # the encoder is no longer that SAM's
        self.set_trainable()
        return self

    def to_sam(self) -> SamModel:
        """
        A stock `SamModel` with the encoder as it was trained, LoRA merged, and the prompt encoder and the parts of
        SAM's mask decoder that came with it, on a copy: for what is built on SAM. The fields are no part of a SAM.

        Raises:
            ValueError: with a frequency branch, whose part depends on the image, or with what SAM's decoder is not.
        """
        if self.config.frequency_view is not None and not self._adapter_disabled:
            raise ValueError(
                f"Expected a model without a frequency branch, got frequency_view={self.config.frequency_view!r}, "
                "whose part of the encoder no SamModel has: train with frequency_view=None, or disable_adapters() for "
                "the SAM that it started from."
            )
        if self._adapter_disabled:
            state_dict = self._base_state_dict()
        else:
            merged: nn.Module = deepcopy(self).float().merge_and_unload()  # LoRA would drown in half precision
            state_dict = merged.state_dict()
        own = ("frequency_branch.", "implicit_decoder.")
        state_dict = fuse_qkv({key: value for key, value in state_dict.items() if not key.startswith(own)})
        sam_config = deepcopy(self.config.sam_config)
        sam: nn.Module = SamCheckpoint(str(self.name_or_path), sam_config, state_dict).to_model()
        return cast(SamModel, sam.to(self.device, self.dtype))

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
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ClassLinear | EllipsePrior):
            module.reset_parameters()
        elif isinstance(module, HiddenLinear | HiddenConvolution):
            init.kaiming_normal_(module.weight, nonlinearity="relu")
        elif isinstance(module, FrequencyBranch):
            init.zeros_(module.gates)

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
            if part == "mask decoder" and self.config.implicit_decoder and not self.config.train_mask_decoder:
                continue
            if part == "mask head" and self.config.implicit_decoder:
                continue
            if part is not None:
                parts[part].append(parameter)
        return parts


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
_LOADING_KEYS = FINDING_KEYS | {"dtype", "attn_implementation"}
# Where in the Hub an adapter is, which says nothing about its base.
_PLACE_KEYS = {"revision", "subfolder"}


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


def _adapter_of(name: str) -> str | None:
    """The adapter that a parameter belongs to, if it does to any."""
    match = _ADAPTER_NAME.search(name)
    return match and (match[1] or match[2])


def _load_base(
    path: str, given: str | os.PathLike | None, finding: dict[str, Any], loading: dict[str, Any]
) -> SamCheckpoint:
    """The SAM that the adapter at `path` names, or the one that is given."""
    adapter = PeftConfig.from_pretrained(path, **finding)
    base = str(given or adapter.base_model_name_or_path or "")
    if not base:
        raise ValueError(
            f"Expected the adapter at {path} to name the SAM that it belongs to, got no name: "
            "give base_model_name_or_path."
        )
    try:
        return load_sam(base, **loading, revision=None if given else adapter.revision)
    except OSError as error:
        raise OSError(
            f"Expected {base}, the SAM of the adapter at {path}, as a folder or file, in the cache or on the Hub, "
            f"got none: give its place as base_model_name_or_path. ({error})"
        ) from error


def _folder_of_whole_model(path: str, finding: dict[str, Any]) -> str | None:
    """The local folder of a checkpoint that holds a whole model beside its adapter; None for an adapter alone."""
    names = [CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_NAME]
    files = [cached_file(path, name, _raise_exceptions_for_missing_entries=False, **finding) for name in names]
    return None if files[-1] is None else os.path.dirname(files[-1])


def _refuse_other_checkpoint(path: str, expected: str, finding: dict[str, Any]) -> None:
    model_type = PreTrainedConfig.get_config_dict(path, **finding)[0].get("model_type")
    if model_type == expected:
        return
    if str(model_type).startswith(IMedSamConfig.model_type):
        raise ValueError(
            f"Expected a checkpoint of type {expected!r} at {path}, got one of type {model_type!r}: "
            "imedsam.training.baselines.load_model takes what it finds."
        )
    raise ValueError(
        f"Expected an I-MedSAM checkpoint at {path}, got one of type {model_type!r}: "
        "start from a SAM with IMedSamModel.from_sam_pretrained."
    )

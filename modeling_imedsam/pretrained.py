"""Where a model's weights come from, and go to: SAM's checkpoints, its own, and adapters by themselves."""

from __future__ import annotations

import os
import re
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, cast

import torch
from huggingface_hub import HfApi, save_torch_state_dict
from peft import PeftConfig
from torch import nn
from transformers import SamModel
from transformers import initialization as init
from transformers.configuration_utils import PreTrainedConfig
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
from transformers.utils.hub import get_checkpoint_shard_files

from imedsam.adapters import AdaptedSam
from imedsam.bottleneck import ZeroLinear
from imedsam.configuration.configuration_imedsam import IMedSamConfig
from imedsam.configuration.configuration_sam_i2i import SamI2IConfig
from imedsam.frequency import FrequencyBranch
from imedsam.hub_errors import check_token, explain_hub_errors
from imedsam.image_encoder import resize_positions
from imedsam.implicit_decoder import ClassLinear, EllipsePrior, HiddenLinear
from imedsam.lora import fuse_qkv, read_adapter, split_qkv
from imedsam.pixel_decoder import HiddenConvolution
from imedsam.sam_checkpoints import FINDING_KEYS, SamCheckpoint, load_sam, only_finding, refuse_damaged, refuse_nowhere

if TYPE_CHECKING:
    from typing_extensions import Self

logger = logging.get_logger(__name__)


class IMedSamPreTrainedModel(AdaptedSam):
    """What every I-MedSAM model can do with its weights."""

    own_parts = r"(frequency_branch|implicit_decoder)\."  # names of the parameters that no SAM has

    @classmethod
    def from_sam_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, image_size: int | None = None, **kwargs: Any
    ) -> Self:
        """
        Starts from a checkpoint of the SAM family, with the adapter that the configuration asks for.

        Args:
            pretrained_model_name_or_path: Hub name or folder of a `SamModel` (`facebook/sam-vit-base`), or the
                original file of SAM, MedSAM, SAM-Med2D or EfficientSAM (`sam_vit_b_01ec64.pth`).
            image_size: side of the model's square, by default the configuration's `default_image_size` (384 for
                I-MedSAM); positions are resized to it.
            kwargs: values of the configuration ([`IMedSamConfig`]); `dtype`, `attn_implementation` and what
                `from_pretrained` takes to find files (`revision`, `token`, `cache_dir`, `local_files_only`, ...).
        """
        loading = {key: kwargs.pop(key) for key in list(kwargs) if key in _LOADING_KEYS}
        sam = load_sam(pretrained_model_name_or_path, **only_finding(loading))
        config = cls.config_class.on_sam(sam.config, image_size, **kwargs)
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
        if kwargs.pop("output_loading_info", False):
            raise ValueError("Expected no output_loading_info, got it: the model alone is returned.")
        path = str(pretrained_model_name_or_path)
        if os.path.isdir(path):  # where not every release of transformers looks into the subfolder for an adapter
            path = os.path.join(path, kwargs.pop("subfolder", ""))
        refuse_nowhere(path)
        finding = only_finding(kwargs)
        has_adapter = find_adapter_config_file(path, **finding) is not None
        if has_adapter and (fixed := [key for key in ("lora_rank", "lora_alpha", "lora_targets") if key in kwargs]):
            raise ValueError(
                f"Expected the LoRA of the adapter at {path}, got values for {', '.join(fixed)}: leave them out, or "
                "begin anew with from_sam_pretrained."
            )
        if not has_adapter or "config" not in kwargs:
            _refuse_other_checkpoint(path, cls.config_class.model_type, finding)
        if has_adapter:
            read_adapter(path, cls.config_class.from_pretrained(path, **finding), finding)
        folder = _folder_of_whole_model(path, finding) if has_adapter else path
        if folder is not None and base_model_name_or_path is not None:
            raise ValueError(
                f"Expected no base_model_name_or_path with {path}, got {base_model_name_or_path}: it is a whole model."
            )
        with refuse_damaged(path):
            if folder is None:
                model = cls._from_adapter(path, base_model_name_or_path, finding, **kwargs)
            else:
                if has_adapter:
                    kwargs = {key: value for key, value in kwargs.items() if key not in _PLACE_KEYS}
                else:
                    _refuse_lone_weights(path, finding)
                    if "lora_rank" not in kwargs:
                        _refuse_lost_adapter(path, cls.config_class.from_pretrained(path, **finding))
                # Declared to return the model alone.
                loaded: Any = super().from_pretrained(folder, *args, output_loading_info=True, **kwargs)
                model, found = loaded
                if missing := sorted(found["missing_keys"]):  # which transformers filled at random
                    raise ValueError(
                        f"Expected a whole model at {path}, got one without {', '.join(missing[:4])}"
                        f"{f' and {len(missing) - 4} more' if len(missing) > 4 else ''}: copy or download it again, "
                        "with the config.json that belongs to it, and change no value that adds parts."
                    )
        if has_adapter:  # whose own values were taken
            for key in {"id2label", "monte_carlo_samples"} & kwargs.keys():
                setattr(model.config, key, kwargs[key])
            model.set_adapter(model.active_adapters()[0])
        model.set_trainable()
        return model.eval()

    @classmethod
    def _from_adapter(cls, path: str, base: str | os.PathLike | None, finding: dict[str, Any], **kwargs: Any) -> Self:
        """An adapter alone, on its SAM."""
        values = {key: kwargs.pop(key) for key in list(kwargs) if key in cls.config_class.configuration_keys()}
        if values and "config" in kwargs:
            raise ValueError(f"Expected config or values for it, got both: put {', '.join(values)} into the config.")
        stored = cls.config_class.from_pretrained(path, **finding, **values)
        if stored.base_model_sha256 is None:
            raise ValueError(
                f"Expected the adapter at {path} to know the weights of its SAM, got no base_model_sha256 in its "
                f"{CONFIG_NAME}: copy or download it again."
            )
        config = kwargs.pop("config", None) or stored
        dtype = kwargs.pop("torch_dtype", None) or kwargs.pop("dtype", "auto")
        device = _single_device(kwargs.pop("device_map", None))
        loading = {key: value for key, value in kwargs.items() if key not in _PLACE_KEYS}
        sam = _load_base(path, base, finding, loading)
        model = cls._on_sam(sam, config, dtype, kwargs.get("attn_implementation"))
        model.load_adapter(path, adapter_kwargs=finding)
        return nn.Module.to(model, device)

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
        if "mask_decoder." in sam.without and not config.trains_mask_decoder:
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
        missing = [key for key in missing if not key.startswith(sam.without) and not re.match(cls.own_parts, key)]
        if missing or unexpected:
            raise ValueError(
                f"Expected SAM's weights at {sam.name}, got missing {missing} and unexpected {unexpected}."
            )
        model.name_or_path, model._base_revision = sam.name, sam.revision
        if isinstance(dtype, str):
            dtype = config.dtype if dtype == "auto" else _dtype_of(dtype)
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
        them (a complete model with an embedded adapter, as transformers calls it). Weights that lie in the folder from
        before are removed, and without an adapter an adapter too: they would be loaded instead, or on top.
        """
        if push_to_hub:
            raise ValueError("Expected a folder to write, got push_to_hub=True: use model.push_to_hub(repo_id).")
        if not self._hf_peft_config_loaded:
            stale = (ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)
            for name in stale if is_main_process else ():
                Path(save_directory, name).unlink(missing_ok=True)
            return super().save_pretrained(save_directory, is_main_process, **kwargs)
        shards = {key: kwargs.pop(key) for key in ("max_shard_size",) if key in kwargs}
        if kwargs:
            raise ValueError(
                f"Expected no {', '.join(kwargs)} for a model with an adapter, got values: merge_and_unload() first."
            )
        if not is_main_process:
            return
        self._save_adapter(save_directory)
        save_torch_state_dict(self._base_state_dict(), str(save_directory), **shards)

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
        if self.config.base_model_sha256 is None:
            raise ValueError(
                "Expected an adapter on a SAM, got one on weights that are no SAM's, such as with LoRA merged into "
                "them: use save_pretrained, or write to_sam() and begin anew on that."
            )
        for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME):
            if Path(save_directory, name).exists():
                raise ValueError(
                    f"Expected a folder for the adapter alone, got one with a whole model, {save_directory}: loading "
                    "would put the adapter on that. Choose another folder, or use save_pretrained."
                )
        self._save_adapter(save_directory)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:  # type: ignore[override]  # wrapped there
        """
        Sends the whole model to the Hub, in one commit, with what transformers' `push_to_hub` takes. The adapter and
        the weights that were there give way to it; all else stays, such as a card and metrics.

        Raises:
            ValueError: a model with an adapter, which Auto classes would look for beside the SAM that it names.
        """
        if self._hf_peft_config_loaded:
            raise ValueError(
                "Expected a model without an adapter, which any Auto class loads, got one with: merge_and_unload() "
                "first, send the adapter alone with push_adapter_to_hub(), or use `imedsam publish`, which merges."
            )
        push: Any = super().push_to_hub
        return push(repo_id, **kwargs)

    # What transformers' push_to_hub ends with, where nothing is deleted.
    def _upload_modified_files(  # type: ignore[override]  # called by names alone
        self, working_dir: str, repo_id: str, files_timestamps: dict[str, float], *, commit_message: Any, **place: Any
    ) -> str:
        api, revision = HfApi(token=place.pop("token")), place["revision"]
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=working_dir,
            commit_message=commit_message or "Upload model",
            delete_patterns=[ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME, *_WHOLE_WEIGHTS],
            **place,
        )

    def push_adapter_to_hub(
        self, repo_id: str, *, private: bool | None = None, revision: str | None = None, token: str | None = None
    ) -> str:
        """
        Sends the active adapter alone to the Hub, in one commit, as `push_to_hub` does a whole model. The weights of a
        whole model that was there give way to it; all else stays, such as a card and metrics. `imedsam publish
        --adapter` sends those and the processor too, and with `--update` nothing stays.

        Args:
            repo_id: user/name; made if it is not there.
            private: whether a new repository is private.
            revision: a branch; the main one by default.

        Returns:
            The address of the commit.

        Raises:
            ValueError: an adapter on a SAM that is not from the Hub, where others could not find it; or no token.
            OSError: the Hub cannot be reached, or does not take it.
        """
        adapter: Any = self.peft_config[self.active_adapters()[0]] if self._hf_peft_config_loaded else None
        if adapter is not None and adapter.revision is None:
            raise ValueError(
                f"Expected an adapter on a SAM from the Hub, got one on {self.name_or_path}: "
                "`imedsam publish --adapter --base-model user/name` says where it is there."
            )
        check_token(token)
        api = HfApi(token=token)
        with TemporaryDirectory() as folder:
            self.save_adapter(folder)
            with explain_hub_errors(repo_id):
                repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
                if revision is not None:
                    api.create_branch(repo_id, branch=revision, exist_ok=True)
                commit = api.upload_folder(
                    repo_id=repo_id,
                    folder_path=folder,
                    revision=revision,
                    commit_message="Upload adapter",
                    # Of a whole model from before, which would be loaded.
                    delete_patterns=_WHOLE_WEIGHTS,
                )
        return commit.commit_url

    def _save_adapter(self, save_directory: str | os.PathLike) -> None:
        self.config.architectures = [type(self).__name__]
        self.config.dtype = self.dtype
        self.config.save_pretrained(save_directory)
        super().save_pretrained(save_directory)

    def to_sam(self) -> SamModel:
        """
        A stock `SamModel` with the encoder as it was trained, LoRA merged, and the prompt encoder and the parts of
        SAM's mask decoder that came with it, on a copy: for what is built on SAM. The fields are no part of a SAM.
        Merged it is in float32 at least, as a small update of LoRA's would drown in half precision.

        Raises:
            ValueError: with a frequency branch, whose part depends on the image, or with what SAM's decoder is not.
        """
        if self.config.frequency_view is not None and not self._adapter_disabled:
            raise ValueError(
                f"Expected a model without a frequency branch, got frequency_view={self.config.frequency_view!r}, "
                "whose part of the encoder no SamModel has: train with frequency_view=None, or disable_adapters() for "
                "the SAM that it started from."
            )
        dtype = self.dtype
        if self._adapter_disabled:
            state_dict = self._base_state_dict()
        else:
            if self._hf_peft_config_loaded:
                dtype = torch.promote_types(dtype, torch.float32)
            merged: Any = nn.Module.to(deepcopy(self), dtype)
            state_dict = merged.merge_and_unload().state_dict()
        state_dict = fuse_qkv({key: v for key, v in state_dict.items() if not re.match(self.own_parts, key)})
        sam_config = deepcopy(self.config.sam_config)
        sam: nn.Module = SamCheckpoint(str(self.name_or_path), sam_config, state_dict).to_model()
        return cast(SamModel, sam.to(self.device, dtype))

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ClassLinear | EllipsePrior):
            module.reset_parameters()
        elif isinstance(module, HiddenLinear | HiddenConvolution):
            init.kaiming_normal_(module.weight, nonlinearity="relu")
        elif isinstance(module, ZeroLinear):
            init.zeros_(module.weight)
        elif isinstance(module, FrequencyBranch):
            init.zeros_(module.gates)


_LOADING_KEYS = FINDING_KEYS | {"dtype", "attn_implementation"}
_WHOLE_WEIGHTS = ["model*.safetensors", SAFE_WEIGHTS_INDEX_NAME]
# Where in the Hub an adapter is, which says nothing about its base.
_PLACE_KEYS = {"revision", "subfolder"}


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
            f"got none: give its place as base_model_name_or_path (--base-model). ({error})"
        ) from error


def _dtype_of(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f'Expected dtype as one of torch, such as "float32" or "bfloat16", got {name!r}.')
    return dtype


def _single_device(device_map: Any) -> torch.device | None:
    """The device of a `device_map` as transformers takes it; "auto" is the accelerator, if there is one."""
    if isinstance(device_map, dict):
        devices = set(device_map.values())
        device_map = devices.pop() if len(devices) == 1 else device_map
    if device_map == "auto":
        device_map = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    try:
        return None if device_map is None else torch.device(device_map)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f'Expected a device_map of one device, such as "cuda", for an adapter, got {device_map!r}.'
        ) from error


def _folder_of_whole_model(path: str, finding: dict[str, Any]) -> str | None:
    """The local folder of a checkpoint that holds a whole model beside its adapter; None for an adapter alone."""
    names = [CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME]
    files = [cached_file(path, name, _raise_exceptions_for_missing_entries=False, **finding) for name in names]
    single, index = files[2:]
    if single is None and index is not None and not os.path.isdir(path):
        get_checkpoint_shard_files(path, index, **finding)  # beside it
    found = single or index
    return None if found is None else os.path.dirname(found)


def _refuse_lone_weights(path: str, finding: dict[str, Any]) -> None:
    """An adapter's weights without its configuration would be left out without a word."""
    if cached_file(path, ADAPTER_SAFE_WEIGHTS_NAME, _raise_exceptions_for_missing_entries=False, **finding):
        raise ValueError(
            f"Expected {ADAPTER_CONFIG_NAME} beside {ADAPTER_SAFE_WEIGHTS_NAME} at {path}, got none: copy or download "
            "it again."
        )


def _refuse_lost_adapter(path: str, config: IMedSamConfig) -> None:
    """A whole model of which the adapter's two files were left out is an untrained one."""
    if getattr(config, "lora_rank", 0) == 0:  # which a U-Net has not at all
        return
    if config.base_model_sha256 is not None:  # on a SAM LoRA is never without its adapter
        raise ValueError(
            f"Expected {ADAPTER_CONFIG_NAME} and {ADAPTER_SAFE_WEIGHTS_NAME} at {path}, whose config.json says "
            f"lora_rank={config.lora_rank}, got neither: copy or download it again, or give lora_rank=0 and "
            "lora_targets=[] for what it was before it was trained."
        )
    logger.warning(
        f"No adapter at {path}, whose config.json says lora_rank={config.lora_rank}: LoRA would start anew."
    )


def _refuse_other_checkpoint(path: str, expected: str, finding: dict[str, Any]) -> None:
    model_type = PreTrainedConfig.get_config_dict(path, **finding)[0].get("model_type")
    if model_type == expected:
        return
    if model_type is None:
        raise ValueError(
            f"Expected an I-MedSAM checkpoint at {path}, got no {CONFIG_NAME}: check the path, or copy or download it "
            "again."
        )
    if str(model_type).startswith((IMedSamConfig.model_type, "sf_recsam")):
        raise ValueError(
            f"Expected a checkpoint of type {expected!r} at {path}, got one of type {model_type!r}: "
            "imedsam.training.baselines.load_model takes what it finds."
        )
    if model_type == SamI2IConfig.model_type:
        raise ValueError(
            f"Expected a model that segments at {path}, got a SAM-I2I, which translates: use `imedsam translate`, or "
            "SamI2IModel.from_pretrained."
        )
    raise ValueError(
        f"Expected an I-MedSAM checkpoint at {path}, got one of type {model_type!r}: "
        "start from a SAM with IMedSamModel.from_sam_pretrained."
    )

"""What the folder or Hub repository of a model from here holds, and whether it is all of it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from transformers.utils import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_SAFE_WEIGHTS_NAME,
    CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    cached_file,
    logging,
)
from transformers.utils.hub import get_checkpoint_shard_files

from imedsam.configuration.configuration_sam_i2i import SamI2IConfig
from imedsam.sam_checkpoints import read_config

if TYPE_CHECKING:
    from imedsam.adapters import AdaptedSam

logger = logging.get_logger(__name__)


def folder_of_whole_model(path: str, finding: dict[str, Any]) -> str | None:
    """The local folder of a checkpoint that holds a whole model beside its adapter; None for an adapter alone."""
    names = [CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME]
    files = [cached_file(path, name, _raise_exceptions_for_missing_entries=False, **finding) for name in names]
    single, index = files[2:]
    if single is None and index is not None and not os.path.isdir(path):
        get_checkpoint_shard_files(path, index, **finding)  # beside it
    found = single or index
    return None if found is None else os.path.dirname(found)


def refuse_lone_weights(path: str, finding: dict[str, Any]) -> None:
    """An adapter's weights without its configuration would be left out without a word."""
    if cached_file(path, ADAPTER_SAFE_WEIGHTS_NAME, _raise_exceptions_for_missing_entries=False, **finding):
        raise ValueError(
            f"Expected {ADAPTER_CONFIG_NAME} beside {ADAPTER_SAFE_WEIGHTS_NAME} at {path}, got none: copy or download "
            "it again."
        )


def refuse_lost_adapter(path: str, config: Any) -> None:
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


def refuse_other_checkpoint(path: str, model_class: type[AdaptedSam], finding: dict[str, Any]) -> None:
    """A checkpoint of another type than the class's would be filled at random, where names agree at all."""
    expected, name = model_class.config_class.model_type, model_class.__name__
    model_type = read_config(path, **finding).get("model_type")
    if model_type == expected:
        return
    if model_type is None:
        raise ValueError(
            f"Expected a checkpoint of {name} at {path}, got no {CONFIG_NAME}: check the path, or copy or download it "
            "again."
        )
    way_out = "imedsam.training.baselines.load_model takes any of imedsam's"
    if model_type == SamI2IConfig.model_type:
        way_out = "a SAM-I2I translates, with `imedsam translate` or SamI2IModel.from_pretrained"
    elif model_type == "sam":
        way_out = f"start from a SAM with {name}.from_sam_pretrained"
    raise ValueError(
        f"Expected a checkpoint of type {expected!r} at {path}, got one of type {model_type!r}: {way_out}."
    )

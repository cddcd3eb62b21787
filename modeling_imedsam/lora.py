"""LoRA on single projections of SAM's fused attention, and the layout of an I-MedSAM adapter."""

import json
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftConfig, PeftType
from torch import Tensor, nn
from transformers.utils import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_SAFE_WEIGHTS_NAME,
    CONFIG_NAME,
    cached_file,
    find_adapter_config_file,
)

from imedsam.configuration.configuration_imedsam import IMedSamConfig

PROJECTIONS = ("q_proj", "k_proj", "v_proj")


class SplitProjection(nn.Module):
    """SAM's fused `qkv` linear as three, so that PEFT can adapt one without the others: (..., C) -> (..., 3 C)."""

    def __init__(self, width: int, bias: bool):
        super().__init__()
        for name in PROJECTIONS:
            self.add_module(name, nn.Linear(width, width, bias=bias))

    def forward(self, hidden_states: Tensor) -> Tensor:
        layers = [getattr(self, name) for name in PROJECTIONS]
        if any(type(layer) is not nn.Linear for layer in layers):
            return torch.cat([layer(hidden_states) for layer in layers], dim=-1)
        # Without LoRA in one product: at 1024 pixels the weights are a tenth of what it gives.
        bias = None if layers[0].bias is None else torch.cat([layer.bias for layer in layers])
        return F.linear(hidden_states, torch.cat([layer.weight for layer in layers]), bias)


def split_qkv(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Renames a `SamModel`'s `attn.qkv.*` to `attn.qkv.{q,k,v}_proj.*`, a third each; the rest is passed on."""
    split = {}
    for key, value in state_dict.items():
        if ".attn.qkv." in key:
            for name, part in zip(PROJECTIONS, value.chunk(3), strict=True):
                split[key.replace(".qkv.", f".qkv.{name}.")] = part.clone()
        else:
            split[key] = value
    return split


def fuse_qkv(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The way back from `split_qkv`."""
    fused = {}
    for key, value in state_dict.items():
        if ".attn.qkv.q_proj." in key:
            parts = [state_dict[key.replace("q_proj", name)] for name in PROJECTIONS]
            fused[key.replace("q_proj.", "")] = torch.cat(parts)
        elif ".attn.qkv." not in key:
            fused[key] = value
    return fused


def get_peft_config(config: IMedSamConfig) -> LoraConfig:
    """
    The adapter that a configuration asks for: LoRA on the image encoder, and in `modules_to_save` all else that is
    trained, so that loading, switching and disabling act on all of it together.
    """
    modules_to_save = ["prompt_encoder"]
    if config.frequency_view is not None:
        modules_to_save.append("frequency_branch")
    if config.implicit_decoder:
        modules_to_save.append("implicit_decoder")
    if config.trains_mask_decoder:
        modules_to_save.append("mask_decoder")
    else:
        modules_to_save += ["upscale_conv1", "upscale_layer_norm", "upscale_conv2"]
    return LoraConfig(**_lora_values(config), modules_to_save=modules_to_save)


def read_adapter(path: str, config: IMedSamConfig, finding: dict[str, Any]) -> LoraConfig:
    """
    What adapter_config.json says, which its weights and the config.json of these values lie beside.

    Args:
        path: Hub name or folder.
        finding: what says where it is there.

    Raises:
        ValueError: a file is missing or damaged, it is no LoRA, or it contradicts the configuration.
    """
    file = find_adapter_config_file(path, **finding)
    weights = cached_file(path, ADAPTER_SAFE_WEIGHTS_NAME, _raise_exceptions_for_missing_entries=False, **finding)
    for name, found in {ADAPTER_CONFIG_NAME: file, ADAPTER_SAFE_WEIGHTS_NAME: weights}.items():
        if found is None:
            raise ValueError(f"Expected an adapter with its {name} at {path}, got none: copy or download it again.")
    try:
        values = json.loads(Path(str(file)).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"Expected JSON in {ADAPTER_CONFIG_NAME} at {path}, got a damaged file ({error}): copy or download it "
            "again."
        ) from error
    if not isinstance(values, dict):
        raise ValueError(
            f"Expected an object in {ADAPTER_CONFIG_NAME} at {path}, got {values!r}: copy or download it again."
        )
    if values.get("peft_type") != PeftType.LORA:
        raise ValueError(
            f"Expected an adapter with peft_type 'LORA' at {path}, got {values.get('peft_type')!r}: an I-MedSAM's "
            "adapter is LoRA, copy or download it again."
        )
    adapter = cast(LoraConfig, LoraConfig.from_pretrained(path, **finding))
    refuse_contradictions(adapter, config, f" in {CONFIG_NAME} at {path}")
    return adapter


def refuse_contradictions(adapter: PeftConfig, config: IMedSamConfig, place: str = "") -> None:
    """An adapter of other values than the configuration says would be another function, or be saved as one."""
    for key, expected in _lora_values(config).items():
        if (found := getattr(adapter, key, None)) != expected:
            raise ValueError(
                f"Expected an adapter with {key} {expected!r}, as the configuration{place} says, got {found!r}: make "
                "the two agree, of a checkpoint by taking both files from one place."
            )


def _lora_values(config: IMedSamConfig) -> dict[str, Any]:
    return {
        "r": config.lora_rank,
        "lora_alpha": config.lora_alpha,
        "target_modules": rf".*vision_encoder.*\.({'|'.join(config.lora_targets or [])})",
    }

"""
SAM's weights from wherever they are: transformers' checkpoints, and the original files of the family
(segment_anything, MedSAM, SAM-Med2D, EfficientSAM), whose sizes are found from their weights.
"""

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pickle import UnpicklingError
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import SamConfig, SamModel
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils import CONFIG_NAME, cached_file, logging
from transformers.utils.hub import extract_commit_hash

logger = logging.get_logger(__name__)

POSITIONS = "prompt_encoder.shared_embedding.positional_embedding"
SHARED_POSITIONS = "shared_image_embedding.positional_embedding"  # the same again, in a `SamModel`
FINDING_KEYS = {"cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token"}
# EfficientSAM's files hold positions of 14 x 14 patches, and its encoder sees 1024 x 1024 pixels.
EFFICIENT_SAM_SIZE = 1024
# No shape tells how many heads there are: all files of the family have these.
HEAD_WIDTH, DECODER_HEADS = 64, 8
WEIGHTS = (".pth", ".pt", ".safetensors")  # how files of weights end


@dataclass
class SamCheckpoint:
    """
    Args:
        name: where it was found.
        config: of its own image size.
        state_dict: of a `SamModel`, in float32, with `POSITIONS` once.
        revision: the commit, of a checkpoint from the Hub.
        without: prefixes of what a whole SAM has and it has not.
    """

    name: str
    config: SamConfig
    state_dict: dict[str, Tensor]
    revision: str | None = None
    without: tuple[str, ...] = ()

    def sha256(self) -> str:
        """Of its weights, by their names in a `SamModel`, whatever the file that they were in."""
        digest = hashlib.sha256()
        for name, value in sorted(self.state_dict.items()):
            digest.update(f"{name} {tuple(value.shape)} ".encode())
            digest.update(value.detach().cpu().contiguous().numpy().reshape(-1))  # type: ignore[arg-type]  # a buffer
        return digest.hexdigest()

    def to_model(self) -> SamModel:
        """Raises ValueError without a mask decoder."""
        if self.without:
            raise ValueError(
                f"Expected a whole SAM, got {self.name} without {', '.join(self.without)}: "
                "start from it with IMedSamModel.from_sam_pretrained(..., train_mask_decoder=True)."
            )
        model = SamModel(self.config)
        model.load_state_dict({**self.state_dict, SHARED_POSITIONS: self.state_dict[POSITIONS]})
        return model.eval()


def load_sam(name_or_path: str | os.PathLike, **loading: Any) -> SamCheckpoint:
    """
    Args:
        name_or_path: Hub name or folder of a `SamModel`, or a file of the original family (.pth, .pt, .safetensors).
        loading: for transformers' `from_pretrained`: `revision`, `token`, `cache_dir`, ...

    Raises:
        OSError: nothing is there.
        ValueError: what is there is no SAM, or not a whole one.
    """
    path = str(name_or_path)
    if os.path.isfile(path):
        return read_original(path)
    if path.endswith(WEIGHTS) and not os.path.isdir(path):
        raise OSError(f"Expected a file at {path}, got none: check its path.")
    model_type = read_config(path, **only_finding(loading)).get("model_type")
    if model_type != "sam":
        raise ValueError(
            f"Expected a SAM checkpoint at {path}, got one of type {model_type!r}: give a SamModel's folder or Hub "
            "name, or the original file of SAM, MedSAM, SAM-Med2D or EfficientSAM."
        )
    with refuse_damaged(path):
        # Declared to return the model alone.
        loaded: Any = SamModel.from_pretrained(path, dtype=torch.float32, output_loading_info=True, **loading)
    model, found = loaded
    if found["missing_keys"]:  # which transformers filled at random
        raise ValueError(f"Expected SAM's weights at {path}, got missing {sorted(found['missing_keys'])}.")
    state_dict = model.state_dict()
    state_dict[POSITIONS] = state_dict.pop(SHARED_POSITIONS)
    revision = extract_commit_hash(cached_file(path, CONFIG_NAME, **only_finding(loading)), None)
    return SamCheckpoint(path, model.config, state_dict, revision)


@contextmanager
def refuse_damaged(path: str) -> Iterator[None]:
    """Says of a truncated file, and of one beside another's configuration, what it is."""
    try:
        yield
    except (SafetensorError, EOFError) as error:
        raise ValueError(
            f"Expected a whole checkpoint at {path}, got a damaged one ({error}): copy or download it again."
        ) from error
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise ValueError(
            f"Expected weights at {path} of the sizes that its config.json says, got others (the table above): take "
            "the two from one place."
        ) from error


def read_config(path: str, **finding: Any) -> dict[str, Any]:
    """
    What config.json says in a folder or a repository on the Hub; {} without one.

    Raises:
        OSError: there is neither, or the Hub does not give it.
    """
    refuse_nowhere(path)
    try:
        return PreTrainedConfig.get_config_dict(path, **finding)[0]
    except OSError as error:
        if not isinstance(error.__cause__, LocalEntryNotFoundError):
            raise
        # transformers speaks of the connection alone, of a folder that is misspelt too.
        raise OSError(
            f"Expected a model's folder or its name on the Hub, got {path}: there is no such folder, and nothing of "
            "that name in the Hub's cache, while the Hub itself is not reached. Check the name, or the connection and "
            "HF_HUB_OFFLINE."
        ) from error


def refuse_nowhere(path: str) -> None:
    """Of a path that can be no name on the Hub, transformers would say how such a name looks."""
    is_path = os.path.isabs(path) or path.startswith((".", "~")) or path.count("/") > 1
    if is_path and not os.path.isdir(path):
        raise OSError(f"Expected a model's folder or its name on the Hub, got {path}, where no folder is: check it.")


def only_finding(loading: Mapping[str, Any]) -> dict[str, Any]:
    """What of it says where files are."""
    return {key: value for key, value in loading.items() if key in FINDING_KEYS}


def read_original(path: str) -> SamCheckpoint:
    """A file in the layout of segment_anything, MedSAM, SAM-Med2D (without its adapters) or EfficientSAM."""
    weights = _read_weights(path)
    if adapters := {key for key in weights if ".Adapter." in key}:
        logger.warning(
            f"Left out {len(adapters)} weights of SAM-Med2D's adapters in {path}: the encoder is the one that they "
            "were put on, and gives other features than with them."
        )
        weights = {key: value for key, value in weights.items() if key not in adapters}
    efficient = "prompt_encoder.bbox_top_left_embeddings.weight" in weights
    try:
        state_dict = _from_efficient_sam(weights) if efficient else weights
        state_dict = {_rename(key): value for key, value in state_dict.items()}
        config = find_config(state_dict)
    except KeyError as error:
        raise ValueError(f"{_expected(path, weights)} without {error.args[0]}.") from error
    without = ("mask_decoder.", "prompt_encoder.mask_embed.") if efficient else ()
    with torch.device("meta"):
        expected = SamModel(config).state_dict()
    expected.pop(SHARED_POSITIONS)
    expected = {key: value for key, value in expected.items() if not key.startswith(without or "-")}
    if missing := sorted(expected.keys() - state_dict.keys()):
        raise ValueError(f"{_expected(path, weights)} without {_some(missing)}.")
    if others := sorted(state_dict.keys() - expected.keys()):
        raise ValueError(f"{_expected(path, weights)} with {_some(others)} beside SAM's.")
    if wrong := [key for key, value in expected.items() if value.shape != state_dict[key].shape]:
        shapes = ", ".join(
            f"{key} {tuple(state_dict[key].shape)} instead of {tuple(expected[key].shape)}" for key in wrong[:3]
        )
        raise ValueError(f"{_expected(path, weights)} whose weights do not fit each other: {shapes}.")
    return SamCheckpoint(path, config, state_dict, without=without)


def find_config(state_dict: Mapping[str, Tensor]) -> SamConfig:
    """
    The sizes of a SAM by its weights, named as in a `SamModel`. Without a mask decoder that of SAM is taken.

    Raises:
        KeyError: a weight that it takes to know them is not there.
    """
    vision, decoder = "vision_encoder.", "mask_decoder.transformer.layers.0."
    width, _, patch, _ = state_dict[vision + "patch_embed.projection.weight"].shape
    grid = state_dict[vision + "pos_embed"].shape[1]
    depth = _count(state_dict, vision + r"layers\.(\d+)\.")
    has_offsets = vision + "layers.0.attn.rel_pos_h" in state_dict
    offsets = [state_dict[f"{vision}layers.{i}.attn.rel_pos_h"].shape for i in range(depth)] if has_offsets else []
    windows = {(length + 1) // 2 for length, _ in offsets} - {grid}
    hidden = state_dict[vision + "neck.conv1.weight"].shape[0]
    vision_config = {
        "hidden_size": width,
        "output_channels": hidden,
        "num_hidden_layers": depth,
        "num_attention_heads": max(1, width // (offsets[0][1] if has_offsets else HEAD_WIDTH)),
        "image_size": grid * patch,
        "patch_size": patch,
        "mlp_dim": state_dict[vision + "layers.0.mlp.lin1.weight"].shape[0],
        "use_rel_pos": has_offsets,
        "window_size": min(windows, default=0),
        "global_attn_indexes": [i for i, (length, _) in enumerate(offsets) if length == 2 * grid - 1],
        "num_pos_feats": state_dict[POSITIONS].shape[1],
    }
    prompt_config = {"hidden_size": hidden, "image_size": grid * patch, "patch_size": patch}
    # The original's epsilon, where transformers has 1e-6.
    decoder_config: dict[str, Any] = {
        "hidden_size": hidden,
        "num_attention_heads": DECODER_HEADS,
        "layer_norm_eps": 1e-5,
    }
    if any(key.startswith("mask_decoder.") for key in state_dict):
        prompt_config["mask_input_channels"] = 4 * state_dict["prompt_encoder.mask_embed.conv1.weight"].shape[0]
        decoder_config |= {
            "mlp_dim": state_dict[decoder + "mlp.lin1.weight"].shape[0],
            "num_hidden_layers": _count(state_dict, r"mask_decoder\.transformer\.layers\.(\d+)\."),
            "attention_downsample_rate": hidden
            // state_dict[decoder + "cross_attn_token_to_image.q_proj.weight"].shape[0],
            "num_multimask_outputs": state_dict["mask_decoder.mask_tokens.weight"].shape[0] - 1,
            "iou_head_depth": 2 + _count(state_dict, r"mask_decoder\.iou_prediction_head\.layers\.(\d+)\."),
            "iou_head_hidden_dim": state_dict["mask_decoder.iou_prediction_head.proj_in.weight"].shape[0],
        }
    return SamConfig(
        vision_config=vision_config, prompt_encoder_config=prompt_config, mask_decoder_config=decoder_config
    )


# From the names of segment_anything, and of EfficientSAM's linear layers, to those of a `SamModel`.
_RENAMES = [
    (re.compile(pattern), name)
    for pattern, name in {
        r"^image_encoder\.": "vision_encoder.",
        r"\.patch_embed\.proj\.": ".patch_embed.projection.",
        r"\.blocks\.": ".layers.",
        r"\.mlp\.fc(\d)\.": r".mlp.lin\1.",
        r"\.norm(\d)\.": r".layer_norm\1.",
        r"\.norm_final_attn\.": ".layer_norm_final_attn.",
        r"\.neck\.0\.": ".neck.conv1.",
        r"\.neck\.1\.": ".neck.layer_norm1.",
        r"\.neck\.2\.": ".neck.conv2.",
        r"\.neck\.3\.": ".neck.layer_norm2.",
        r"\.pe_layer\.positional_encoding_gaussian_matrix$": ".shared_embedding.positional_embedding",
        r"\.point_embeddings\.": ".point_embed.",
        r"\.mask_downscaling\.0\.": ".mask_embed.conv1.",
        r"\.mask_downscaling\.1\.": ".mask_embed.layer_norm1.",
        r"\.mask_downscaling\.3\.": ".mask_embed.conv2.",
        r"\.mask_downscaling\.4\.": ".mask_embed.layer_norm2.",
        r"\.mask_downscaling\.6\.": ".mask_embed.conv3.",
        r"\.output_upscaling\.0\.": ".upscale_conv1.",
        r"\.output_upscaling\.1\.": ".upscale_layer_norm.",
        r"\.output_upscaling\.3\.": ".upscale_conv2.",
        r"(\.output_hypernetworks_mlps\.\d+|\.iou_prediction_head)\.layers\.0\.": r"\1.proj_in.",
        r"(\.output_hypernetworks_mlps\.\d+|\.iou_prediction_head)\.layers\.1\.": r"\1.layers.0.",
        r"(\.output_hypernetworks_mlps\.\d+|\.iou_prediction_head)\.layers\.2\.": r"\1.proj_out.",
    }.items()
]

# What files that are none of the family have in their names.
_OTHERS = {
    r"^(model\.)?vision_encoder\.(patch_embed|layers)\.": (
        "a SamModel of transformers: give its folder, with config.json beside the weights"
    ),
    r"image_encoder\.trunk\.|^memory_attention\.": "SAM 2, whose encoder is another one",
    r"image_encoder\.patch_embed\.seq\.": "MobileSAM or LiteMedSAM, whose encoder is a TinyViT",
    r"image_encoder\.backbone\.": "EfficientViT-SAM, whose encoder is no ViT",
    r"^(cls_token$|patch_embed\.proj\.|blocks\.\d+\.)": "a ViT by itself, without SAM's prompt encoder and decoder",
    r"^image_encoder\.blocks\.": "a SAM of which some is missing or changed",
}


def _read_weights(path: str) -> dict[str, Tensor]:
    with refuse_damaged(path):
        if path.endswith(".safetensors"):
            content: Any = load_file(path)
        else:
            content = _unpickle_weights(path)
    for key in ("model", "state_dict"):
        content = content[key] if isinstance(content, Mapping) and isinstance(content.get(key), Mapping) else content
    if not isinstance(content, Mapping):
        raise ValueError(
            f"Expected weights by their names at {path}, got {type(content).__name__}: give a state dict."
        )
    weights = {str(key).removeprefix("module."): value for key, value in content.items() if isinstance(value, Tensor)}
    return {key: value.float() for key, value in weights.items() if key not in ("pixel_mean", "pixel_std")}


def _unpickle_weights(path: str) -> Any:
    try:
        return torch.load(path, "cpu", weights_only=True)
    except UnpicklingError as error:
        raise ValueError(
            f"Expected a file of weights alone at {path}, got other objects or none of torch's files: where you trust "
            "it, load it yourself, and save its state dict with safetensors.torch.save_file. Nothing of it was run."
        ) from error
    except RuntimeError as error:  # of an archive that ends too early
        raise EOFError(str(error)) from error


def _rename(key: str) -> str:
    for pattern, name in _RENAMES:
        key = pattern.sub(name, key)
    return key


def _from_efficient_sam(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """
    EfficientSAM's encoder and prompt encoder in the names of segment_anything. It knows points inside the object
    alone, pads prompts otherwise, and takes no masks: the tokens that it has not are zeros.
    """
    prompts = {
        "point_embeddings": "point_embeddings.1",
        "bbox_top_left_embeddings": "point_embeddings.2",
        "bbox_bottom_right_embeddings": "point_embeddings.3",
    }
    converted = {key: value for key, value in weights.items() if key.startswith("image_encoder.")}
    for name, new_name in prompts.items():
        converted[f"prompt_encoder.{new_name}.weight"] = weights[f"prompt_encoder.{name}.weight"]
    for name in ("no_mask_embed", "not_a_point_embed", "point_embeddings.0"):
        converted[f"prompt_encoder.{name}.weight"] = torch.zeros_like(
            weights["prompt_encoder.point_embeddings.weight"]
        )
    matrix = "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"
    converted[matrix] = weights[matrix]
    patch = weights["image_encoder.patch_embed.proj.weight"].shape[-1]
    positions = weights["image_encoder.pos_embed"][:, 1:]  # the first is the class token's
    grid = positions.transpose(1, 2).unflatten(2, (round(positions.shape[1] ** 0.5), -1))
    grid = F.interpolate(grid, (EFFICIENT_SAM_SIZE // patch,) * 2, mode="bicubic", align_corners=False)
    converted["image_encoder.pos_embed"] = grid.movedim(1, -1)
    return converted


def _count(state_dict: Mapping[str, Tensor], pattern: str) -> int:
    found = (re.match(pattern, key) for key in state_dict)
    return len({match[1] for match in found if match})


def _expected(path: str, weights: Mapping[str, Tensor]) -> str:
    looks_like = (what for pattern, what in _OTHERS.items() if any(re.search(pattern, key) for key in weights))
    what = next(looks_like, "something else")
    return (
        f"Expected the weights of SAM, MedSAM, SAM-Med2D or EfficientSAM at {path}, got what looks like {what}: a file"
    )


def _some(keys: list[str], shown: int = 3) -> str:
    rest = f" and {len(keys) - shown} more" if len(keys) > shown else ""
    return ", ".join(keys[:shown]) + rest

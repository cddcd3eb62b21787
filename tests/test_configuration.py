"""The configuration: defaults, what it refuses and says, and files."""

import ast
import dataclasses
import inspect
import json
import re

import pytest
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import SamConfig
from transformers.configuration_utils import PreTrainedConfig

from imedsam.configuration.configuration_imedsam import IMedSamConfig
from imedsam.configuration.configuration_sf_recsam import SFRecSamConfig
from imedsam.training.unet import UNetConfig


def test_defaults_are_the_papers():
    config = IMedSamConfig()
    assert (config.image_size, config.patch_size) == (384, 16)
    assert (config.lora_rank, config.lora_targets) == (4, ["q_proj", "v_proj"])
    assert (config.frequency_view, config.coordinate_octaves) == ("amplitude", 10)
    assert (config.dropout, config.selection_share) == (0.5, 0.125)
    assert config.id2label == {0: "object"} and config.num_labels == 1
    vision = config.sam_config.vision_config
    assert (vision.hidden_size, vision.num_hidden_layers) == (768, 12)
    assert vision.initializer_range == 0.02 and vision.scale == 1.0
    assert config.sam_config.prompt_encoder_config.image_size == 384


def test_targets_follow_the_rank():
    assert IMedSamConfig(lora_rank=0).lora_targets == []
    assert IMedSamConfig(lora_targets=["k_proj"]).lora_targets == ["k_proj"]


def test_classes():
    assert IMedSamConfig(num_labels=3).id2label == {0: "object 1", 1: "object 2", 2: "object 3"}
    config = IMedSamConfig(id2label={0: "liver", 1: "spleen"})
    assert config.num_labels == 2 and config.label2id == {"liver": 0, "spleen": 1}
    assert IMedSamConfig(id2label={0: "liver"}, num_labels=1).num_labels == 1
    with pytest.raises(ValueError, match="num_labels and id2label to agree, got 3 and 2 names: give one of the two"):
        config.num_labels = 3


SIZES = {"vision_config": {"image_size": 128}, "prompt_encoder_config": {"image_size": 64}}
REFUSED = [
    ({"num_labels": 0}, "Expected at least 1 class, got 0: set num_labels=1"),
    ({"id2label": {}}, "Expected at least 1 class, got 0"),
    ({"id2label": {1: "liver"}}, r"number the classes from 0, got \[1\]: the background is no class"),
    ({"id2label": {0: "a", 1: "b"}, "num_labels": 3}, "num_labels and id2label to agree, got 3 and 2 names"),
    ({"selection_share": 0.0}, r"selection_share in \(0, 1\], got 0.0: to refine no point use selection=None"),
    ({"selection_share": 1.5}, r"selection_share in \(0, 1\], got 1.5"),
    ({"selection_share": float("nan")}, r"selection_share in \(0, 1\], got nan"),
    ({"dropout": 1.0}, r"dropout in \[0, 1\), got 1.0"),
    ({"dropout": -0.1}, r"dropout in \[0, 1\), got -0.1"),
    (
        {"dropout": 0.0},
        "dropout > 0 with a selection, got 0.0: the uncertainty would be 0 everywhere. Set dropout=0.5",
    ),
    ({"lora_rank": -1}, "lora_rank >= 0 and lora_alpha > 0, got -1 and 4"),
    ({"lora_alpha": 0}, "lora_rank >= 0 and lora_alpha > 0, got 4 and 0"),
    ({"lora_rank": 0, "lora_targets": ["q_proj"]}, r"no lora_targets with lora_rank 0, got \['q_proj'\]: leave"),
    ({"lora_targets": []}, "lora_targets with lora_rank 4, got none: set lora_rank=0"),
    ({"lora_targets": ["qkv"]}, r"lora_targets out of q_proj, k_proj, v_proj, got \['qkv'\]"),
    ({"train_image_encoder": True}, "lora_rank=0 with train_image_encoder=True, got 4: LoRA adapts a frozen encoder"),
    ({"sam_config": SIZES}, "same image_size and patch_size .* got 128/16 and 64/16: every box would be wrong"),
    (
        {"sam_config": {"vision_config": {"image_size": 100}, "prompt_encoder_config": {"image_size": 100}}},
        "image_size divisible by the patch size 16, got 100: use 96",
    ),
    ({"sam_config": {"vision_config": {"image_size": 0}}}, "divisible by the patch size 16, got 0: use 16"),
    ({"sam_config": {"vision_config": {"image_size": [64, 64]}}}, r"a square image_size .* got \[64, 64\] and 16"),
    (
        {"sam_config": {"vision_config": {"output_channels": 128}}},
        r"one width for vision_config.output_channels, .*, got \(128, 256, 256\): SAM adds and multiplies",
    ),
    ({"frequency_hidden": 0}, "frequency_hidden of at least 1, got 0"),
    ({"coordinate_octaves": 0}, "coordinate_octaves of at least 1, got 0"),
    ({"prompt_frame_octaves": -1}, "prompt_frame_octaves of at least 0, got -1"),
    ({"selection_lattice": 0}, "selection_lattice of at least 1, got 0"),
    ({"monte_carlo_samples": 1}, "monte_carlo_samples of at least 2, got 1: one pass has no variance"),
    ({"coarse_widths": []}, r"coarse_widths to hold positive layer widths, got \[\]"),
    ({"pixel_decoder_width": 0}, "pixel_decoder_width as a positive multiple of 4, got 0: for none use None"),
    ({"pixel_decoder_width": 30}, "pixel_decoder_width as a positive multiple of 4, got 30"),
    (
        {"pixel_decoder_width": 192, "implicit_decoder": False},
        "no pixel_decoder_width with implicit_decoder=False, got 192: .* Leave one of the two out",
    ),
    ({"fine_widths": [8, 0]}, r"fine_widths to hold positive layer widths, got \[8, 0\]"),
]


@pytest.mark.parametrize("values, message", REFUSED, ids=lambda value: next(iter(value)) if value else None)
def test_contradictions_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        IMedSamConfig(**values)


@pytest.mark.parametrize(
    "values",
    [
        {"dropout": 0.0, "selection": None},
        {"dropout": 0.0, "selection_share": 1},
        {"dropout": 0.0, "implicit_decoder": False},
        {"train_image_encoder": True, "lora_rank": 0},
        {"prompt_frame_octaves": 0},
    ],
)
def test_the_ways_out_are_accepted(values):
    config = IMedSamConfig(**values)
    assert {key: getattr(config, key) for key in values} == values


def test_unknown_keys_are_refused():
    with pytest.raises(TypeError, match=r"Unknown configuration key 'lora_rnak': IMedSamConfig takes .*lora_rank.*"):
        IMedSamConfig(lora_rnak=4)
    with pytest.raises(TypeError, match="newer version: update imedsam's repository, and `pip install` its path"):
        IMedSamConfig(lora_rnak=4)
    with pytest.raises(TypeError, match="keys 'a', 'b': IMedSamConfig takes .* and num_labels. Correct or remove it"):
        IMedSamConfig(b=1, a=2)


def test_values_given_on_loading_are_held_to_the_same_rules(tmp_path):
    IMedSamConfig().save_pretrained(tmp_path)
    assert IMedSamConfig.from_pretrained(tmp_path, selection_share=0.5, num_labels=1).selection_share == 0.5
    with pytest.raises(ValueError, match="Expected dropout > 0 with a selection"):
        IMedSamConfig.from_pretrained(tmp_path, dropout=0.0)
    with pytest.raises(ValueError, match=r"Expected selection_share in \(0, 1\], got 2.0"):
        IMedSamConfig.from_pretrained(tmp_path, selection_share=2.0)
    with pytest.raises(ValueError, match="Expected num_labels and id2label to agree"):
        IMedSamConfig.from_pretrained(tmp_path, num_labels=3)


@pytest.mark.parametrize(
    "values",
    [
        {"lora_rank": "4"},
        {"lora_rank": 4.0},
        {"frequency_view": "dct"},
        {"selection": "best"},
        {"uncertainty": None},
        {"dropout": "0.5"},
        {"coarse_widths": 8},
        {"implicit_decoder": "yes"},
    ],
    ids=lambda values: next(iter(values)),
)
def test_wrong_types_are_refused(values):
    with pytest.raises(StrictDataclassFieldValidationError, match=next(iter(values))):
        IMedSamConfig(**values)


CONFIGS = [
    {},
    {"num_labels": 1},
    {"num_labels": 2},
    {"num_labels": 3},
    {"id2label": {0: "liver", 1: "left kidney"}},
    {"id2label": {0: "LABEL_0", 1: "LABEL_1"}},
    {"lora_rank": 0, "frequency_view": None, "selection": None, "prompt_frame": False},
    {"lora_rank": 8, "lora_alpha": 16, "lora_targets": ["q_proj", "k_proj"], "frequency_view": "haar"},
    {"frequency_log": False, "selection": "top_k", "selection_share": 0.25, "uncertainty": "monte_carlo"},
    {"implicit_decoder": False, "train_mask_decoder": True, "dropout": 0.0},
    {"coarse_widths": [64], "fine_widths": [32, 16, 8], "coordinate_octaves": 8, "train_image_encoder": False},
]


@pytest.mark.parametrize("values", CONFIGS, ids=lambda values: next(iter(values), "defaults"))
def test_a_saved_configuration_comes_back(values, tmp_path):
    config = IMedSamConfig(**values)
    config.save_pretrained(tmp_path)
    loaded = IMedSamConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert all(getattr(loaded, key) == value for key, value in values.items())
    assert isinstance(loaded.sam_config, SamConfig) and isinstance(next(iter(loaded.id2label)), int)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["model_type"] == "imedsam" and len(saved["id2label"]) == config.num_labels


def test_the_sam_configuration_comes_back(tiny_config, tmp_path):
    config = tiny_config(image_size=96)
    config.save_pretrained(tmp_path)
    vision = IMedSamConfig.from_pretrained(tmp_path).sam_config.vision_config
    assert (vision.image_size, vision.hidden_size, vision.global_attn_indexes) == (96, 32, [1])
    assert vision.scale == 1.0 and vision.initializer_range == 0.02


def test_two_configurations_share_nothing():
    one, two = IMedSamConfig(), IMedSamConfig()
    one.sam_config.vision_config.image_size = 64
    one.lora_targets.append("k_proj")
    one.id2label[1] = "another"
    assert two.to_dict() == IMedSamConfig().to_dict()


def test_the_callers_dictionaries_are_left_alone():
    sam_config, names = {"vision_config": {"image_size": 64}, "prompt_encoder_config": {"image_size": 64}}, {"0": "a"}
    IMedSamConfig(sam_config=sam_config, id2label=names)
    assert sam_config == {"vision_config": {"image_size": 64}, "prompt_encoder_config": {"image_size": 64}}
    assert names == {"0": "a"}


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"sam_config": {"vision_confg": {}}}, TypeError, "Unknown key 'vision_confg' in sam_config"),
        ({"num_labels": "3"}, ValueError, "Expected num_labels as an integer, got '3'"),
        ({"id2label": ["a"]}, ValueError, "Expected id2label as"),
        ({"id2label": {0: "a", 1: "a"}}, ValueError, "Expected a name of its own for each class"),
    ],
)
def test_classes_and_sam_are_checked(values, error, message):
    with pytest.raises(error, match=message):
        IMedSamConfig(**values)


def test_what_was_saved_before_there_was_a_prior_has_none(tmp_path):
    IMedSamConfig().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved.pop("ellipse_prior") is True
    (tmp_path / "config.json").write_text(json.dumps(saved))
    assert not IMedSamConfig.from_pretrained(tmp_path).ellipse_prior
    assert IMedSamConfig.from_pretrained(tmp_path, ellipse_prior=True).ellipse_prior


@pytest.mark.parametrize("config_class", [IMedSamConfig, SFRecSamConfig, UNetConfig])
def test_the_docstring_has_every_value_and_its_default(config_class):
    documented = dict(re.findall(r"^ {4}(\w+) \((.*)\):$", inspect.getdoc(config_class), flags=re.MULTILINE))
    fields = {field.name: field.default for field in dataclasses.fields(config_class)}
    own = fields.keys() - {field.name for field in dataclasses.fields(PreTrainedConfig)}
    assert documented.keys() == {*own, "id2label"} - {"initializer_range"}
    for name, text in documented.items():
        if text.endswith(", optional"):
            assert fields[name] is None
        else:
            default = ast.literal_eval(text.partition(", defaults to ")[2])
            assert default == (list(fields[name]) if isinstance(fields[name], tuple) else fields[name]), name

"""Saved and loaded a model is itself: whole, as an adapter alone on its SAM, and as a stock SAM."""

import json
import shutil

import pytest
import torch
from drawn_folders import make_processor
from peft import LoraConfig, PeftConfig, PeftType
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import SamModel
from transformers.utils import logging
from typer.testing import CliRunner

from imedsam.configuration.configuration_imedsam import IMedSamConfig
from imedsam.modeling_imedsam import IMedSamModel
from imedsam.training.baselines import find_model_class, load_model
from imedsam.training.cli import app


@pytest.fixture
def model(from_sam):
    return from_sam()


@torch.no_grad()
def masks(model, inputs):
    return model(**inputs, output_size=(16, 16)).pred_masks


def test_saved_whole_it_comes_back(model, inputs, tmp_path):
    model.save_pretrained(tmp_path)
    assert {"config.json", "model.safetensors", "adapter_config.json", "adapter_model.safetensors"} <= {
        path.name for path in tmp_path.iterdir()
    }
    loaded = IMedSamModel.from_pretrained(tmp_path)
    assert torch.equal(masks(loaded, inputs), masks(model, inputs))
    assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
    loaded.disable_adapters()
    model.disable_adapters()
    assert torch.equal(masks(loaded, inputs), masks(model, inputs))


def test_saved_whole_it_needs_no_sam(model, inputs, tmp_path):
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": "/nowhere"}))
    assert torch.equal(masks(IMedSamModel.from_pretrained(tmp_path), inputs), masks(model, inputs))


def test_a_whole_model_on_the_hub_needs_no_sam(model, inputs, tmp_path):
    """In the layout of the Hub's cache, as a download leaves it."""
    snapshot = tmp_path / "models--someone--imedsam" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (tmp_path / "models--someone--imedsam" / "refs").mkdir()
    (tmp_path / "models--someone--imedsam" / "refs" / "main").write_text("0" * 40)
    model.name_or_path = model.peft_config["default"].base_model_name_or_path = "/nowhere"
    model.save_pretrained(snapshot)
    loaded = IMedSamModel.from_pretrained("someone/imedsam", cache_dir=tmp_path)
    assert torch.equal(masks(loaded, inputs), masks(model, inputs))


def test_an_adapter_alone_comes_back(model, inputs, sam_folder, tmp_path):
    model.save_adapter(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} <= {
        "config.json",
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
    }
    loaded = IMedSamModel.from_pretrained(tmp_path)
    assert torch.equal(masks(loaded, inputs), masks(model, inputs))
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable and {name for name, p in loaded.named_parameters() if p.requires_grad} == trainable


def test_an_adapter_holds_what_was_trained_and_nothing_else(model, tmp_path):
    model.save_adapter(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    matrix = model.prompt_encoder.shared_embedding.positional_embedding.numel()  # a buffer of the prompt encoder
    assert sum(value.numel() for value in saved.values()) == trained + matrix
    assert not any("vision_encoder" in name and "lora" not in name for name in saved)


def test_an_adapter_is_a_peft_checkpoint(model, sam_folder, tmp_path):
    model.save_adapter(tmp_path)
    config = PeftConfig.from_pretrained(tmp_path)
    assert config.peft_type == PeftType.LORA and config.base_model_name_or_path == str(sam_folder)
    assert config.r == 4 and {"frequency_branch", "implicit_decoder", "prompt_encoder"} < set(config.modules_to_save)
    whole = tmp_path / "whole"
    model.save_pretrained(whole)
    assert PeftConfig.from_pretrained(whole).to_dict() == config.to_dict()


def test_at_another_size_an_adapter_comes_back(from_sam, tmp_path):
    model = from_sam(image_size=96)
    inputs = {"pixel_values": torch.randn(1, 3, 96, 96), "input_boxes": torch.tensor([[[8.0, 12.0, 70.0, 90.0]]])}
    model.save_adapter(tmp_path)
    assert_close(masks(IMedSamModel.from_pretrained(tmp_path), inputs), masks(model, inputs), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_an_adapter_comes_back_in_its_dtype(model, inputs, tmp_path, dtype):
    """As transformers does by default; or in the one that is asked for."""
    model.to(dtype).save_adapter(tmp_path)
    loaded = IMedSamModel.from_pretrained(tmp_path)
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    assert torch.equal(masks(loaded, inputs), masks(model, inputs))
    assert IMedSamModel.from_pretrained(tmp_path, dtype="float32").dtype == torch.float32
    for name in ("float33", "nn"):
        with pytest.raises(ValueError, match=f"Expected dtype as one of torch, such as .*, got '{name}'"):
            IMedSamModel.from_pretrained(tmp_path, dtype=name)


def test_the_base_can_be_elsewhere(model, inputs, sam_folder, tmp_path):
    model.save_adapter(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": "/nowhere"}))
    with pytest.raises(
        OSError, match="Expected /nowhere, the SAM of the adapter at .*: give its place as base_model_"
    ):
        IMedSamModel.from_pretrained(tmp_path / "adapter")
    shutil.copytree(sam_folder, tmp_path / "moved")
    loaded = IMedSamModel.from_pretrained(tmp_path / "adapter", base_model_name_or_path=tmp_path / "moved")
    assert torch.equal(masks(loaded, inputs), masks(model, inputs))
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": None}))
    with pytest.raises(ValueError, match="to name the SAM that it belongs to, got no name: give base_model_name_or_"):
        IMedSamModel.from_pretrained(tmp_path / "adapter")


def test_on_another_base_an_adapter_is_refused(model, sam_folder, tiny_sam, tmp_path):
    """Also where the shapes are the same, and a single value is another one."""
    model.save_adapter(tmp_path / "adapter")
    other = tiny_sam()
    other.vision_encoder.pos_embed.data[0, 0, 0, 0] += 1e-3
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(
        ValueError, match="Expected the SAM that the adapter was trained on, .* SHA-256 [0-9a-f]{64}, got"
    ):
        IMedSamModel.from_pretrained(tmp_path / "adapter", base_model_name_or_path=tmp_path / "other")
    IMedSamModel.from_sam_pretrained(tmp_path / "other", image_size=64).save_adapter(tmp_path / "adapter of other")
    with pytest.raises(ValueError, match="Expected an adapter with base_model_sha256 '.*', got '.*' at"):
        model.load_adapter(str(tmp_path / "adapter of other"), "other")


def test_a_base_is_known_by_its_weights_alone(model, tiny_sam, inputs, tmp_path):
    """In several files, under another name: it is the same SAM."""
    model.save_adapter(tmp_path / "adapter")
    tiny_sam().save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    loaded = IMedSamModel.from_pretrained(tmp_path / "adapter", base_model_name_or_path=tmp_path / "sharded")
    assert torch.equal(masks(loaded, inputs), masks(model, inputs))


def test_the_revision_of_a_base_on_the_hub_is_noted(tiny_sam, inputs, tmp_path, monkeypatch):
    """In the layout of the Hub's cache: an adapter finds the commit that it was trained on, not the newest one."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--someone--sam"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("1" * 40)
    sam = tiny_sam()
    for revision in ("0" * 40, "1" * 40):
        sam.vision_encoder.pos_embed.data += 0.1
        sam.save_pretrained(repository / "snapshots" / revision)
    old = {"revision": "0" * 40, "cache_dir": tmp_path}
    model = IMedSamModel.from_sam_pretrained("someone/sam", image_size=64, **old)
    model.save_adapter(tmp_path / "adapter")
    config = PeftConfig.from_pretrained(tmp_path / "adapter")
    assert (config.base_model_name_or_path, config.revision) == ("someone/sam", "0" * 40)
    loaded = IMedSamModel.from_pretrained(tmp_path / "adapter", cache_dir=tmp_path)
    assert torch.equal(masks(loaded, inputs), masks(model, inputs))


def test_an_adapter_on_a_whole_model_belongs_to_its_sam(model, sam_folder, tmp_path):
    model.save_pretrained(tmp_path / "whole")
    loaded = IMedSamModel.from_pretrained(tmp_path / "whole")
    loaded.add_adapter(adapter_name="other")
    loaded.save_adapter(tmp_path / "adapter")
    assert PeftConfig.from_pretrained(tmp_path / "adapter").base_model_name_or_path == str(sam_folder)


def test_of_sam_vit_base_an_adapter_is_small(tmp_path):
    """At most 7 MB in float32 with one class, whatever SAM weighs."""
    torch.manual_seed(0)
    model = IMedSamModel(IMedSamConfig())
    model.config.base_model_sha256 = "0" * 64  # SAM's own weights cannot be had everywhere
    model.add_adapter()
    model.save_adapter(tmp_path)
    files = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert 4 * 1.5e6 < files < 7e6
    assert sum(p.numel() for p in model.vision_encoder.parameters()) > 80e6


@torch.no_grad()
def test_an_adapter_takes_the_arguments_that_a_whole_model_takes(model, inputs, tmp_path):
    model.save_adapter(tmp_path / "adapter")
    model.save_pretrained(tmp_path / "whole")
    values = {"uncertainty": "monte_carlo", "monte_carlo_samples": 3, "id2label": {0: "polyp"}}
    alone, whole = (IMedSamModel.from_pretrained(tmp_path / kind, **values) for kind in ("adapter", "whole"))
    assert alone.config.uncertainty == whole.config.uncertainty == "monte_carlo"
    assert alone.config.monte_carlo_samples == whole.config.monte_carlo_samples == 3
    assert alone.config.label2id == whole.config.label2id == {"polyp": 0}
    assert torch.equal(alone(**inputs).uncertainty, whole(**inputs).uncertainty)
    assert not torch.equal(alone(**inputs).uncertainty, model(**inputs).uncertainty)
    for kind in ("adapter", "whole"):
        assert IMedSamModel.from_pretrained(tmp_path / kind, dtype=torch.bfloat16).dtype == torch.bfloat16
        with pytest.raises(ValueError, match="Expected no output_loading_info"):
            IMedSamModel.from_pretrained(tmp_path / kind, output_loading_info=True)
        with pytest.raises(ValueError, match="Expected the LoRA of the adapter at .*, got values for lora_rank"):
            IMedSamModel.from_pretrained(tmp_path / kind, lora_rank=8)
    with pytest.raises(ValueError, match="Expected config or values for it, got both: put dropout into the config"):
        IMedSamModel.from_pretrained(tmp_path / "adapter", config=model.config, dropout=0.1)


def test_an_adapter_alone_is_not_put_on_another_whole_model(model, tmp_path):
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Expected a folder for the adapter alone, got one with a whole model"):
        model.save_adapter(tmp_path)
    model.save_pretrained(tmp_path)


def test_revision_and_subfolder_are_the_adapters_alone(model, inputs, tmp_path):
    model.save_adapter(tmp_path / "liver")
    loaded = IMedSamModel.from_pretrained(tmp_path, subfolder="liver", revision="main")
    assert torch.equal(masks(loaded, inputs), masks(model, inputs))


@pytest.mark.parametrize("whole", [False, True])
def test_loaded_merged_and_saved_over_itself(model, inputs, tmp_path, whole):
    """The adapter that lay in the folder is not loaded on top of the weights that hold it."""
    expected = masks(model, inputs)
    model.save_pretrained(tmp_path) if whole else model.save_adapter(tmp_path)
    merged = IMedSamModel.from_pretrained(tmp_path).merge_and_unload()
    merged.save_pretrained(tmp_path)
    loaded = IMedSamModel.from_pretrained(tmp_path)
    assert torch.equal(masks(loaded, inputs), masks(merged, inputs))
    assert_close(masks(loaded, inputs), expected, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("whole", [False, True])
def test_a_truncated_checkpoint_is_refused(model, tmp_path, whole):
    model.save_pretrained(tmp_path) if whole else model.save_adapter(tmp_path)
    path = tmp_path / ("model.safetensors" if whole else "adapter_model.safetensors")
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(
        ValueError, match="Expected a whole checkpoint at .*, got a damaged one .*: copy or download it again"
    ):
        IMedSamModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("whole", [False, True])
def test_an_adapter_with_a_part_missing_is_refused(model, tmp_path, whole):
    model.save_pretrained(tmp_path) if whole else model.save_adapter(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if "coarse.head.weight" in name)
    del tensors[name]
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ValueError, match="Expected an adapter for this model's configuration, got one with missing"):
        IMedSamModel.from_pretrained(tmp_path)


def test_a_whole_model_without_some_of_its_weights_is_refused(from_sam, tiny_sam, tmp_path):
    """Which transformers would fill at random, or leave out."""
    model = from_sam()
    model.save_pretrained(tmp_path / "with adapter")
    with pytest.raises(ValueError, match="Expected no base_model_name_or_path with .*: it is a whole model"):
        IMedSamModel.from_pretrained(tmp_path / "with adapter", base_model_name_or_path=tmp_path)
    (tmp_path / "with adapter" / "adapter_config.json").unlink()
    with pytest.raises(ValueError, match="Expected adapter_config.json beside adapter_model.safetensors at"):
        IMedSamModel.from_pretrained(tmp_path / "with adapter")
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    path = tmp_path / "merged" / "model.safetensors"
    tensors = load_file(path)
    del tensors["vision_encoder.pos_embed"]
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ValueError, match="got one without vision_encoder.pos_embed: copy or download it again"):
        IMedSamModel.from_pretrained(tmp_path / "merged")
    tiny_sam().save_pretrained(tmp_path / "sam")
    shutil.copy(tmp_path / "sam" / "model.safetensors", path)
    with pytest.raises(ValueError, match="Expected a whole model at .* and [0-9]+ more"):
        IMedSamModel.from_pretrained(tmp_path / "merged")


def test_a_whole_model_that_lost_its_adapter_is_refused(model, tiny_config, tmp_path, caplog):
    """Its base alone would be loaded, as if it had never been trained."""
    model.save_pretrained(tmp_path / "whole")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "whole" / name).unlink()
    with pytest.raises(ValueError, match="Expected adapter_config.json and .* at .*lora_rank=4, got neither: copy or"):
        IMedSamModel.from_pretrained(tmp_path / "whole")
    base = IMedSamModel.from_pretrained(tmp_path / "whole", lora_rank=0, lora_targets=[])
    assert_close(base.state_dict(), model._base_state_dict(), rtol=0, atol=0)
    IMedSamModel(tiny_config()).save_pretrained(tmp_path / "new")  # which never had one
    with caplog.at_level("WARNING"):
        logging.enable_propagation()
        try:
            IMedSamModel.from_pretrained(tmp_path / "new")
        finally:
            logging.disable_propagation()
    assert "No adapter at" in caplog.text and "LoRA would start anew" in caplog.text


@pytest.mark.parametrize("place", ["folder", "cache"])
def test_a_whole_model_in_several_files_needs_no_sam(model, inputs, tmp_path, place):
    revision = "0" * 40
    folder = tmp_path / "models--someone--imedsam" / "snapshots" / revision
    model.name_or_path = model.peft_config["default"].base_model_name_or_path = "/nowhere"
    model.save_pretrained(folder, max_shard_size="50KB")
    assert not (folder / "model.safetensors").exists()
    where = {"cache_dir": tmp_path, "revision": revision} if place == "cache" else {}
    loaded = IMedSamModel.from_pretrained("someone/imedsam" if where else folder, **where)
    assert torch.equal(masks(loaded, inputs), masks(model, inputs))
    with pytest.raises(ValueError, match="Expected no base_model_name_or_path with .*: it is a whole model"):
        IMedSamModel.from_pretrained(folder, base_model_name_or_path=tmp_path)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("sizes", [("5GB", "50KB"), ("50KB", "5GB")], ids=str)
def test_saved_over_another_in_other_files_it_comes_back(from_sam, inputs, tmp_path, merged, sizes):
    for seed, size in enumerate(sizes):
        model = from_sam(seed=seed)
        model = model.merge_and_unload() if merged else model
        model.save_pretrained(tmp_path, max_shard_size=size)
    assert (tmp_path / "model.safetensors").exists() == (size == "5GB")
    assert (tmp_path / "model.safetensors.index.json").exists() == (size == "50KB")
    assert torch.equal(masks(IMedSamModel.from_pretrained(tmp_path), inputs), masks(model, inputs))


def change_json(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda folder: (folder / "config.json").unlink(), "Expected an? .* at .*, got no"),
        (
            lambda folder: (folder / "adapter_model.safetensors").unlink(),
            "its adapter_model.safetensors at .*, got no",
        ),
        (
            lambda folder: (folder / "adapter_config.json").write_text('{"r": '),
            "JSON in .*, got a damaged file .*: copy",
        ),
        (lambda folder: (folder / "adapter_config.json").write_text("[1]"), r"an object in .*, got \[1\]: copy"),
        (lambda folder: change_json(folder / "adapter_config.json", peft_type="X"), "peft_type 'LORA' at .*, got 'X'"),
        (lambda folder: change_json(folder / "adapter_config.json", r=8), "with r 4, as the .* says, got 8: make"),
        (lambda folder: change_json(folder / "adapter_config.json", lora_alpha=1), "with lora_alpha 4.*, got 1: make"),
        (lambda folder: change_json(folder / "adapter_config.json", target_modules="x"), "target_modules .*, got 'x'"),
        (
            lambda folder: change_json(folder / "config.json", lora_targets=["k_proj"]),
            "target_modules .*k_proj.*, got",
        ),
    ],
)
def test_a_damaged_adapter_says_what_to_do(model, tmp_path, whole, damage, message):
    model.save_pretrained(tmp_path) if whole else model.save_adapter(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        IMedSamModel.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message.replace("got no", "got none: copy or download it again")):
        model.load_adapter(str(tmp_path), "other")
    assert list(model.peft_config) == ["default"]


def test_an_adapter_that_knows_no_sam_is_refused(model, tmp_path):
    model.save_adapter(tmp_path)
    change_json(tmp_path / "config.json", base_model_sha256=None)
    with pytest.raises(
        ValueError, match="to know the weights of its SAM, got no base_model_sha256 in its config.json"
    ):
        IMedSamModel.from_pretrained(tmp_path)


def test_a_folder_that_is_not_there_is_named(model, tmp_path):
    for load in (IMedSamModel.from_pretrained, load_model, lambda path: model.load_adapter(path, "other")):
        with pytest.raises(
            OSError, match="Expected a model's folder .*, got .*/nothing, where no folder is: check it"
        ):
            load(str(tmp_path / "nothing"))
    with pytest.raises(OSError, match="got .*/liver, where no folder is"):
        IMedSamModel.from_pretrained(tmp_path, subfolder="liver")


@pytest.mark.parametrize("name", ["outputs/nothing", "nothing"])
def test_what_may_be_a_name_on_the_hub_is_said_to_be_neither(model, name):
    """These tests are offline, where transformers would speak of the connection alone."""
    for load in (
        IMedSamModel.from_pretrained,
        IMedSamModel.from_sam_pretrained,
        load_model,
        find_model_class,
        lambda path: model.load_adapter(path, "other"),
    ):
        with pytest.raises(OSError, match=f"got {name}: there is no such folder, and nothing of that name in the Hub"):
            load(name)
    assert list(model.peft_config) == ["default"]


def test_a_new_adapter_is_as_the_configuration_says(model):
    with pytest.raises(ValueError, match="Expected an adapter with r 4, as the configuration says, got 2: make the"):
        model.add_adapter(LoraConfig(r=2), "other")
    assert list(model.peft_config) == ["default"]


def test_commands_look_for_the_sam_of_an_adapter_where_they_are_told(sam_folder, tmp_path):
    shutil.copytree(sam_folder, tmp_path / "sam")
    model = IMedSamModel.from_sam_pretrained(
        tmp_path / "sam", image_size=64, frequency_view=None, coarse_widths=[32, 32], fine_widths=[32, 32]
    )
    model.save_adapter(tmp_path / "adapter")
    make_processor().save_pretrained(tmp_path / "adapter")
    (tmp_path / "sam").rename(tmp_path / "moved")
    Image.effect_noise((50, 40), 60).save(tmp_path / "image.png")
    commands = {
        "predict": ["--image", tmp_path / "image.png", "--box", 5, 5, 30, 20],
        "evaluate": ["--data", "phantoms", "--num-images", 1],
        "convert": [],
    }
    for name, flags in commands.items():
        command = [name, "--model", tmp_path / "adapter", "-o", tmp_path / name, *flags]
        result = CliRunner().invoke(app, list(map(str, command)))
        said = " ".join(result.output.replace("│", " ").split())
        assert result.exit_code == 2 and "(--base-model)" in said and not (tmp_path / name).exists()
        result = CliRunner().invoke(app, [*map(str, command), "--base-model", str(tmp_path / "moved")])
        assert result.exit_code == 0 and (tmp_path / name).is_dir(), result.output


@torch.no_grad()
def test_an_adapter_goes_to_the_device_that_is_asked_for(model, inputs, tmp_path):
    model.save_adapter(tmp_path)
    expected = masks(model, inputs)
    for device_map in ("cpu", {"": "cpu"}, torch.device("cpu")):
        loaded = IMedSamModel.from_pretrained(tmp_path, device_map=device_map)
        assert torch.equal(masks(loaded, inputs), expected)
    assert IMedSamModel.from_pretrained(tmp_path, device_map="meta").device.type == "meta"
    for device_map in ("nowhere", {"vision_encoder": "cpu", "mask_decoder": "meta"}):
        with pytest.raises(ValueError, match="Expected a device_map of one device, such as"):
            IMedSamModel.from_pretrained(tmp_path, device_map=device_map)


def test_a_sam_checkpoint_says_what_to_do(sam_folder):
    with pytest.raises(
        ValueError, match="got one of type 'sam': start from a SAM with IMedSamModel.from_sam_pretrained"
    ):
        IMedSamModel.from_pretrained(sam_folder)


def test_a_checkpoint_that_is_no_sam_is_refused(tiny_sam, tmp_path):
    sam = tiny_sam()
    state_dict = {key: value for key, value in sam.state_dict().items() if "pos_embed" not in key}
    sam.save_pretrained(tmp_path, state_dict=state_dict)
    with pytest.raises(ValueError, match=r"Expected SAM's weights at .*, got missing \['vision_encoder.pos_embed'\]"):
        IMedSamModel.from_sam_pretrained(tmp_path, image_size=64)


def test_saving_obeys_its_arguments(model, tmp_path):
    model.save_pretrained(tmp_path / "other process", is_main_process=False)
    assert not (tmp_path / "other process").exists()
    with pytest.raises(ValueError, match=r"Expected no state_dict for a model with an adapter.*merge_and_unload\(\)"):
        model.save_pretrained(tmp_path, state_dict={})
    model.save_pretrained(tmp_path / "parts", max_shard_size="50KB")
    assert len(list((tmp_path / "parts").glob("model-*.safetensors"))) > 1
    with pytest.raises(ValueError, match="push_to_hub=True: use model.push_to_hub"):
        model.save_pretrained(tmp_path, push_to_hub=True)


def test_stock_sam_is_what_was_loaded(sam_folder, from_sam):
    """Neither loading nor training touches the base."""
    expected, model = SamModel.from_pretrained(sam_folder).state_dict(), from_sam()
    base = model._base_state_dict()
    fused = torch.cat([base[f"vision_encoder.layers.1.attn.qkv.{p}_proj.weight"] for p in "qkv"])
    assert torch.equal(fused, expected["vision_encoder.layers.1.attn.qkv.weight"])
    for key, value in expected.items():
        if ".qkv." not in key and key != "shared_image_embedding.positional_embedding":
            assert torch.equal(base[key], value), key


@torch.no_grad()
@pytest.mark.parametrize(
    "values", [{}, {"train_mask_decoder": True}, {"implicit_decoder": False}, {"lora_rank": 0}], ids=str
)
def test_a_stock_sam_has_the_trained_encoder(from_sam, tiny_sam, inputs, tmp_path, values):
    """And, with implicit_decoder=False, gives the very masks."""
    model = from_sam(frequency_view=None, **values)
    model.to_sam().save_pretrained(tmp_path)
    sam = SamModel.from_pretrained(tmp_path).eval()
    pixels, boxes = inputs.values()
    embeddings = model.get_image_embeddings(pixels)
    assert_close(sam.get_image_embeddings(pixels), embeddings, atol=1e-5, rtol=1e-5)
    assert ((embeddings - tiny_sam().get_image_embeddings(pixels)).abs().max() > 0.1) == model._hf_peft_config_loaded
    if not model.config.implicit_decoder:
        output = sam(pixels, input_boxes=boxes - 0.5, multimask_output=False)
        assert_close(output.pred_masks, masks(model, inputs), atol=1e-4, rtol=1e-4)
    again = IMedSamModel.from_sam_pretrained(tmp_path, image_size=64, frequency_view=None)
    assert_close(again.get_image_embeddings(pixels), embeddings, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_small_update_survives_in_a_stock_sam(from_sam, dtype):
    """Which half precision would round away."""
    model = from_sam(frequency_view=None).to(dtype)
    layer = model.vision_encoder.layers[0].attn.qkv.q_proj
    layer.base_layer.weight.fill_(1)
    layer.lora_A["default"].weight.fill_(1e-2)
    layer.lora_B["default"].weight.fill_(1e-2)
    sam = model.to_sam()
    width = layer.base_layer.weight.shape[0]
    update = sam.vision_encoder.layers[0].attn.qkv.weight[:width] - 1
    expected = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    assert_close(update, expected.float(), atol=1e-6, rtol=1e-2)
    assert (1 + expected == 1).all() and sam.dtype == torch.float32 and model.dtype == dtype
    assert from_sam(frequency_view=None, lora_rank=0).to(dtype).to_sam().dtype == dtype
    model.disable_adapters()
    assert model.to_sam().dtype == dtype


@torch.no_grad()
def test_with_a_frequency_branch_there_is_no_stock_sam(model, tiny_sam, inputs):
    with pytest.raises(ValueError, match="a model without a frequency branch, got frequency_view='amplitude'"):
        model.to_sam()
    model.disable_adapters()
    assert_close(model.to_sam().state_dict(), tiny_sam().state_dict())

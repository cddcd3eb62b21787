"""An adapter's contract: disabled it is SAM, switched it is itself, merged it is the same function."""

import subprocess
import sys
from collections import OrderedDict
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from imedsam.modeling_imedsam import IMedSamModel


@pytest.fixture
def model(from_sam):
    return from_sam()


@torch.no_grad()
def masks(model, inputs):
    return model(**inputs, output_size=(16, 16)).pred_masks


@torch.no_grad()
@pytest.mark.parametrize("values", [{}, {"implicit_decoder": False}, {"train_mask_decoder": True}], ids=str)
def test_disabled_it_is_stock_sam(from_sam, tiny_sam, inputs, values):
    model = from_sam(**values)
    pixels, boxes = inputs.values()
    expected = tiny_sam()(pixels, input_boxes=boxes - 0.5, multimask_output=False).pred_masks
    enabled = masks(model, inputs)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    model.disable_adapters()
    assert_close(model.get_image_embeddings(pixels), tiny_sam().get_image_embeddings(pixels), atol=1e-5, rtol=0)
    assert_close(masks(model, inputs), expected, atol=1e-4, rtol=1e-4)
    model.enable_adapters()
    assert torch.equal(masks(model, inputs), enabled)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trainable
    assert (enabled - expected).abs().max() > 0.1


@torch.no_grad()
def test_a_new_adapter_leaves_sam_as_it_is(sam_folder, tiny_sam, inputs):
    model = IMedSamModel.from_sam_pretrained(sam_folder, image_size=64)
    pixels, boxes = inputs.values()
    expected = tiny_sam().get_image_embeddings(pixels)
    assert_close(model.get_image_embeddings(pixels), expected, atol=1e-5, rtol=0)
    model = IMedSamModel.from_sam_pretrained(sam_folder, image_size=64, implicit_decoder=False)
    expected = tiny_sam()(pixels, input_boxes=boxes - 0.5, multimask_output=False).pred_masks
    assert_close(masks(model, inputs), expected, atol=1e-4, rtol=1e-4)


def test_lora_is_on_what_the_configuration_names(from_sam):
    for targets in (["q_proj", "v_proj"], ["k_proj"]):
        model = from_sam(lora_targets=targets, lora_rank=3, lora_alpha=6)
        adapted = {name for name, p in model.named_parameters() if "lora_A" in name}
        prefix = "vision_encoder.layers.{}.attn.qkv.{}.lora_A.default.weight"
        assert adapted == {prefix.format(layer, target) for layer in range(2) for target in targets}
        layer = getattr(model.vision_encoder.layers[0].attn.qkv, targets[0])
        assert layer.scaling == {"default": 2.0} and layer.lora_A["default"].weight.shape == (3, 32)


@torch.no_grad()
def test_lora_is_w_plus_ba(from_sam):
    layer = from_sam(lora_rank=2, lora_alpha=6).vision_encoder.layers[0].attn.qkv.q_proj
    weight = layer.base_layer.weight + 3 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    tokens = torch.randn(4, 32)
    assert_close(layer(tokens), tokens @ weight.T + layer.base_layer.bias)
    assert (layer(tokens) - layer.base_layer(tokens)).abs().max() > 0.1


@pytest.mark.parametrize("values", [{}, {"implicit_decoder": False}, {"num_labels": 2}], ids=str)
def test_merged_it_is_the_same_function(from_sam, inputs, tmp_path, values):
    model = from_sam(**values)
    expected = masks(model, inputs)
    merged = model.merge_and_unload()
    assert merged is model and not any("lora" in name or "modules_to_save" in name for name in model.state_dict())
    assert_close(masks(model, inputs), expected, atol=2e-3, rtol=2e-3)
    assert model.config.lora_rank == 0 and "LoRA" not in model.parameter_parts()
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "adapter_config.json").exists()
    loaded = IMedSamModel.from_pretrained(tmp_path)
    assert torch.equal(masks(loaded, inputs), masks(model, inputs))
    assert loaded.merge_and_unload() is loaded
    weight = "vision_encoder.layers.0.attn.qkv.{}.weight"
    base = from_sam(lora_rank=0, **values).state_dict()
    for projection, changed in (("q_proj", True), ("k_proj", False), ("v_proj", True)):
        key = weight.format(projection)
        assert torch.equal(model.state_dict()[key], base[key]) != changed


def test_disabled_it_is_merged_all_the_same(from_sam, inputs):
    """As PEFT merges, here a linear layer and one that is saved with it."""
    layers = torch.nn.Sequential(OrderedDict(a=torch.nn.Linear(4, 4), b=torch.nn.Linear(4, 4)))
    config = LoraConfig(target_modules=["a"], modules_to_save=["b"], init_lora_weights=False)
    reference, tokens = get_peft_model(layers, config), torch.randn(2, 4)
    reference.base_model.model.b.modules_to_save["default"].weight.data += 1
    model = from_sam()
    enabled, expected = reference(tokens), masks(model, inputs)
    reference.base_model.disable_adapter_layers()
    model.disable_adapters()
    assert not torch.allclose(reference(tokens), enabled) and not torch.allclose(masks(model, inputs), expected)
    assert_close(reference.merge_and_unload()(tokens), enabled)
    assert_close(masks(model.merge_and_unload(), inputs), expected, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("name", ["second", "default-2", "default_2", "def"])
def test_adapters_on_one_base_are_switched(from_sam, inputs, tmp_path, name):
    """Each equals its own model and is trained alone, whatever the names have in common."""
    one, two = from_sam(seed=1), from_sam(seed=2)
    first, second = masks(one, inputs), masks(two, inputs)
    assert (first - second).abs().max() > 0.1
    one.save_adapter(tmp_path / "one")
    two.save_adapter(tmp_path / "two")
    model = IMedSamModel.from_pretrained(tmp_path / "one")
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    model.load_adapter(str(tmp_path / "two"), name)
    for adapter, expected in (("default", first), (name, second), ("default", first), (name, second)):
        model.set_adapter(adapter)
        assert model.active_adapters() == [adapter]
        assert torch.equal(masks(model, inputs), expected)
        trainable = {key for key, p in model.named_parameters() if p.requires_grad}
        assert all(adapter in key.split(".") for key in trainable)
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count
    # What is saved is the active one.
    model.save_adapter(tmp_path / "again")
    assert torch.equal(masks(IMedSamModel.from_pretrained(tmp_path / "again"), inputs), second)
    model.save_pretrained(tmp_path / "whole")
    assert torch.equal(masks(IMedSamModel.from_pretrained(tmp_path / "whole"), inputs), second)
    assert_close(masks(model.merge_and_unload(), inputs), second, atol=2e-3, rtol=2e-3)


@torch.no_grad()
def test_tasks_of_other_classes_share_an_encoder(from_sam, inputs, tmp_path):
    polyps, organs = from_sam(seed=1, id2label={0: "polyp"}), from_sam(seed=2, id2label={0: "liver", 1: "spleen"})
    polyps.save_adapter(tmp_path / "polyps")
    organs.save_adapter(tmp_path / "organs")
    model = IMedSamModel.from_pretrained(tmp_path / "polyps")
    model.load_adapter(str(tmp_path / "organs"), "organs")
    assert model.active_adapters() == ["default"] and torch.equal(masks(model, inputs), masks(polyps, inputs))
    base = model.vision_encoder.layers[0].attn.qkv.q_proj.base_layer.weight.data_ptr()
    for name, task in (("organs", organs), ("default", polyps), ("organs", organs)):
        model.set_adapter(name)
        assert model.config.id2label == task.config.id2label and model.config.label2id == task.config.label2id
        assert torch.equal(masks(model, inputs), masks(task, inputs))
        labels = {"class_labels": torch.full((2, 2), task.config.num_labels - 1)}
        assert torch.equal(masks(model, {**inputs, **labels}), masks(task, {**inputs, **labels}))
    assert model.vision_encoder.layers[0].attn.qkv.q_proj.base_layer.weight.data_ptr() == base
    assert sum("base_layer.weight" in key for key in model.state_dict()) == 4  # q and v of two layers, once each
    model.save_adapter(tmp_path / "again")
    assert torch.equal(masks(IMedSamModel.from_pretrained(tmp_path / "again"), inputs), masks(organs, inputs))
    for name, task in (("organs", organs), ("default", polyps)):
        model.set_adapter(name)
        model.save_pretrained(tmp_path / f"whole {name}")
        loaded = IMedSamModel.from_pretrained(tmp_path / f"whole {name}")
        assert torch.equal(masks(loaded, inputs), masks(task, inputs))


def test_a_second_new_adapter_starts_at_sam_and_leaves_the_first_alone(model, inputs, tiny_sam):
    first = masks(model, inputs)
    model.add_adapter(adapter_name="other")
    with torch.no_grad():
        expected = tiny_sam().get_image_embeddings(inputs["pixel_values"])
        assert_close(model.get_image_embeddings(inputs["pixel_values"]), expected, atol=1e-5, rtol=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(**inputs, labels=torch.ones(2, 2, 16, 16)).loss.backward()
    optimizer.step()
    model.set_adapter("default")
    assert torch.equal(masks(model, inputs), first)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"frequency_view": None}, "Expected an adapter with frequency_view 'amplitude', got None at .*: load it by"),
        ({"frequency_view": "haar"}, "Expected an adapter with frequency_view 'amplitude', got 'haar' at"),
        ({"image_size": 96}, "Expected an adapter with image_size 64, got 96 at"),
        ({"prompt_frame": False}, "Expected an adapter with prompt_frame True, got False at"),
        ({"pixel_decoder_width": 12}, "Expected an adapter with pixel_decoder_width None, got 12 at"),
        ({"selection": None}, "Expected an adapter with selection 'threshold', got None at"),
        ({"selection_share": 0.5}, "Expected an adapter with selection_share 0.125, got 0.5 at"),
        ({"train_mask_decoder": True}, "Expected an adapter with train_mask_decoder False, got True at"),
        ({"frequency_hidden": 7}, "Expected an adapter with frequency_hidden 4, got 7 at"),
    ],
    ids=str,
)
def test_an_adapter_of_another_configuration_is_refused(from_sam, tmp_path, values, message):
    from_sam(**values).save_adapter(tmp_path)
    with pytest.raises(ValueError, match=message):
        from_sam().load_adapter(str(tmp_path), "other")


def test_a_refused_adapter_leaves_the_model_as_it_was(from_sam, inputs, tmp_path):
    from_sam(seed=2).save_adapter(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    del tensors[next(name for name in tensors if "coarse.head.weight" in name)]
    save_file(tensors, path, {"format": "pt"})
    model = from_sam(seed=1)
    expected = masks(model, inputs)
    with pytest.raises(ValueError, match="got one with missing"):
        model.load_adapter(str(tmp_path), "other")
    assert model.active_adapters() == ["default"] and torch.equal(masks(model, inputs), expected)
    from_sam(seed=2).save_adapter(tmp_path / "whole")
    model.load_adapter(str(tmp_path / "whole"), "other")
    model.set_adapter("other")
    assert torch.equal(masks(model, inputs), masks(from_sam(seed=2), inputs))


@pytest.mark.parametrize("kept", [0, 500, 0.5])
def test_a_damaged_adapter_leaves_the_model_as_it_was(from_sam, inputs, tmp_path, kept):
    from_sam(seed=2).save_adapter(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(kept if kept > 1 else kept * len(content))])
    model = from_sam(seed=1)
    expected = masks(model, inputs)
    with pytest.raises(ValueError, match="Expected a whole checkpoint at .*, got a damaged one"):
        model.load_adapter(str(tmp_path), "other")
    assert model.active_adapters() == ["default"] and torch.equal(masks(model, inputs), expected)
    path.write_bytes(content)
    model.load_adapter(str(tmp_path), "other")
    model.set_adapter("other")
    assert torch.equal(masks(model, inputs), masks(from_sam(seed=2), inputs))


def test_deleted_adapters_leave_the_others(from_sam, inputs, tmp_path):
    one, two = from_sam(seed=1), from_sam(seed=2, num_labels=2, lora_rank=2)
    two.save_adapter(tmp_path)
    model = from_sam(seed=1)
    model.load_adapter(str(tmp_path), "two")
    model.set_adapter("two")
    assert model.config.lora_rank == 2 and torch.equal(masks(model, inputs), masks(two, inputs))
    model.delete_adapter("two")
    assert model.active_adapters() == ["default"] and torch.equal(masks(model, inputs), masks(one, inputs))
    model.load_adapter(str(tmp_path), "two")
    model.delete_adapter("default")
    assert model.active_adapters() == ["two"] and torch.equal(masks(model, inputs), masks(two, inputs))
    assert model.config.num_labels == 2 and model.config.lora_rank == 2
    with pytest.raises(ValueError, match="Expected an adapter to be left, got two to delete, which are all"):
        model.delete_adapter("two")
    model.save_adapter(tmp_path / "again")
    assert torch.equal(masks(IMedSamModel.from_pretrained(tmp_path / "again"), inputs), masks(two, inputs))


def test_what_is_changed_in_the_configuration_stays_the_adapters(from_sam, tmp_path):
    from_sam(seed=2, id2label={0: "liver", 1: "spleen"}).save_adapter(tmp_path)
    model = from_sam(seed=1)
    model.config.id2label = {0: "polyp"}
    model.load_adapter(str(tmp_path), "organs")
    assert model.config.id2label == {0: "polyp"}
    model.set_adapter("organs")
    assert model.config.id2label == {0: "liver", 1: "spleen"}
    model.config.id2label[1] = "kidney"
    model.config.monte_carlo_samples = 3
    model.set_adapter("default")
    assert model.config.id2label == {0: "polyp"} and model.config.monte_carlo_samples == 8
    model.set_adapter("organs")
    assert model.config.id2label == {0: "liver", 1: "kidney"} and model.config.monte_carlo_samples == 3
    assert model.config.label2id == {"liver": 0, "kidney": 1}
    model.config.id2label[0] = "pancreas"
    model.add_adapter(adapter_name="third")
    model.config.monte_carlo_samples = 5
    model.delete_adapter("default")
    model.set_adapter("organs")
    assert model.config.id2label == {0: "pancreas", 1: "kidney"} and model.config.monte_carlo_samples == 3
    model.set_adapter("third")
    assert model.config.monte_carlo_samples == 5


def test_an_adapters_name_has_no_dot(from_sam, tmp_path):
    model = from_sam()
    model.save_adapter(tmp_path)
    for refused in (lambda: model.load_adapter(str(tmp_path), "a.b"), lambda: model.add_adapter(adapter_name="a.b")):
        with pytest.raises(ValueError, match="Expected an adapter's name without dots, .* got 'a.b': write 'a_b'"):
            refused()
    assert list(model.peft_config) == ["default"]


def test_a_first_adapter_is_put_on_its_own_sam_alone(from_sam, tmp_path):
    config = deepcopy(from_sam().config)
    from_sam().save_adapter(tmp_path)
    config.base_model_sha256 = None  # of weights that are no SAM's
    with pytest.raises(ValueError, match="Expected an adapter with base_model_sha256 None, got '"):
        IMedSamModel(config).load_adapter(str(tmp_path))


def test_merged_it_is_no_longer_on_its_sam(model, tmp_path):
    """An adapter that is trained on it then belongs to it, and would be put on the SAM."""
    assert model.config.base_model_sha256 is not None
    merged = model.merge_and_unload()
    assert merged.config.base_model_sha256 is None and not merged.name_or_path
    merged.config.lora_rank, merged.config.lora_targets = 2, ["q_proj"]
    merged.add_adapter()
    with pytest.raises(ValueError, match="Expected an adapter on a SAM, got one on weights that are no SAM's"):
        merged.save_adapter(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_example_of_two_tasks(sam_folder, tmp_path):
    example = Path(__file__).parents[1] / "examples" / "two_tasks.py"
    flags = ["--base", sam_folder, "--output_dir", tmp_path / "out", "--image_size", "64", "--steps", "4"]
    command = list(map(str, [sys.executable, example, *flags]))
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    assert "ultrasound: classes object; " in done.stdout and "tomography: classes lesion, organ; " in done.stdout
    with Image.open(tmp_path / "out" / "two_tasks.png") as picture:
        assert min(picture.size) > 200


def test_without_an_adapter(from_sam, tmp_path):
    model = from_sam(lora_rank=0)
    with pytest.raises(ValueError, match="a model with an adapter, got one without: use save_pretrained"):
        model.save_adapter(tmp_path)
    with pytest.raises(ValueError, match="lora_rank of at least 1 for an adapter, got 0"):
        model.add_adapter()
    with pytest.raises(ValueError, match="Expected a model with adapters to delete default of, got one without"):
        model.delete_adapter("default")
    from_sam().save_adapter(tmp_path)
    for alone in (model, from_sam().merge_and_unload()):
        with pytest.raises(ValueError, match="a model with LoRA to load .*, got one without, or with LoRA merged"):
            alone.load_adapter(tmp_path)

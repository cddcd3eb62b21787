"""The family's original files against references that were written from the published architectures."""

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from reference_sam import ReferenceEfficientSam, ReferenceSam, ReferenceSamMed2d, randomise
from safetensors.torch import save_file
from torch.testing import assert_close
from transformers import SamModel
from typer.testing import CliRunner

from imedsam import IMedSamModel, SFRecSamModel
from imedsam.sam_checkpoints import load_sam
from imedsam.training.cli import app

BOXES = torch.tensor([[8.0, 12.0, 40.0, 50.0], [0.0, 3.0, 64.0, 30.0]])
# Tiny, with the eight heads that all decoders of the family have.
SIZES = {"decoder_width": 64, "decoder_heads": 8}


def pixels(side=64):
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))


def save(module, path, **beside):
    torch.save({"model": module.state_dict(), **beside} if beside else module.state_dict(), path)
    return path


@torch.no_grad()
@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"image_size": 112, "depth": 6, "global_blocks": (0, 2, 5), "width": 48, "heads": 3},
        {"image_size": 256, "depth": 3, "window": 14, "global_blocks": (1,), "mask_hidden": 8, "iou_hidden": 16},
        {"patch_size": 8, "global_blocks": (), "window": 5, "decoder_hidden": 32},
        {"image_size": 96, "global_blocks": (0, 1, 2, 3)},
        {"image_size": 48, "window": 3, "global_blocks": (1,)},  # windows as large as the image
    ],
    ids=str,
)
def test_segment_anything(tmp_path, sizes):
    reference = randomise(ReferenceSam(**{**SIZES, **sizes}), 0).eval()
    side = sizes.get("image_size", 64)
    image_embeddings, masks, scores = reference(pixels(side), BOXES)
    sam = load_sam(save(reference, tmp_path / "sam.pth")).to_model()
    output = sam(pixels(side), input_boxes=BOXES[:, None], multimask_output=True)
    single = sam(pixels(side), input_boxes=BOXES[:, None], multimask_output=False)
    assert_close(sam.get_image_embeddings(pixels(side)), image_embeddings, atol=1e-5, rtol=1e-5)
    assert_close(output.pred_masks[:, 0], masks[:, 1:], atol=1e-5, rtol=1e-5)
    assert_close(output.iou_scores[:, 0], scores[:, 1:], atol=1e-5, rtol=1e-5)
    assert_close(single.pred_masks[:, 0], masks[:, :1], atol=1e-5, rtol=1e-5)
    prompts, theirs = sam.prompt_encoder, reference.prompt_encoder  # of what a box does not show
    assert torch.equal(prompts.point_embed[0].weight, theirs.point_embeddings[0].weight)
    assert torch.equal(prompts.point_embed[1].weight, theirs.point_embeddings[1].weight)
    assert torch.equal(prompts.not_a_point_embed.weight, theirs.not_a_point_embed.weight)
    mask = torch.randn(2, 1, side, side)
    assert_close(prompts.mask_embed(mask), theirs.mask_downscaling(mask), atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("layout", ["model", "state_dict", "module.", "safetensors", "pixel_mean"])
def test_what_trainings_wrap_around_it(tmp_path, layout):
    state_dict = randomise(ReferenceSam(**SIZES), 0).state_dict()
    path = tmp_path / "sam.pth"
    if layout == "safetensors":
        path = tmp_path / "sam.safetensors"
        save_file(state_dict, path)
    elif layout == "module.":
        torch.save({f"module.{key}": value for key, value in state_dict.items()}, path)
    elif layout == "pixel_mean":
        torch.save({**state_dict, "pixel_mean": torch.ones(3, 1, 1), "pixel_std": torch.ones(3, 1, 1)}, path)
    else:
        torch.save({layout: state_dict, "epoch": 3, "optimizer": {"state": {}, "param_groups": []}}, path)
    plain = tmp_path / "plain.pth"
    torch.save(state_dict, plain)
    assert load_sam(path).sha256() == load_sam(plain).sha256()


def test_a_weight_in_another_place_is_another_base(tmp_path):
    weights = randomise(ReferenceSam(**SIZES), 0).state_dict()
    one, other = "image_encoder.blocks.0.attn.proj.weight", "image_encoder.blocks.1.attn.proj.weight"
    torch.save(weights, tmp_path / "sam.pth")
    torch.save({**weights, one: weights[other], other: weights[one]}, tmp_path / "swapped.pth")
    assert load_sam(tmp_path / "sam.pth").sha256() != load_sam(tmp_path / "swapped.pth").sha256()


@torch.no_grad()
def test_sam_med2d_without_its_adapters(tmp_path, monkeypatch):
    reference = randomise(ReferenceSamMed2d(**SIZES), 0).eval()
    path = save(reference, tmp_path / "sam-med2d_b.pth", epoch=1)
    adapted = reference.image_encoder(pixels())
    reference.image_encoder.adapted = False
    messages = []  # transformers' loggers reach neither the root's handlers nor what pytest captures
    monkeypatch.setattr("imedsam.sam_checkpoints.logger.warning", messages.append)
    sam = load_sam(path).to_model()
    assert len(messages) == 1 and "Left out 24 weights of SAM-Med2D's adapters" in messages[0]
    assert_close(sam.get_image_embeddings(pixels()), reference.image_encoder(pixels()), atol=1e-5, rtol=1e-5)
    assert (sam.get_image_embeddings(pixels()) - adapted).abs().max() > 0.1


@torch.no_grad()
def test_efficient_sam(tmp_path):
    sizes = {"image_size": 1024, "width": 128, "heads": 2, "depth": 2, "pretrained_grid": 14, "decoder_width": 64}
    reference = randomise(ReferenceEfficientSam(**sizes), 0).eval()
    path = save(reference, tmp_path / "efficient_sam_vitt.pt", epoch=1)
    torch.manual_seed(0)
    values = {"lora_rank": 0, "frequency_view": None, "train_mask_decoder": True}
    model = IMedSamModel.from_sam_pretrained(path, image_size=1024, **values)
    one = pixels(1024)[:1]
    assert_close(model.get_image_embeddings(one), reference.embed_images(one), atol=2e-5, rtol=1e-5)
    assert model.config.sam_config.vision_config.num_attention_heads == 2
    prompt_encoder = SamModel(model.config.sam_config).prompt_encoder
    prompt_encoder.load_state_dict(model.prompt_encoder.state_dict())
    tokens, _ = prompt_encoder(None, None, BOXES[:, None], None)
    assert_close(tokens[:, 0], reference.embed_boxes(BOXES), atol=1e-5, rtol=1e-5)
    for model_class in (IMedSamModel, SFRecSamModel):
        with pytest.raises(
            ValueError, match="Expected train_mask_decoder=True to start from .*, which has no mask decoder"
        ):
            model_class.from_sam_pretrained(path, image_size=64)
    SFRecSamModel.from_sam_pretrained(path, image_size=64, train_mask_decoder=True)
    with pytest.raises(
        ValueError, match="Expected a whole SAM, got .* without mask_decoder., prompt_encoder.mask_embed."
    ):
        load_sam(path).to_model()


@torch.no_grad()
def test_a_file_and_the_folder_that_it_is_converted_to_are_one_base(tmp_path, inputs):
    path = save(randomise(ReferenceSam(**SIZES), 0), tmp_path / "sam.pth")
    load_sam(path).to_model().save_pretrained(tmp_path / "folder")
    torch.manual_seed(0)
    model = IMedSamModel.from_sam_pretrained(path, image_size=96, selection_lattice=16)
    model.save_adapter(tmp_path / "adapter")
    inputs["pixel_values"] = pixels(96)
    expected = model(**inputs, output_size=(16, 16)).pred_masks
    for base in (None, tmp_path / "folder"):
        loaded = IMedSamModel.from_pretrained(tmp_path / "adapter", base_model_name_or_path=base)
        assert torch.equal(loaded(**inputs, output_size=(16, 16)).pred_masks, expected)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda w: w.pop("mask_decoder.iou_token.weight"),
            "what looks like a SAM of which some is missing or changed",
        ),
        (lambda w: w.pop("mask_decoder.iou_token.weight"), "a file without mask_decoder.iou_token.weight."),
        (lambda w: w.pop("image_encoder.pos_embed"), "a file without vision_encoder.pos_embed."),
        (lambda w: w.update({"image_encoder.extra": torch.ones(1)}), "with vision_encoder.extra beside SAM's"),
        (
            lambda w: w.update({"image_encoder.blocks.1.attn.proj.weight": torch.ones(3, 3)}),
            r"do not fit each other: vision_encoder.layers.1.attn.proj.weight \(3, 3\) instead of \(32, 32\)",
        ),
        (
            lambda w: [w.pop(key) for key in list(w) if key.startswith("mask_decoder")],
            r"without mask_decoder.iou_prediction_head.layers.0.bias, .* and \d+ more",
        ),
    ],
)
def test_a_partial_file_says_what_is_missing(tmp_path, change, message):
    weights = ReferenceSam(**SIZES).state_dict()
    change(weights)
    torch.save(weights, tmp_path / "sam.pth")
    with pytest.raises(
        ValueError, match=f"Expected the weights of SAM, MedSAM, SAM-Med2D or EfficientSAM at .*{message}"
    ):
        load_sam(tmp_path / "sam.pth")


@pytest.mark.parametrize(
    "key, message",
    [
        ("vision_encoder.layers.0.attn.qkv.weight", "a SamModel of transformers: give its folder"),
        ("image_encoder.trunk.patch_embed.proj.weight", "SAM 2"),
        ("image_encoder.patch_embed.seq.0.c.weight", "MobileSAM"),
        ("image_encoder.backbone.stages.0.weight", "EfficientViT-SAM"),
        ("blocks.0.attn.qkv.weight", "a ViT by itself"),
        ("fc.weight", "something else"),
    ],
)
def test_another_file_says_what_it_looks_like(tmp_path, key, message):
    torch.save({key: torch.ones(2, 2)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=f"got what looks like {message}.*: a file without"):
        load_sam(tmp_path / "other.pth")


class Bomb:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_nothing_of_a_file_is_run(tmp_path):
    path, bomb = tmp_path / "sam.pth", Bomb(tmp_path / "exploded")
    path.write_bytes(pickle.dumps(bomb, protocol=2))
    with pytest.raises(ValueError, match="Expected a file of weights alone"):
        load_sam(path)
    for content in (bomb, {"model": ReferenceSam(**SIZES).state_dict(), "arguments": bomb}):
        torch.save(content, path)
        with pytest.raises(ValueError, match="Expected a file of weights alone at .*, got other objects"):
            load_sam(path)
    assert not (tmp_path / "exploded").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "exploded").exists()


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(OSError, match="Expected a file at .*sam.pth, got none: check its path."):
        IMedSamModel.from_sam_pretrained(tmp_path / "sam.pth")


def test_a_damaged_file_says_so(tmp_path):
    path = save(ReferenceSam(**SIZES), tmp_path / "sam.pth")
    content = path.read_bytes()
    for kept in (0, 1000, len(content) // 2, len(content) - 100):
        path.write_bytes(content[:kept])
        with pytest.raises(
            ValueError, match="Expected a whole checkpoint at .*damaged|Expected a file of weights alone"
        ):
            load_sam(path)


@torch.no_grad()
def test_the_command_writes_a_stock_folder(from_sam, inputs, tmp_path):
    reference = randomise(ReferenceSam(**SIZES), 0).eval()
    path = save(reference, tmp_path / "medsam_vit_b.pth")
    result = CliRunner().invoke(app, ["convert", "--model", str(path), "-o", str(tmp_path / "medsam")])
    assert result.exit_code == 0 and "4 blocks of width 32, 64 x 64 pixels" in result.output
    sam = SamModel.from_pretrained(tmp_path / "medsam").eval()
    assert_close(sam.get_image_embeddings(pixels()), reference(pixels(), BOXES)[0], atol=1e-5, rtol=1e-5)
    assert load_sam(tmp_path / "medsam").sha256() == load_sam(path).sha256()

    model = from_sam(frequency_view=None)
    model.save_adapter(tmp_path / "adapter")
    result = CliRunner().invoke(app, ["convert", "--model", str(tmp_path / "adapter"), "-o", str(tmp_path / "back")])
    assert result.exit_code == 0
    sam = SamModel.from_pretrained(tmp_path / "back").eval()
    embeddings = model.get_image_embeddings(inputs["pixel_values"])
    assert_close(sam.get_image_embeddings(inputs["pixel_values"]), embeddings, atol=1e-5, rtol=1e-5)


def test_the_command_leaves_nothing_half_made(from_sam, tmp_path):
    from_sam().save_adapter(tmp_path / "adapter")
    save(ReferenceEfficientSam(width=64, decoder_width=64), tmp_path / "efficient.pt", epoch=1)
    for model, message in (
        ("adapter", "without a frequency branch"),
        ("efficient.pt", "a whole SAM"),
        ("x.pth", "Expected a file at"),
    ):
        result = CliRunner().invoke(
            app, ["convert", "--model", str(tmp_path / model), "-o", str(tmp_path / "out" / "sam")]
        )
        assert result.exit_code == 2 and message in " ".join(result.output.replace("│", " ").split())
        assert not (tmp_path / "out" / "sam").exists() and not list(tmp_path.glob("out/.*"))
    path = save(ReferenceSam(**SIZES), tmp_path / "sam.pth")
    result = CliRunner().invoke(app, ["convert", "--model", str(path), "-o", str(tmp_path / "adapter")])
    assert result.exit_code == 2 and "Expected a new folder" in " ".join(result.output.replace("│", " ").split())


def test_a_folder_of_another_model_is_refused(from_sam, tmp_path):
    from_sam(lora_rank=0).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match="Expected a SAM checkpoint at .*, got one of type 'imedsam': give a SamModel's"
    ):
        IMedSamModel.from_sam_pretrained(tmp_path)


def test_weights_beside_another_configuration_are_refused(sam_folder, tmp_path):
    for path in Path(sam_folder).iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["vision_config"]["mlp_dim"] *= 2
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="of the sizes that its config.json says, got others"):
        IMedSamModel.from_sam_pretrained(tmp_path)

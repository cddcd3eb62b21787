"""SAM-I2I: its decoder by an independent reference, what is frozen, its backbones, saving, and what it refuses."""

import shutil

import pytest
import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassFieldValidationError
from safetensors.torch import load_file, save_file
from torch.nn import Parameter
from torch.testing import assert_close
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageToImage,
    BertConfig,
    BertModel,
    Dinov2Config,
    ResNetConfig,
    ResNetForImageClassification,
    Sam2HieraDetConfig,
    Sam2Model,
    Sam2VideoConfig,
    Sam2VideoModel,
    Sam2VisionConfig,
)
from transformers.models.sam.modeling_sam import SamVisionEncoder
from translation_folders import HIERA, save_sam2

from imedsam import SamI2IConfig, SamI2IModel
from imedsam.backbones import PlainBackbone, make_backbone

RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16, 32, 64], "depths": [1, 1, 1, 1], "layer_type": "basic"}


@pytest.fixture
def make(randomised):
    """`make(backbone=hiera, **values)`: a tiny model, all of whose weights are random, ready to be trained."""

    def make(backbone=None, **values):
        torch.manual_seed(0)
        config = Sam2HieraDetConfig(**HIERA) if backbone is None else backbone
        return randomised(SamI2IModel(SamI2IConfig(backbone_config=config, **values)))

    return make


@pytest.fixture(scope="module")
def sam2_folder(tmp_path_factory):
    return save_sam2(tmp_path_factory.mktemp("sam2"))


def pixels(height=32, width=40, batch=2):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, 3, height, width, generator=generator)


def labels_of(pixel_values):
    return torch.rand(len(pixel_values), 1, *pixel_values.shape[2:], generator=torch.Generator().manual_seed(1))


def trained(module):
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


# What it puts out


@torch.no_grad()
@pytest.mark.parametrize(
    ("upsampling", "size"), [(4, (32, 40)), (4, (8, 56)), (2, (48, 32)), (2, (16, 80)), (1, (64, 96))]
)
def test_the_output_is_a_slice_of_intensities(make, upsampling, size):
    model = make(upsampling=upsampling).eval()
    pixel_values = pixels(*size)
    labels = labels_of(pixel_values)
    outputs = model(pixel_values, labels)
    reconstruction = outputs.reconstruction
    assert reconstruction.shape == (2, 1, *size)
    assert 0 <= reconstruction.min() < reconstruction.max() <= 1 and reconstruction.std() > 0.01
    assert_close(outputs.loss, (reconstruction - labels).abs().mean())
    assert_close(reconstruction[:1], model(pixel_values[:1]).reconstruction)
    assert model(pixel_values).loss is None
    assert_close(model(pixel_values, return_dict=False)[0], reconstruction)


@torch.no_grad()
def test_the_finest_stage_has_the_slices_size(make):
    model = make()
    stages = model.backbone(F.interpolate(pixels(), scale_factor=4, mode="bilinear"))
    shapes = [(2, 32, 40, 8), (2, 16, 20, 16), (2, 8, 10, 32), (2, 4, 5, 64)]
    assert [tuple(stage.shape) for stage in stages] == shapes
    assert_close(model.decoder(stages, (32, 40)).sigmoid(), model(pixels()).reconstruction)


def test_the_default_is_the_papers():
    with torch.device("meta"):
        model = SamI2IModel(SamI2IConfig())
    assert model.backbone.channels == [96, 192, 384, 768]
    assert [block.attention.window_size for block in model.decoder.blocks] == [16, 8, 4]
    assert [block.attention.attn.num_attention_heads for block in model.decoder.blocks] == [4, 2, 1]
    count = sum(parameter.numel() for parameter in model.decoder.parameters())
    assert round(count / 1e6, 1) == 2.9
    assert count == sum(p.numel() for p in model.parameters() if p.requires_grad)
    # Per block: fuse, two norms, qkv, projection, and the two layers of an MLP of four times the width.
    expected = sum(3 * c * c + c + 4 * c + 4 * c * c + 4 * c + 8 * c * c + 5 * c for c in (384, 192, 96))
    assert count == expected + 9 * 96 + 1


# Mask unit attention


def attend_in_windows(block, tokens, window, heads):
    """A transformer block whose attention is computed window by window; (B, H, W, C)."""
    batch, height, width, channels = tokens.shape
    normed = F.layer_norm(tokens, (channels,), block.layer_norm1.weight, block.layer_norm1.bias, 1e-6)
    normed = F.pad(normed, (0, 0, 0, -width % window, 0, -height % window))  # as SAM 2 does
    attended = torch.empty_like(normed)
    for top in range(0, normed.shape[1], window):
        for left in range(0, normed.shape[2], window):
            place = (slice(None), slice(top, top + window), slice(left, left + window))
            qkv = block.attn.qkv(normed[place].reshape(batch, window * window, channels))
            q, k, v = (
                part.reshape(batch, -1, heads, channels // heads).transpose(1, 2) for part in qkv.chunk(3, dim=-1)
            )
            mixed = torch.softmax(q @ k.transpose(2, 3) / (channels // heads) ** 0.5, dim=-1) @ v
            mixed = mixed.transpose(1, 2).reshape(batch, window, window, channels)
            attended[place] = F.linear(mixed, block.attn.proj.weight, block.attn.proj.bias)
    tokens = tokens + attended[:, :height, :width]
    normed = F.layer_norm(tokens, (channels,), block.layer_norm2.weight, block.layer_norm2.bias, 1e-6)
    return tokens + block.mlp.proj_out(F.gelu(block.mlp.proj_in(normed)))


@torch.no_grad()
@pytest.mark.parametrize("index", range(3))
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("size", [(32, 48), (20, 18)])
def test_a_block_is_mask_unit_attention(make, index, attention, size):
    model = make(attn_implementation=attention).double()
    block, (window, heads) = model.decoder.blocks[index], [(16, 4), (8, 2), (4, 1)][index]
    fine, coarse = ([32, 16, 8][index], [64, 32, 16][index])
    tokens = torch.randn(2, *size, fine, dtype=torch.float64)
    expected = attend_in_windows(block.attention, tokens, window, heads)
    close = {"rtol": 1e-5, "atol": 1e-5} if attention == "eager" else {"rtol": 1e-9, "atol": 1e-9}  # eager: float32
    assert_close(block.attention(tokens), expected, **close)
    below = torch.randn(2, size[0] // 2, size[1] // 2, coarse, dtype=torch.float64)
    enlarged = F.interpolate(below.permute(0, 3, 1, 2), size, mode="bilinear").permute(0, 2, 3, 1)
    fused = torch.cat([enlarged, tokens], dim=-1) @ block.fuse.weight.T + block.fuse.bias
    assert_close(block(below, tokens), attend_in_windows(block.attention, fused, window, heads), **close)


@torch.no_grad()
@pytest.mark.parametrize(("index", "window"), [(0, 16), (1, 8), (2, 4)])
def test_a_change_stays_in_its_window_and_reaches_all_of_it(make, index, window):
    """A random one: a constant shift of all channels does not show, as the norm takes it off."""
    block = make().decoder.blocks[index]
    fine, coarse = ([32, 16, 8][index], [64, 32, 16][index])
    tokens, below = torch.randn(1, 2 * window, 3 * window, fine), torch.randn(1, window, window, coarse)
    changed = tokens.clone()
    changed[0, window + 1, 2 * window - 1] += torch.randn(fine)  # one token, in the window in the middle of the bottom
    moved = (block(below, changed) - block(below, tokens)).abs().amax(dim=-1)[0] > 0
    expected = torch.zeros(2 * window, 3 * window, dtype=torch.bool)
    expected[window:, window : 2 * window] = True
    assert_close(moved, expected)


# What is trained


@pytest.mark.parametrize("train_backbone", [False, True])
def test_gradients(make, train_backbone):
    model = make(train_backbone=train_backbone)
    pixel_values = pixels()
    model(pixel_values, labels_of(pixel_values)).loss.backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in model.decoder.parameters())
    gradients = {name: parameter.grad for name, parameter in model.backbone.named_parameters()}
    if train_backbone:
        assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients.values())
    else:
        assert all(gradient is None for gradient in gradients.values())


def test_the_image_gets_no_gradient_through_a_frozen_backbone(make):
    pixel_values = pixels().requires_grad_()
    make()(pixel_values, labels_of(pixel_values)).loss.backward()
    assert pixel_values.grad is None


def test_frozen_stays_frozen(make, sam2_folder, tmp_path):
    model = make()
    decoder = {f"decoder.{name}" for name, _ in model.decoder.named_parameters()}
    model.save_pretrained(tmp_path)
    loaded = SamI2IModel.from_pretrained(tmp_path)
    for frozen in (model, loaded, loaded.train(), SamI2IModel.from_backbone_pretrained(sam2_folder)):
        assert trained(frozen) == decoder and not frozen.backbone.training
    assert loaded.decoder.training and not loaded.eval().decoder.training
    everything = SamI2IModel.from_pretrained(tmp_path, train_backbone=True).train()
    assert trained(everything) == {name for name, _ in model.named_parameters()} and everything.backbone.training


@pytest.mark.parametrize("train_backbone", [False, True])
def test_batch_norms_of_a_frozen_backbone_keep_their_statistics(make, train_backbone):
    model = make(ResNetConfig(**RESNET), train_backbone=train_backbone).train()
    before = {name: value.clone() for name, value in model.backbone.named_buffers() if "running" in name}
    model(pixels())
    moved = {
        name: not torch.equal(value, before[name]) for name, value in model.backbone.named_buffers() if name in before
    }
    assert moved and all(value == train_backbone for value in moved.values())


@pytest.mark.parametrize("train_backbone", [False, True])
def test_gradient_checkpointing_changes_nothing(make, train_backbone):
    model, pixel_values = make(train_backbone=train_backbone), pixels()
    gradients, calls = [], []
    model.decoder.blocks[0].fuse.register_forward_hook(lambda *_: calls.append("once"))
    model.decoder.blocks[0].attention.layer_norm1.register_forward_hook(lambda *_: calls.append("again"))
    for _ in range(2):
        model.zero_grad()
        model(pixel_values, labels_of(pixel_values)).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.requires_grad])
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    assert_close(*gradients)
    assert (calls.count("once"), calls.count("again")) == (2, 3)


# Backbones


@torch.no_grad()
def test_the_backbone_of_a_sam_2(sam2_folder):
    model = SamI2IModel.from_backbone_pretrained(sam2_folder, upsampling=2)
    assert not model.training and model.config.upsampling == 2
    sam2 = Sam2Model.from_pretrained(sam2_folder)
    expected = sam2.vision_encoder.backbone.state_dict()
    assert_close(dict(model.backbone.state_dict()), dict(expected), rtol=0, atol=0)
    stages = model.backbone(pixels(64, 64))
    reference = sam2.vision_encoder.backbone(pixels(64, 64)).intermediate_hidden_states
    assert_close(stages, reference)


def test_backbones_that_cannot_be(tmp_path, sam2_folder):
    """Weights that are missing would be random and frozen; so would scales that are none."""
    copy = shutil.copytree(sam2_folder, tmp_path / "copy")
    weights = load_file(copy / "model.safetensors")
    save_file({k: v for k, v in weights.items() if "backbone.blocks.0" not in k}, copy / "model.safetensors")
    with pytest.raises(ValueError, match="Expected all weights of a backbone at .*copy, got none of .*blocks.0"):
        SamI2IModel.from_backbone_pretrained(copy)
    BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=9)).save_pretrained(
        tmp_path / "bert"
    )
    with pytest.raises(ValueError, match="AutoBackbone takes at .*bert, got a model of type 'bert'"):
        SamI2IModel.from_backbone_pretrained(tmp_path / "bert")
    small = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 1, "patch_size": 8, "image_size": 32}
    flat = Dinov2Config(**small, out_indices=[1, 2, 3, 4])
    with pytest.raises(ValueError, match=r"Expected four stages at strides \(4, 8, 16, 32\), .*got .* Dinov2Backbone"):
        SamI2IModel(SamI2IConfig(backbone_config=flat, upsampling=1, decoder_heads=[1, 1, 1]))(pixels(32, 32))


def test_the_callers_configuration_stays_as_it_is():
    given = ResNetConfig(**RESNET)
    before = list(given.out_features)
    assert len(SamI2IConfig(backbone_config=given).backbone_config.out_features) == 4 and given.out_features == before


def test_what_is_trained_can_be_frozen_by_hand(make):
    model = make(train_backbone=True)
    model.backbone.requires_grad_(False)
    assert not trained(model.eval().train().backbone)


def test_losses_are_of_float32(make):
    model, pixel_values = make(), pixels()
    expected = model(pixel_values, labels_of(pixel_values))
    half = model.bfloat16()(pixel_values, labels_of(pixel_values))
    assert half.loss.dtype == half.reconstruction.dtype == torch.float32
    assert_close(half.loss, F.l1_loss(half.reconstruction, labels_of(pixel_values)), rtol=1e-6, atol=0)
    assert_close(half.loss, expected.loss, rtol=0.02, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.float()(pixel_values, labels_of(pixel_values)).loss.dtype == torch.float32


def test_the_backbone_of_a_sam_2_for_videos(tmp_path):
    """Which the checkpoints of SAM 2 on the Hub are, facebook/sam2.1-hiera-tiny for one."""
    vision = Sam2VisionConfig(backbone_config=Sam2HieraDetConfig(**HIERA), backbone_channel_list=[64, 32, 16, 8])
    video = Sam2VideoModel(Sam2VideoConfig(vision_config=vision))
    video.save_pretrained(tmp_path)
    backbone = SamI2IModel.from_backbone_pretrained(tmp_path).backbone
    assert_close(dict(backbone.state_dict()), dict(video.vision_encoder.backbone.state_dict()), rtol=0, atol=0)


@torch.no_grad()
def test_the_backbone_of_a_sam(sam_folder, tiny_sam):
    model, sam = SamI2IModel.from_backbone_pretrained(sam_folder), tiny_sam()
    assert type(model.backbone) is PlainBackbone and model.pyramid.channels == [8, 16, 32, 32]
    assert_close(dict(model.backbone.state_dict()), dict(sam.vision_encoder.state_dict()), rtol=0, atol=0)
    (stage,) = model.backbone(pixels(64, 64))
    assert_close(stage, sam.vision_encoder(pixels(64, 64)).last_hidden_state.permute(0, 2, 3, 1))
    assert model(pixels(16, 24)).reconstruction.shape == (2, 1, 16, 24)
    stages = model.pyramid((stage,))
    assert [tuple(one.shape[1:]) for one in stages] == [(16, 16, 8), (8, 8, 16), (4, 4, 32), (2, 2, 32)]
    assert_close(stages[3][:, 0, 0], stage[:, :2, :2].flatten(1, 2).amax(dim=1))
    assert {name.split(".")[0] for name in trained(model)} == {"pyramid", "decoder"}


@torch.no_grad()
def test_positions_of_a_sam_are_interpolated(tiny_sam):
    encoder = tiny_sam().vision_encoder
    plain = make_backbone(encoder.config).eval()
    plain.load_state_dict(encoder.state_dict())
    larger = SamVisionEncoder(type(encoder.config)(**{**encoder.config.to_dict(), "image_size": 96})).eval()
    positions = F.interpolate(encoder.pos_embed.permute(0, 3, 1, 2), (6, 6), mode="bilinear").permute(0, 2, 3, 1)
    for name, weight in encoder.state_dict().items():
        owner, _, key = name.rpartition(".")
        weight = positions if name == "pos_embed" else weight  # relative positions are interpolated by SAM itself
        target = larger.get_submodule(owner)
        if isinstance(getattr(target, key), Parameter):
            setattr(target, key, Parameter(weight))
    expected = larger(pixels(96, 96)).last_hidden_state.permute(0, 2, 3, 1)
    assert_close(plain(pixels(96, 96))[0], expected)
    assert plain(pixels(96, 64))[0].shape == (2, 6, 4, 32)


@torch.no_grad()
def test_the_backbone_of_a_resnet(tmp_path):
    torch.manual_seed(0)
    classifier = ResNetForImageClassification(ResNetConfig(**RESNET)).eval()
    classifier.save_pretrained(tmp_path)
    model = SamI2IModel.from_backbone_pretrained(tmp_path)
    expected = {f"model.{name}": value for name, value in classifier.resnet.state_dict().items()}
    assert_close(dict(model.backbone.state_dict()), expected, rtol=0, atol=0)
    hidden_states = classifier.resnet(pixels(64, 64), output_hidden_states=True).hidden_states[1:]
    stages = model.backbone(pixels(64, 64))
    assert_close(list(stages), [stage.permute(0, 2, 3, 1) for stage in hidden_states])
    assert [stage.shape[1] for stage in stages] == [16, 8, 4, 2]
    with pytest.raises(ValueError, match="Expected a backbone of four stages, got 2 of ResNetBackbone: name four in"):
        SamI2IModel(SamI2IConfig(backbone_config=ResNetConfig(**RESNET, out_features=["stage2", "stage3"])))


# Saving


@torch.no_grad()
@pytest.mark.parametrize("backbone", ["hiera", "sam", "resnet"])
def test_save_and_load(make, tiny_sam, tmp_path, backbone):
    configs = {"hiera": None, "sam": tiny_sam().vision_encoder.config, "resnet": ResNetConfig(**RESNET)}
    model = make(configs[backbone], upsampling=2, decoder_windows=[8, 4, 2]).eval()
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is SamI2IConfig and config.upsampling == 2 and config.decoder_windows == [8, 4, 2]
    assert type(config.backbone_config) is type(model.config.backbone_config)
    pixel_values = pixels(32, 48)
    expected = model(pixel_values).reconstruction
    for auto_class in (AutoModel, AutoModelForImageToImage, SamI2IModel):
        loaded = auto_class.from_pretrained(tmp_path)
        assert type(loaded) is SamI2IModel and not loaded.training
        assert_close(loaded(pixel_values).reconstruction, expected, rtol=0, atol=0)
    half = SamI2IModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert_close(half(pixel_values).reconstruction.float(), expected, rtol=0, atol=0.1)


# What is refused


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        (
            {"upsampling": 3},
            ValueError,
            "Expected upsampling 1, 2 or 4, got 3: with 4 the finest stage has the slice's",
        ),
        ({"decoder_heads": [4, 2]}, ValueError, r"Expected decoder_heads as three positive numbers, .*, got \[4, 2\]"),
        ({"decoder_windows": [8, 4, 0]}, ValueError, r"Expected decoder_windows as three positive .* got \[8, 4, 0\]"),
        ({"window": 4}, TypeError, "Unknown configuration key 'window': SamI2IConfig takes .*decoder_windows"),
        ({"upsampling": "4"}, StrictDataclassFieldValidationError, "upsampling"),
        ({"train_backbone": 1}, StrictDataclassFieldValidationError, "train_backbone"),
    ],
)
def test_configurations_without_a_meaning(values, error, message):
    with pytest.raises(error, match=message):
        SamI2IConfig(**values)


def test_heads_divide_the_channels(make):
    with pytest.raises(ValueError, match=r"decoder_heads that divide the channels \[32, 16, 8\], got \[3, 2, 1\]"):
        make(decoder_heads=[3, 2, 1])


@pytest.mark.parametrize(("upsampling", "divisor"), [(4, 8), (2, 16), (1, 32)])
def test_shapes(make, upsampling, divisor):
    model = make(upsampling=upsampling)
    assert model.config.size_divisor == divisor
    message = rf"Expected pixel_values of shape .* multiples of {divisor}, got .*\(size_divisor={divisor}\) makes them"
    for shape in ((1, 3, 32, 32 + divisor // 2), (1, 1, 32, 32), (3, 32, 32)):
        with pytest.raises(ValueError, match=message):
            model(torch.zeros(shape))
    for shape in ((1, 3, 32, 32), (1, 1, 32, 64), (2, 1, 32, 32), (32, 32)):
        with pytest.raises(ValueError, match=r"Expected labels of shape \(1, 1, 32, 32\) in \[0, 1\], got"):
            model(torch.zeros(1, 3, 32, 32), torch.zeros(shape))

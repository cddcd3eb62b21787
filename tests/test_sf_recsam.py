"""SF-RecSAM: where it starts, what it trains, what each of its parts does, and its filter by hand."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close
from transformers import AutoConfig, AutoModel, AutoModelForMaskGeneration

from imedsam.configuration.configuration_sf_recsam import SFRecSamConfig
from imedsam.configuration.false_corrector import FalseCorrectorConfig
from imedsam.false_corrector import sample_masks, vary_prompts
from imedsam.frequency import FrequencyView, haar_details
from imedsam.image_encoder import resize_positions
from imedsam.learned_corrector import LearnedCorrector
from imedsam.losses import cross_entropy_loss, dice_loss, segmentation_loss
from imedsam.modeling_imedsam import IMedSamModel
from imedsam.modeling_sf_recsam import SFRecSamModel
from imedsam.spatial_frequency_encoder import ConvolutionalStem, CrossAttention, FusionLayer, SpectralFilter

FUSIONS = (None, "spatial", "frequency", "spatial_frequency", "spectral_filter")


@pytest.fixture
def make(sam_folder, randomised):
    """`make(trained=True, **values)`: a model on the tiny SAM for 64 x 64 pixels, its parts as after a training."""

    def make(trained=True, **values):
        torch.manual_seed(0)
        model = SFRecSamModel.from_sam_pretrained(sam_folder, 64, **values)
        return randomised(model) if trained else model

    return make


@pytest.fixture(scope="module")
def pixels():
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


# Where it starts


@torch.no_grad()
@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_new_model_is_sam(make, tiny_sam, pixels, fusion):
    model, sam = make(trained=False, fusion=fusion, overlapping_patches=False), tiny_sam()
    assert_close(model.get_image_embeddings(pixels), sam.get_image_embeddings(pixels), atol=1e-5, rtol=0)
    points = torch.tensor([[[[20.0, 30.0]]], [[[40.0, 10.0]]]])
    expected = sam(pixels, input_points=points - 0.5, multimask_output=False).pred_masks
    field = model.get_mask_field(model.get_image_embeddings(pixels), input_points=points)
    assert_close(field.logits, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_overlapping_patches_are_sams_layers_on_four_times_as_many_tokens(make, tiny_sam, pixels):
    model, sam = make(trained=False), tiny_sam()
    assert (model.config.image_size, model.config.patch_size) == (64, 8)
    enlarged = F.interpolate(pixels, (72, 72), mode="bilinear")
    projection = sam.vision_encoder.patch_embed.projection
    tokens = F.conv2d(enlarged, projection.weight, projection.bias, stride=8).permute(0, 2, 3, 1)
    assert tokens.shape == (2, 8, 8, 32)
    vision = model.config.sam_config.vision_config
    resized = resize_positions(sam.state_dict(), vision)
    tokens = tokens + resized["vision_encoder.pos_embed"]
    reference = IMedSamModel.config_class(
        sam_config=model.config.sam_config.to_dict(), lora_rank=0, frequency_view=None, implicit_decoder=False
    )
    layers = IMedSamModel(reference).vision_encoder
    state = {k: v for k, v in model.vision_encoder.state_dict().items() if k.startswith(("layers", "neck"))}
    layers.load_state_dict(state, strict=False)
    for layer in layers.layers:
        tokens = layer(tokens)
    assert_close(model.get_image_embeddings(pixels), layers.neck(tokens), atol=1e-5, rtol=0)


def test_the_default_is_as_large_as_the_source():
    """39.8 M, of which a convolution of the positions has 5.3 M; here 64 x 32 x 32 positions are trained instead."""
    with torch.device("meta"):
        model = SFRecSamModel(SFRecSamConfig())
    counts = {name: sum(p.numel() for p in part) for name, part in model._parts().items()}
    positions = counts["positions"]
    assert positions == 32 * 32 * 768
    assert sum(counts.values()) == 35_228_928
    assert round((sum(counts.values()) - positions + 768 * 768 * 9 + 3 * 768) / 1e6, 1) == 39.8
    assert counts["cross attention"] == 4 * 4 * (768 * 768 + 768)
    assert counts["adapters"] == 5 * (2 * 768 * 192 + 192 + 768)


def test_which_layers_fuse(tiny_sam):
    vision = {"num_hidden_layers": 12, "hidden_size": 32, "num_attention_heads": 2, "image_size": 64, "patch_size": 8}
    prompt = {"image_size": 64, "patch_size": 8}

    def layers(fusion_layers=None, **values):
        sam_config = {"vision_config": {**vision, **values}, "prompt_encoder_config": prompt}
        return SFRecSamConfig(sam_config=sam_config, fusion_layers=fusion_layers).fusion_layers

    assert SFRecSamConfig().fusion_layers == [2, 5, 8, 11]  # SAM ViT-B's global ones
    assert layers(window_size=2, global_attn_indexes=[3, 7]) == [3, 7]
    assert layers(window_size=0, global_attn_indexes=[]) == [2, 5, 8, 11]
    assert layers([1, 4], window_size=0) == [1, 4]
    for wrong in ([], [5, 2], [2, 2], [12]):
        with pytest.raises(ValueError, match="Expected fusion_layers as layers with global attention in order"):
            layers(wrong, window_size=0)
    with pytest.raises(ValueError, match=r"out of \[3, 7\], got \[2\]"):
        layers([2], window_size=2, global_attn_indexes=[3, 7])
    with pytest.raises(TypeError, match="Unknown configuration key 'lora_rank': SFRecSamConfig takes .*fusion"):
        SFRecSamConfig(lora_rank=4)
    prompt = {"image_size": 60, "patch_size": 6}
    with pytest.raises(ValueError, match="a power of 2 pixels, got 6"):
        layers(image_size=60, patch_size=6, window_size=0)


def test_there_is_no_lora_to_put_on(make, tmp_path):
    model = make(trained=False)
    with pytest.raises(ValueError, match="lora_rank of at least 1 for an adapter, got 0"):
        model.add_adapter()
    with pytest.raises(ValueError, match="Expected a model with LoRA to load .* into, got one without"):
        model.load_adapter(tmp_path)


@torch.no_grad()
@pytest.mark.parametrize("fusion", FUSIONS)
def test_the_encoder_from_its_description(make, pixels, fusion):
    """The equations of the authors' code, written down again on the weights of a trained model."""
    model = make(fusion=fusion, adapter_scale=0.7, side_scale=0.3).eval()
    encoder, view = model.vision_encoder, FrequencyView("haar", log=False)
    for name, parameter in encoder.named_parameters():
        parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
    weights = encoder.state_dict()

    def linear(x, name):
        return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def conv(x, name, dilation=1):
        weight = weights[f"{name}.weight"]
        padding = dilation * (weight.shape[-1] // 2)
        return F.conv2d(x, weight, weights.get(f"{name}.bias"), padding=padding, dilation=dilation)

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-6)

    def channels(x, name):
        return norm(x.permute(0, 2, 3, 1), name).permute(0, 3, 1, 2)

    def adapter(x, name):
        return linear(F.gelu(linear(x, f"{name}.down")), f"{name}.up")

    def stem(x):
        for layer in ("stem.layers.0", "stem.layers.1"):
            mean, variance = (weights[f"{layer}.1.running_{what}"][:, None, None] for what in ("mean", "var"))
            x = (conv(x, f"{layer}.0") - mean) / (variance + 1e-5).sqrt()
            x = (x * weights[f"{layer}.1.weight"][:, None, None] + weights[f"{layer}.1.bias"][:, None, None]).relu()
        scales = [conv(x, f"stem.gate.scales.{i}", dilation) for i, dilation in enumerate((1, 1, 2))]
        x = x + 0.5 * x * conv(torch.cat(scales, dim=1), "stem.gate.gate").sigmoid()
        for i in range(3):
            x = F.gelu(channels(conv(F.max_pool2d(x, 2), f"stem.halvings.{i}.1"), f"stem.halvings.{i}.2"))
        return x

    def attend(x, others, name):
        query, key, value = (
            linear(y.flatten(1, 2), f"{name}.{part}_proj").unflatten(-1, (2, 16)).transpose(1, 2)
            for y, part in ((x, "q"), (others, "k"), (others, "v"))
        )
        attended = (query @ key.transpose(-1, -2) / 4).softmax(dim=-1) @ value
        return linear(attended.transpose(1, 2).flatten(2), f"{name}.out_proj").view_as(x)

    enlarged = F.interpolate(pixels, (72, 72), mode="bilinear")
    projection = (weights["patch_embed.projection.weight"], weights["patch_embed.projection.bias"])
    x = F.conv2d(enlarged, *projection, stride=8).permute(0, 2, 3, 1) + weights["pos_embed"]
    x = x + adapter(x, "token_adapter")
    pictures = {"spatial": [pixels], "frequency": [view(pixels)], "spatial_frequency": [pixels, view(pixels)]}
    side = sum(map(stem, pictures[fusion])) if fusion in pictures else None
    for i, layer in enumerate(encoder.layers):
        if i not in model.config.fusion_layers:
            x = layer(x)
            continue
        n = norm(x, f"layers.{i}.layer_norm1")
        if side is not None:
            n = n + attend(n, side.permute(0, 2, 3, 1), f"layers.{i}.cross_attention")
            side = F.gelu(channels(conv(side, f"layers.{i}.side_conv"), f"layers.{i}.side_norm"))
        elif fusion == "spectral_filter":
            n = n + attend(n, layer.spectral_filter(n), f"layers.{i}.cross_attention")
        x = x + layer.attn(n)[0]
        m = norm(x, f"layers.{i}.layer_norm2")
        x = x + layer.mlp(m) + 0.7 * adapter(m, f"layers.{i}.adapter")
    expected = encoder.neck(x if side is None else x + 0.3 * side.permute(0, 2, 3, 1))
    assert_close(model.get_image_embeddings(pixels), expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_half_precision_and_padding(make, pixels):
    """bfloat16 and autocast stay near float32; the high-frequency image is that of the image inside its padding."""
    model = make().eval()
    expected = model.get_image_embeddings(pixels)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(model.get_image_embeddings(pixels).float(), expected, atol=0.3, rtol=0.1)
    sizes, seen = torch.tensor([[32, 64], [64, 48]]), []
    with_hook = model.vision_encoder.register_forward_hook(lambda module, args, out: seen.append(args[1]))
    model.get_image_embeddings(pixels, sizes)
    with_hook.remove()
    assert (seen[0][0, :, 32:] == 0).all() and (seen[0][1, :, :, 48:] == 0).all()
    crop = model.frequency_view(pixels[1:, :, :, :48])
    assert_close(seen[0][1:, :, :, :48], crop)
    assert model.bfloat16().get_image_embeddings(pixels).dtype == torch.bfloat16


def test_without_overlap_the_default_is_sams_own_patch():
    assert SFRecSamConfig(overlapping_patches=False).patch_size == 16 and SFRecSamConfig().patch_size == 8


# What is trained


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("train_mask_decoder", [False, True])
def test_the_named_parts_alone_get_gradients(make, pixels, fusion, train_mask_decoder):
    model = make(fusion=fusion, train_mask_decoder=train_mask_decoder).train()
    points = torch.full((2, 1, 1, 2), 30.0)
    model(pixels, input_points=points, labels=(torch.rand(2, 1, 64, 64) > 0.5).float()).loss.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    expected = {"positions": "pos_embed", "adapters": "adapter."}
    if fusion is not None:
        expected["cross attention"] = "cross_attention."
    if fusion in ("spatial", "frequency", "spatial_frequency"):
        expected["convolutional branch"] = ("stem.", "side_conv.", "side_norm.")
    if fusion == "spectral_filter":
        expected["spectral filter"] = "spectral_filter."
    decoder = {"upscaling", "mask head", "mask decoder"} if train_mask_decoder else set()
    assert model.parameter_parts().keys() == expected.keys() | decoder
    words = [word for words in expected.values() for word in ([words] if isinstance(words, str) else words)]
    own = {n for n, _ in model.named_parameters() if any(w in n for w in words) and n.startswith("vision_encoder.")}
    assert {name for name in trained if not name.startswith("mask_decoder.")} == own
    assert any(name.startswith("mask_decoder.") for name in trained) == train_mask_decoder
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or parameter.grad.abs().sum() > 0, name


def test_a_first_step_moves_every_injection(make, pixels):
    """What starts at 0 has a gradient there: GELU and the products around it do not cut it off."""
    model = make(trained=False, train_mask_decoder=True).train()
    points = torch.full((2, 1, 1, 2), 30.0)
    model(pixels, input_points=points, labels=(torch.rand(2, 1, 64, 64) > 0.5).float()).loss.backward()
    encoder = model.vision_encoder
    silent = [encoder.token_adapter.up.weight]
    for layer in encoder.layers:
        if isinstance(layer, FusionLayer):
            silent += [layer.adapter.up.weight, layer.cross_attention.out_proj.weight]
    silent.append(encoder.layers[-1].side_norm.weight)
    for weight in silent:
        assert (weight == 0).all() and weight.grad.abs().sum() > 0


def test_the_loss_is_the_sources(make, pixels):
    model = make()
    logits, labels = torch.randn(2, 50), (torch.rand(2, 50) > 0.5).float()
    expected = 0.8 * dice_loss(logits, labels) + 0.2 * cross_entropy_loss(logits, labels, positive_weight=2.0)
    assert_close(segmentation_loss(logits, labels, None, model.dice_share, model.positive_weight), expected)
    by_hand = -(2 * labels * logits.sigmoid().log() + (1 - labels) * (-logits).sigmoid().log()).mean(dim=-1)
    assert_close(cross_entropy_loss(logits, labels, positive_weight=2.0), by_hand)
    points, labels = torch.full((2, 1, 1, 2), 30.0), (torch.rand(2, 1, 32, 32) > 0.5).float()
    loss = model(pixels, input_points=points, labels=labels).loss
    field = model.get_mask_field(model.get_image_embeddings(pixels), input_points=points)
    expected = segmentation_loss(field.logits.flatten(2), labels.flatten(2), None, 0.8, 2.0).mean()
    assert_close(loss, expected, atol=1e-5, rtol=1e-5)


# What the parts do


@torch.no_grad()
def test_the_high_frequency_image_enters_through_its_injections_alone(make, pixels):
    model = make(fusion="frequency", side_scale=0)
    constant = torch.ones(2, 3, 64, 64)  # no frequency but 0

    def change():
        picture = model.frequency_view(pixels)
        first = model.vision_encoder(pixels, picture)
        return (model.vision_encoder(pixels, torch.zeros_like(picture)) - first).abs().max()

    assert (haar_details(constant.mean(dim=1)) == 0).all()
    assert change() > 0.01
    for module in model.modules():
        if isinstance(module, CrossAttention):
            nn.init.zeros_(module.out_proj.weight)
            nn.init.zeros_(module.out_proj.bias)
    assert change() == 0
    model.vision_encoder.side_scale = 0.5
    assert change() > 0.01


@torch.no_grad()
def test_what_each_fusion_sees(make, pixels):
    """A picture of one brightness has no details: the frequency branch then sees the same whatever that is."""
    levels = torch.full((1, 3, 64, 64), 0.3), torch.full((1, 3, 64, 64), -1.2)
    seen = {}
    for fusion in ("spatial", "frequency", "spatial_frequency"):
        model, outputs = make(fusion=fusion), []
        with_hook = model.vision_encoder.stem.register_forward_hook(lambda module, args, out: outputs.append(out))  # noqa: B023
        for level in levels:
            model.get_image_embeddings(level)
        with_hook.remove()
        seen[fusion] = (outputs[0] - outputs[1]).abs().max()
    assert seen["frequency"] == 0 and seen["spatial"] > 0.01 and seen["spatial_frequency"] > 0.01


@torch.no_grad()
def test_the_stem_adds_what_it_makes_of_each_picture(pixels):
    torch.manual_seed(0)
    stem = ConvolutionalStem(24, 8).eval()
    assert_close(stem([pixels, 2 * pixels]), stem([pixels]) + stem([2 * pixels]))
    assert stem([pixels]).shape == (2, 24, 8, 8)
    stem.train()
    together = stem([pixels, 2 * pixels])
    assert not torch.allclose(together, stem([pixels]) + stem([2 * pixels]), atol=1e-3)  # one batch, one statistics


@torch.no_grad()
def test_attention_against_pytorchs():
    torch.manual_seed(0)
    ours, reference = CrossAttention(16, 4), nn.MultiheadAttention(16, 4, batch_first=True)
    nn.init.normal_(ours.out_proj.weight)
    layers = (ours.q_proj, ours.k_proj, ours.v_proj)
    reference.in_proj_weight.copy_(torch.cat([layer.weight for layer in layers]))
    reference.in_proj_bias.copy_(torch.cat([layer.bias for layer in layers]))
    reference.out_proj.load_state_dict(ours.out_proj.state_dict())
    tokens, others = torch.randn(2, 3, 5, 16), torch.randn(2, 3, 5, 16)
    expected, _ = reference(tokens.flatten(1, 2), others.flatten(1, 2), others.flatten(1, 2))
    assert_close(ours(tokens, others), expected.view(2, 3, 5, 16), atol=1e-5, rtol=1e-5)


# The spectral filter


@torch.no_grad()
@pytest.mark.parametrize("size", [(8, 8), (7, 7), (6, 9)])
def test_a_new_filter_is_the_identity(size):
    features = torch.randn(2, *size, 3)
    assert_close(SpectralFilter(3, 8)(features), features, atol=1e-6, rtol=0)
    half = features.half()
    assert SpectralFilter(3, 8)(half).dtype == torch.float16
    assert_close(SpectralFilter(3, 8)(half), half, atol=2e-3, rtol=0)


@torch.no_grad()
def test_a_filter_by_hand():
    """One that takes away all but frequency 0 gives the mean; one that is constant scales, at any size."""
    features, mean_of = torch.randn(2, 8, 8, 3), SpectralFilter(3, 8)
    mean_of.weight[0] = -1
    mean_of.weight[0, :, 4, 0] = 0  # the rows' frequency 0 is in the middle
    assert_close(mean_of(features), features.mean(dim=(1, 2), keepdim=True).expand_as(features), atol=1e-5, rtol=0)
    scale = SpectralFilter(3, 8)
    scale.weight[0] = 0.5
    for size in ((8, 8), (16, 16), (5, 6)):
        features = torch.randn(1, *size, 3)
        assert_close(scale(features), 1.5 * features, atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_resized_filter_keeps_its_frequencies():
    """A low-pass stays one: on a grid twice as fine it takes away the finest stripes and keeps the mean."""
    low = SpectralFilter(1, 8)
    rows = (torch.arange(8) - 4).abs()[:, None].expand(8, 5)
    columns = torch.arange(5)[None].expand(8, 5)
    low.weight[0, 0] = -(torch.maximum(rows, columns) / 4)
    stripes = torch.tensor([1.0, -1.0]).repeat(8).view(1, 1, 16, 1).expand(1, 16, 16, 1)
    assert low(stripes).abs().max() < 1e-5
    assert_close(low(torch.ones(1, 16, 16, 1)), torch.ones(1, 16, 16, 1), atol=0.2, rtol=0)


# The learned corrector


def test_a_new_corrector_changes_nothing_and_is_trained_alone(make, pixels):
    model, points = make(train_mask_decoder=True).eval(), torch.tensor([[[[20.0, 30.0]]], [[[40.0, 10.0]]]])
    labels = (torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    with torch.no_grad():
        before = model(pixels, input_points=points).pred_masks
        model.add_corrector()
        assert_close(model(pixels, input_points=points).pred_masks, before)
    assert set(model.parameter_parts()) == {"learned corrector"} and model.config.learned_corrector
    model.train()
    assert not model.vision_encoder.training and model.learned_corrector.training
    frozen = {k: v.clone() for k, v in model.state_dict().items() if not k.startswith("learned_corrector.")}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=10.0)
    for _ in range(2):
        optimizer.zero_grad()
        loss = model(pixels, input_points=points, labels=labels).loss
        loss.backward()
        optimizer.step()
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in frozen.items())
    for head in (model.learned_corrector.false_positive, model.learned_corrector.false_negative):
        assert head[-1].weight.abs().sum() > 0 and head[0].weight.grad.abs().sum() > 0
    assert model(pixels, input_points=points, labels=labels).loss < loss


@torch.no_grad()
def test_the_corrector_moves_suspicious_places_alone():
    torch.manual_seed(0)
    sam = {"vision_config": {"output_channels": 32}, "prompt_encoder_config": {"hidden_size": 32}}
    sam["mask_decoder_config"] = {"hidden_size": 32}
    for part in ("vision_config", "prompt_encoder_config"):
        sam[part] |= {"image_size": 64, "patch_size": 8}
    corrector = LearnedCorrector(SFRecSamConfig(sam_config=sam))
    nn.init.constant_(corrector.false_positive[-1].bias, 5.0)
    nn.init.constant_(corrector.false_negative[-1].bias, 7.0)
    for head in (corrector.false_positive, corrector.false_negative):
        nn.init.zeros_(head[-1].weight)
    logits = torch.tensor([[3.0, 0.1], [-0.1, -4.0]]).view(1, 1, 2, 2)
    samples = logits.sigmoid().expand(5, -1, -1, -1, -1)
    inside = torch.ones(1, 1, 2, 2, dtype=torch.bool)
    corrected = corrector(logits, torch.randn(1, 4, 2, 2), samples, inside)
    assert_close(corrected.view(2, 2), torch.tensor([[3.0, 0.1 - 5], [-0.1 + 7, -4.0]]))
    inside[..., 0, 1] = False  # padding, which nothing is said of
    corrected = corrector(logits, torch.randn(1, 4, 2, 2), samples, inside)
    assert_close(corrected.view(2, 2), torch.tensor([[3.0, 0.1], [-0.1 + 7, -4.0]]))
    certain = torch.ones(5, 1, 1, 2, 2)
    assert_close(corrector(logits, torch.randn(1, 4, 2, 2), certain, inside), logits)


@torch.no_grad()
@pytest.mark.parametrize("prompt", ["points", "boxes"])
def test_what_the_corrector_is_shown(make, pixels, prompt):
    """The prompt's own logits and features, and the probabilities of the varied prompts decoded one by one."""
    model = make(learned_corrector=True).eval()
    prompts = {
        "points": {"input_points": torch.tensor([[[[20.0, 30.0]], [[50.0, 40.0]]], [[[40.0, 10.0]], [[5.0, 5.0]]]])},
        "boxes": {"input_boxes": torch.tensor([[[8.0, 12.0, 40.0, 50.0], [20.0, 4.0, 60.0, 30.0]]] * 2)},
    }[prompt]
    embeddings, shown = model.get_image_embeddings(pixels), []
    with_hook = model.learned_corrector.register_forward_hook(lambda module, args, output: shown.append(args))
    model.get_mask_field(embeddings, **prompts)
    with_hook.remove()
    logits, features, samples, inside = shown[0]
    assert inside.all() and inside.shape == logits.shape
    model.learned_corrector = None
    field = model.get_mask_field(embeddings, **prompts)
    assert_close(logits, field.logits.flatten(0, 1))
    assert_close(features, field.features)
    sizes = torch.full((2, 2), 64)
    varied = vary_prompts(prompts, field, model.false_corrector, 64, sizes)
    for n in range(5):
        one = {name: values[:, 2 * n : 2 * n + 2] for name, values in varied.items()}
        expected = model.get_mask_field(embeddings, **one).logits.sigmoid().flatten(0, 1)
        assert_close(samples[n], expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_corrector_sees_the_image_alone(make, pixels):
    """Of an image in the upper 24 of 64 rows: 12 of the grid's 32."""
    model, shown = make(learned_corrector=True).eval(), []
    with_hook = model.learned_corrector.register_forward_hook(lambda module, args, output: shown.append(args))
    sizes, points = torch.tensor([[24, 64], [64, 40]]), torch.full((2, 3, 1, 2), 20.0)
    model.get_mask_field(torch.randn(2, 32, 8, 8), input_points=points, reshaped_input_sizes=sizes)
    with_hook.remove()
    inside = shown[0][-1]
    assert inside.shape == (6, 1, 32, 32)
    assert inside[:3, :, :12].all() and not inside[:3, :, 12:].any()
    assert inside[3:, :, :, :20].all() and not inside[3:, :, :, 20:].any()


@torch.no_grad()
def test_without_a_prompt_to_vary_the_corrector_is_idle(make, pixels):
    model = make(learned_corrector=True).eval()
    embeddings, masks = model.get_image_embeddings(pixels), torch.randn(2, 1, 32, 32)
    fields = [model.get_mask_field(embeddings), model.get_mask_field(embeddings, input_masks=masks)]
    model.learned_corrector = None
    assert_close(fields[0].logits, model.get_mask_field(embeddings).logits)
    assert_close(fields[1].logits, model.get_mask_field(embeddings, input_masks=masks).logits)


def test_the_correctors_numbers_come_from_the_configuration(make):
    numbers = {
        "samples": 3,
        "click_radius": 2,
        "foreground": 0.4,
        "suspicion": 0.5,
        "brightness": 2,
        "box_jitter": 0.2,
    }
    model = make(**{f"corrector_{name}": value for name, value in numbers.items()})
    assert model.false_corrector == FalseCorrectorConfig(**numbers)
    for name, value in {"samples": 0, "click_radius": 0.5, "foreground": 1, "suspicion": 7, "box_jitter": 0.5}.items():
        with pytest.raises(ValueError, match=f"Expected {name} "):
            SFRecSamConfig(**{f"corrector_{name}": value})


def test_one_correction_at_a_time(make, pixels):
    model = make(learned_corrector=True).eval()
    with pytest.raises(ValueError, match="Expected a model without a learned corrector, got one with: train that on"):
        model.add_corrector()
    prompts, sizes = {"input_points": torch.full((2, 1, 1, 2), 20.0)}, torch.full((2, 2), 64)
    with pytest.raises(ValueError, match="whose masks are corrected as they come"):
        sample_masks(model, model.get_image_embeddings(pixels), prompts, sizes, (8, 8))


# Files


@torch.no_grad()
@pytest.mark.parametrize("fusion", ["spatial_frequency", "spectral_filter"])
@pytest.mark.parametrize("learned_corrector", [False, True])
def test_saving_and_loading(make, pixels, tmp_path, fusion, learned_corrector):
    model = make(fusion=fusion, learned_corrector=learned_corrector, id2label={0: "lesion"}).eval()
    model.save_pretrained(tmp_path)
    expected = model(pixels, input_points=torch.full((2, 1, 1, 2), 30.0)).pred_masks
    assert type(AutoConfig.from_pretrained(tmp_path)) is SFRecSamConfig
    for load in (SFRecSamModel, AutoModel, AutoModelForMaskGeneration):
        loaded = load.from_pretrained(tmp_path)
        assert type(loaded) is SFRecSamModel and loaded.config.id2label == {0: "lesion"}
        assert_close(loaded(pixels, input_points=torch.full((2, 1, 1, 2), 30.0)).pred_masks, expected)
    assert {p for p in loaded.parameter_parts()} == {p for p in model.parameter_parts()}
    with pytest.raises(ValueError, match="Expected a checkpoint of type 'imedsam' .*, got one of type 'sf_recsam'"):
        IMedSamModel.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Expected a model whose image encoder is SAM's"):
        model.to_sam()

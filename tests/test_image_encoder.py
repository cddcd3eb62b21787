"""The image encoder against stock SAM, at its own size and at another one."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from transformers import SamVisionModel

from imedsam.configuration.configuration_imedsam import IMedSamConfig
from imedsam.image_encoder import resize_positions
from imedsam.lora import SplitProjection, split_qkv
from imedsam.modeling_imedsam import IMedSamModel

# SAM's layouts in small: which blocks are global, out of how many.
LAYOUTS = {
    "base": {"num_hidden_layers": 6, "global_attn_indexes": [1, 3, 5]},
    "large": {"num_hidden_layers": 8, "global_attn_indexes": [2, 5, 7]},
    "huge": {"num_hidden_layers": 8, "global_attn_indexes": [1, 3, 5, 7], "num_attention_heads": 4},
    "without windows": {"window_size": 0, "global_attn_indexes": []},
    "window beyond the image": {"window_size": 14},
    "without positions": {"use_abs_pos": False, "use_rel_pos": False},
}
GLOBAL_BLOCKS = {
    "base": {1, 3, 5},
    "large": {2, 5, 7},
    "huge": {1, 3, 5, 7},
    "without windows": {0, 1},
    "window beyond the image": {1},
}


@pytest.fixture(scope="module")
def pixels():
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def test_a_new_model_encodes_as_sam(tiny_sam, sam_folder, pixels):
    model = IMedSamModel.from_sam_pretrained(sam_folder, image_size=64)
    expected = tiny_sam().get_image_embeddings(pixels)
    with torch.no_grad():
        assert_close(model.get_image_embeddings(pixels), expected, atol=1e-5, rtol=0)
        model.frequency_branch.modules_to_save["default"].gates.normal_()
        changed = model.get_image_embeddings(pixels)
    assert (changed - expected).abs().max() > 0.1


def test_against_sam_vision_model(tiny_sam, sam_folder, tmp_path, pixels):
    tiny_sam().vision_encoder.save_pretrained(tmp_path)
    reference = SamVisionModel(tiny_sam().config.vision_config).eval()
    reference.vision_encoder.load_state_dict(tiny_sam().vision_encoder.state_dict())
    model = IMedSamModel.from_sam_pretrained(sam_folder, image_size=64, frequency_view=None, lora_rank=0)
    with torch.no_grad():
        assert_close(model.get_image_embeddings(pixels), reference(pixels)[0], atol=1e-5, rtol=0)


def test_each_block_takes_its_injection(tiny_sam, sam_folder, pixels):
    """The encoder with injections is SAM's blocks with something added after each."""
    encoder = IMedSamModel.from_sam_pretrained(sam_folder, image_size=64, lora_rank=0).vision_encoder
    injections = [torch.randn(2, 4, 4, 32, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    sam = tiny_sam().vision_encoder
    with torch.no_grad():
        hidden_states = sam.patch_embed(pixels) + sam.pos_embed
        for layer, injection in zip(sam.layers, injections, strict=True):
            hidden_states = layer(hidden_states) + injection
        assert_close(encoder(pixels, injections), sam.neck(hidden_states), atol=1e-5, rtol=0)


def test_the_branch_reads_sams_tokens_of_the_spectrum(from_sam, pixels):
    model = from_sam(lora_rank=0)
    with torch.no_grad():
        spectrum = model.frequency_view(pixels)
        tokens = model.vision_encoder.patch_embed(spectrum) + model.vision_encoder.pos_embed
        expected = model.vision_encoder(pixels, model.frequency_branch(tokens))
        assert_close(model.get_image_embeddings(pixels), expected, atol=1e-5, rtol=0)
        assert not torch.allclose(expected, model.vision_encoder(pixels), atol=0.1)


def test_frequency_ratio(from_sam, pixels):
    model = from_sam(lora_rank=0)
    hidden = []
    hooks = [
        layer.register_forward_hook(lambda *args: hidden.append(args[2])) for layer in model.vision_encoder.layers
    ]
    with torch.no_grad():
        model.get_image_embeddings(pixels)
        injections = model.frequency_branch(model.vision_encoder.embed(model.frequency_view(pixels)))
    expected = torch.stack([i.norm() / h.norm() for i, h in zip(injections, hidden, strict=True)])
    for hook in hooks:
        hook.remove()
    assert_close(model.frequency_ratio(pixels), expected)
    assert expected.min() > 0.01
    sizes = torch.tensor([[64, 40], [64, 40]])
    assert not torch.allclose(model.frequency_ratio(pixels, sizes), expected, rtol=1e-3)
    assert model.to(torch.bfloat16).frequency_ratio(pixels).isfinite().all()
    with pytest.raises(ValueError, match="a model with a frequency branch, got frequency_view=None"):
        from_sam(frequency_view=None).frequency_ratio(pixels)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("image_size", [32, 64, 96])
def test_positions_at_another_size(tiny_sam, layout, image_size):
    sam = tiny_sam(**LAYOUTS[layout])
    state_dict = {key: value.clone() for key, value in sam.state_dict().items()}
    config = type(sam.config.vision_config)(**{**sam.config.vision_config.to_dict(), "image_size": image_size})
    side, resized = image_size // 16, resize_positions(state_dict, config)
    changed = {key for key in resized if resized[key].shape != state_dict[key].shape}
    if image_size == 64 or layout == "without positions":
        assert not changed and all(resized[key] is state_dict[key] for key in resized)
        return
    relative = {f"vision_encoder.layers.{i}.attn.rel_pos_{axis}" for i in GLOBAL_BLOCKS[layout] for axis in "hw"}
    assert changed == {"vision_encoder.pos_embed", *relative}
    # Sampled in the continuous frame of the image, whose borders are 0 and 1.
    centres = (torch.arange(side) + 0.5) / side * 2 - 1
    grid = torch.stack(torch.meshgrid(centres, centres, indexing="xy"), dim=-1)[None]
    old = state_dict["vision_encoder.pos_embed"].permute(0, 3, 1, 2)
    expected = F.grid_sample(old, grid, padding_mode="border", align_corners=False).permute(0, 2, 3, 1)
    assert_close(resized["vision_encoder.pos_embed"], expected, atol=1e-5, rtol=0)
    for key in relative:
        old, offsets = (
            state_dict[key],
            (torch.arange(2 * side - 1) + 0.5) / (2 * side - 1) * len(state_dict[key]) - 0.5,
        )
        low = offsets.floor().long()
        share = (offsets - low)[:, None]
        low, high = low.clamp(0, len(old) - 1), (low + 1).clamp(0, len(old) - 1)
        assert_close(resized[key], (1 - share) * old[low] + share * old[high], atol=1e-5, rtol=0)
    unchanged = set(resized) - changed
    assert all(resized[key] is state_dict[key] for key in unchanged)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_loads_at_another_size(tiny_sam, layout, tmp_path):
    sam = tiny_sam(**LAYOUTS[layout])
    sam.save_pretrained(tmp_path)
    pixels = torch.randn(1, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    model = IMedSamModel.from_sam_pretrained(tmp_path, image_size=96)
    assert model.config.image_size == 96 and model.config.sam_config.prompt_encoder_config.image_embedding_size == 6
    # Stock SAM at 96 pixels with the resized positions is the reference.
    reference = tiny_sam(image_size=96, **LAYOUTS[layout])
    state_dict = resize_positions(sam.state_dict(), reference.config.vision_config)
    reference.load_state_dict(state_dict)
    with torch.no_grad():
        embeddings = model.get_image_embeddings(pixels)
        assert embeddings.shape == (1, 32, 6, 6)
        assert_close(embeddings, reference.get_image_embeddings(pixels), atol=1e-5, rtol=0)
    boxes = torch.tensor([[[10.0, 20.0, 50.0, 70.0]]])
    expected = reference(pixels, input_boxes=boxes - 0.5, multimask_output=False).pred_masks
    model.disable_adapters()
    masks = model(pixels, input_boxes=boxes, output_size=(24, 24)).pred_masks
    assert_close(masks, expected, atol=1e-4, rtol=1e-4)


def test_the_position_embedding_keeps_a_plane():
    """A resized embedding means the same place: a plane over the image stays the same plane, away from the border."""
    config = IMedSamConfig().sam_config.vision_config
    config.image_size = 160
    x = (torch.arange(24) + 0.5) / 24
    plane = {"vision_encoder.pos_embed": (2 * x[:, None] + 3 * x)[None, :, :, None]}
    resized = resize_positions(plane, config)["vision_encoder.pos_embed"][0, :, :, 0]
    y = (torch.arange(10) + 0.5) / 10
    assert_close(resized[1:-1, 1:-1], (2 * y[:, None] + 3 * y)[1:-1, 1:-1])


def test_the_split_projection_equals_the_fused_one():
    torch.manual_seed(0)
    fused, split = torch.nn.Linear(32, 96), SplitProjection(32, bias=True)
    state_dict = split_qkv({"layers.0.attn.qkv.weight": fused.weight, "layers.0.attn.qkv.bias": fused.bias, "a": 1})
    assert state_dict.pop("a") == 1 and len(state_dict) == 6
    split.load_state_dict({key.removeprefix("layers.0.attn.qkv."): value for key, value in state_dict.items()})
    tokens = torch.randn(2, 5, 5, 32)
    assert_close(split(tokens), fused(tokens))
    split.v_proj.weight.data.zero_()
    split.v_proj.bias.data.zero_()
    assert_close(split(tokens)[..., :64], fused(tokens)[..., :64])
    assert split(tokens)[..., 64:].abs().max() == 0

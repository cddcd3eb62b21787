"""The convolutions before the fields: against the same written out, what reaches them, and in a model."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from imedsam.modeling_imedsam import IMedSamModel
from imedsam.pixel_decoder import PixelDecoder

CHANNELS, EMBEDDING, WIDTH = 4, 32, 12  # of the tiny SAM: features per place, and of a prompt
FRAMES = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.2, -0.3, 0.25, 0.5]])


@pytest.fixture
def pixel_decoder(tiny_config, randomised):
    torch.manual_seed(0)
    return randomised(PixelDecoder(tiny_config(), WIDTH))


@pytest.fixture
def features():
    return torch.randn(2, CHANNELS, 6, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def prompt():
    return torch.randn(2, EMBEDDING, generator=torch.Generator().manual_seed(2))


def normalised(values, norm):
    """LayerNorm over the channels of (R, C, H, W)."""
    mean, variance = values.mean(dim=1, keepdim=True), values.var(dim=1, keepdim=True, correction=0)
    return (values - mean) / (variance + norm.eps).sqrt() * norm.weight[:, None, None] + norm.bias[:, None, None]


def naive(pixel_decoder, features, prompt, frames):
    """Place by place, every input a channel of its own, the prompt's embedding repeated everywhere."""
    height, width = features.shape[2:]
    x, y = (2 * torch.arange(width) + 1) / width - 1, (2 * torch.arange(height)[:, None] + 1) / height - 1
    rows = []
    for feature, embedding, (cx, cy, sx, sy) in zip(features, prompt, frames, strict=True):
        q = torch.stack([((x - cx) / sx).expand(height, width), ((y - cy) / sy).expand(height, width)]).clamp(-3, 3)
        angles = [math.pi * 2**octave * axis / 3 for axis in q for octave in range(4)]
        inputs = torch.cat([feature, q, *(wave(a)[None] for wave in (torch.sin, torch.cos) for a in angles)])
        # Channel c of the place (2 i + dy, 2 j + dx) becomes channel 4 c + 2 dy + dx of (i, j).
        folded = torch.stack([channel[dy::2, dx::2] for channel in inputs for dy in (0, 1) for dx in (0, 1)])
        hidden = folded[None]
        for index, (layer, norm) in enumerate(zip(pixel_decoder.layers, pixel_decoder.norms, strict=True)):
            hidden = F.conv2d(hidden, layer.weight, layer.bias, padding=1)
            if index == 0:
                hidden = hidden + (pixel_decoder.prompt.weight @ embedding)[:, None, None]
            hidden = normalised(hidden, norm).relu()
        unfolded = torch.zeros(WIDTH // 4, height, width)
        for channel in range(WIDTH):
            unfolded[channel // 4, channel // 2 % 2 :: 2, channel % 2 :: 2] = hidden[0, channel]
        rows.append(unfolded)
    return torch.stack(rows)


@torch.no_grad()
def test_against_the_same_written_out(pixel_decoder, features, prompt):
    expected = naive(pixel_decoder, features, prompt, FRAMES)
    assert expected.shape == (2, WIDTH // 4, 6, 8) and expected.std() > 0.1
    assert_close(pixel_decoder(features, prompt, FRAMES), expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_place_is_seen_three_cells_of_two_places_away(pixel_decoder, prompt):
    features = torch.zeros(1, CHANNELS, 32, 32)
    changed = features.clone()
    changed[:, :, 16, 16] += 1
    one, other = (pixel_decoder(values, prompt[:1], FRAMES[:1]) for values in (features, changed))
    rows, columns = (one - other).abs().amax(dim=(0, 1)).nonzero().T
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (10, 23, 10, 23)


@torch.no_grad()
def test_prompt_and_frame_are_seen(pixel_decoder, features, prompt):
    features = features[:1].expand(2, -1, -1, -1)
    by_frame = pixel_decoder(features, prompt[:1].expand(2, -1), FRAMES)
    by_prompt = pixel_decoder(features, prompt, FRAMES[:1].expand(2, -1))
    for one, other in (by_frame, by_prompt):
        assert (one - other).abs().max() > 0.1


def test_initialisation(tiny_config):
    torch.manual_seed(0)
    decoder = IMedSamModel(tiny_config(pixel_decoder_width=64)).implicit_decoder
    for layer in decoder.pixel_decoder.layers:
        inputs = 9 * layer.in_channels
        assert (
            layer.weight.std().item() == pytest.approx(math.sqrt(2 / inputs), rel=0.05) and layer.bias.abs().max() == 0
        )
    # What the fields are given: a quarter of the width, 58 coordinate features, the prompt's embedding.
    assert decoder.coarse.layers[0].in_features == 16 + 58 + EMBEDDING


def test_every_part_of_it_is_trained_and_comes_back(from_sam, inputs, tmp_path):
    model = from_sam(pixel_decoder_width=WIDTH).train()
    points = torch.rand(2, 2, 50, 2, generator=torch.Generator().manual_seed(0)) * 2 - 1
    model(**inputs, coordinates=points, labels=(points.norm(dim=-1) < 0.7).float()).loss.backward()
    parameters = model.parameter_parts()["pixel decoder"]
    assert sum(p.numel() for p in parameters) == sum(
        p.numel() for p in model.implicit_decoder.pixel_decoder.parameters()
    )
    assert all(parameter.grad.abs().max() > 0 for parameter in parameters)
    model.eval().save_pretrained(tmp_path)
    loaded = IMedSamModel.from_pretrained(tmp_path).eval()
    assert loaded.config.pixel_decoder_width == WIDTH
    with torch.no_grad():
        expected, without = model(**inputs).pred_masks, from_sam().eval()(**inputs).pred_masks
        assert_close(loaded(**inputs).pred_masks, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(expected, without, atol=0.1)

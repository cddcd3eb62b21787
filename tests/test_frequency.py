"""The spectrum's picture against numpy, and the chain of frequency adapters against its equations."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from imedsam.frequency import FrequencyBranch, FrequencyView, haar_bands, haar_details

VIEWS = [("amplitude", True), ("amplitude", False), ("phase", True), ("haar", True)]


def unit(picture):
    return (picture - picture.min()) / (picture.max() - picture.min())


def numpy_picture(grey, view, log):
    """(S, S) -> (S, S), or (S / 2, S / 2) for Haar, from the definition."""
    if view == "haar":
        details = np.zeros((grey.shape[0] // 2, grey.shape[1] // 2))
        for signs in ([1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]):
            corners = grey[::2, ::2], grey[::2, 1::2], grey[1::2, ::2], grey[1::2, 1::2]
            details += unit(sum(sign * corner for sign, corner in zip(signs, corners, strict=True)) / 2)
        return unit(details)
    spectrum = np.fft.fftshift(np.fft.fft2(grey, norm="ortho"))
    if view == "phase":
        return unit(np.angle(spectrum))
    return unit(np.log1p(np.abs(spectrum)) if log else np.abs(spectrum))


@pytest.fixture
def pixels():
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("view, log", VIEWS)
def test_against_numpy(pixels, view, log):
    pictures = FrequencyView(view, log)(pixels)
    assert pictures.shape == pixels.shape and pictures.dtype == torch.float32
    for picture, image in zip(pictures, pixels, strict=True):
        expected = numpy_picture(image.double().mean(dim=0).numpy(), view, log)
        if view == "haar":  # a detail covers 2 x 2 pixels
            expected = torch.from_numpy(expected)[None, None]
            expected = torch.nn.functional.interpolate(expected, scale_factor=2, mode="bilinear")[0, 0]
            assert_close(picture[0].double(), expected, atol=1e-5, rtol=0)
        else:
            assert_close(picture[0].double().numpy(), expected, atol=1e-5, rtol=0)
        assert_close(picture[0], picture[1], rtol=0, atol=0)
        assert_close(picture[0], picture[2], rtol=0, atol=0)
    assert pictures.min() >= 0 and pictures.max() <= 1


def test_haar_details_against_numpy(pixels):
    grey = pixels.mean(dim=1)
    for details, image in zip(haar_details(grey), grey, strict=True):
        assert_close(
            unit(details.double().numpy()), numpy_picture(image.double().numpy(), "haar", True), atol=1e-5, rtol=0
        )
    assert haar_details(grey[:, :15, :13]).shape == (2, 7, 6)
    assert_close(haar_details(torch.full((1, 8, 8), 0.3)), torch.zeros(1, 4, 4), rtol=0, atol=0)


def test_haar_keeps_the_energy_and_can_be_undone():
    grey = torch.randn(2, 8, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    low, columns, rows, both = haar_bands(grey)
    assert_close(sum(band.square().sum() for band in (low, columns, rows, both)), grey.square().sum())
    back = torch.zeros_like(grey)
    back[:, 0::2, 0::2], back[:, 0::2, 1::2] = low + columns + rows + both, low - columns + rows - both
    back[:, 1::2, 0::2], back[:, 1::2, 1::2] = low + columns - rows - both, low - columns - rows + both
    assert_close(back / 2, grey)
    for band in haar_bands(torch.full((1, 4, 4), 0.3))[1:]:
        assert (band == 0).all()


def test_haar_finds_the_direction_of_an_edge():
    """One detail band per direction: a vertical, a horizontal and a diagonal structure each fill one band alone."""
    x = torch.tensor([0.0, 1.0]).repeat(4)
    single = {"columns": x.expand(8, 8), "rows": x[:, None].expand(8, 8), "checks": (x[:, None] + x) % 2}
    for picture in single.values():
        grey = torch.cat([picture[:, :4], torch.zeros(8, 4)], dim=1)[None]  # half the image has structure
        details = haar_details(grey)
        assert set(details.unique().tolist()) == {0.0, 1.0}  # one of the three bands, scaled to [0, 1]
        assert (details[..., :2] != details[..., 2:]).all()


def test_a_wave_is_a_pair_of_peaks():
    x = torch.arange(32) * 2 * torch.pi * 5 / 32
    picture = FrequencyView("amplitude", log=True)(x.cos().expand(1, 3, 32, 32))[0, 0]
    peaks = (picture > 0.5).nonzero().tolist()
    assert peaks == [[16, 11], [16, 21]]  # +-5 cycles along x, none along y, zero frequency at (16, 16)


def test_the_logarithm_lifts_the_picture():
    image = torch.linspace(0, 1, 32).expand(1, 3, 32, 32) + 0.1 * torch.rand(1, 3, 32, 32)
    assert FrequencyView("amplitude", log=True)(image).mean() > 3 * FrequencyView("amplitude", log=False)(image).mean()


@pytest.mark.parametrize("view, log", VIEWS)
def test_gradients(pixels, view, log):
    """The gradient agrees with a finite difference along a random direction."""
    pixels.requires_grad_(True)
    frequency_view = FrequencyView(view, log)
    weights = torch.randn(16, 16, generator=torch.Generator().manual_seed(1))

    def value(images):
        return (frequency_view(images)[:, 0].double() * weights).sum()

    (gradient,) = torch.autograd.grad(value(pixels), pixels)
    direction = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        difference = (value(pixels + 1e-3 * direction) - value(pixels - 1e-3 * direction)) / 2e-3
    assert gradient.isfinite().all() and gradient.abs().max() > 0
    assert_close((gradient * direction).sum().double(), difference, rtol=0.03, atol=0.03)


@pytest.mark.parametrize("view, log", VIEWS)
@pytest.mark.parametrize("value", [0.0, 0.7])
def test_constant_images(view, log, value):
    pixels = torch.full((1, 3, 16, 16), value, requires_grad=True)
    picture = FrequencyView(view, log)(pixels)
    assert picture.isfinite().all() and picture.min() >= 0 and picture.max() <= 1
    if view == "amplitude":
        expected = torch.zeros(16, 16)
        expected[8, 8] = float(value > 0)  # all of it is at frequency zero
        assert_close(picture[0, 0], expected, atol=1e-5, rtol=0)
    if view == "haar":
        assert picture.abs().max() == 0
    if view != "phase":  # whose gradient is infinite where the amplitude is 0
        picture.sum().backward()
        assert pixels.grad.isfinite().all()


@pytest.mark.parametrize("view, log", VIEWS)
def test_padding_is_left_out(pixels, view, log):
    """The picture of a padded image is that of the image alone: a spectrum over the square, details where they are."""
    frequency_view = FrequencyView(view, log)
    padded = pixels.clone()
    padded[0, :, 10:], padded[1, :, :, 12:] = -2.0, 9.0
    sizes = torch.tensor([[10, 16], [16, 12]])
    pictures = frequency_view(padded, sizes)
    for picture, image, (height, width) in zip(pictures, pixels, sizes.tolist(), strict=True):
        alone = frequency_view(image[None, :, :height, :width])
        if view == "haar":  # is resized once, from its details
            details = haar_details(image[None, :, :height, :width].mean(dim=1))
            alone = (details - details.amin()) / (details.amax() - details.amin())
            alone = alone[None]
        size = (height, width) if view == "haar" else (16, 16)
        expected = torch.nn.functional.interpolate(alone, size, mode="bilinear")[0, 0]
        expected = torch.nn.functional.pad(expected, (0, 16 - size[1], 0, 16 - size[0]))
        assert_close(picture[0], expected, atol=1e-6, rtol=0)
    assert not torch.allclose(pictures, frequency_view(padded), atol=0.05)
    assert_close(frequency_view(pixels, torch.tensor([[16, 16], [16, 16]])), frequency_view(pixels), rtol=0, atol=0)


def test_a_batch_of_padded_and_whole_images_equals_single_ones(pixels):
    frequency_view, sizes = FrequencyView("amplitude", True), torch.tensor([[10, 16], [16, 16]])
    together = frequency_view(pixels, sizes)
    for index in range(2):
        assert_close(together[index], frequency_view(pixels[index : index + 1], sizes[index : index + 1])[0])


@pytest.mark.parametrize("view, log", VIEWS)
def test_half_precision(pixels, view, log):
    """Transforms run in float32 whatever the dtype and autocast, and the picture has the dtype of the image."""
    frequency_view, half = FrequencyView(view, log), pixels.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        picture = frequency_view(half)
    assert picture.dtype == torch.bfloat16
    assert_close(picture, frequency_view(half.float()).bfloat16(), rtol=0, atol=0)


def test_the_adapters_form_a_chain(tiny_config):
    torch.manual_seed(0)
    branch = FrequencyBranch(tiny_config()).double()
    torch.nn.init.normal_(branch.gates)
    tokens = torch.randn(1, 4, 4, 32, dtype=torch.float64)
    hidden, expected = tokens.numpy(), []
    for adapter, gate in zip(branch.adapters, branch.gates, strict=True):
        hidden = (hidden - hidden.mean(-1, keepdims=True)) / np.sqrt(hidden.var(-1, keepdims=True) + 1e-5)
        down = hidden @ adapter.down.weight.detach().numpy().T + adapter.down.bias.detach().numpy()
        gelu = down * torch.distributions.Normal(0, 1).cdf(torch.from_numpy(down)).numpy()
        hidden = hidden + gelu @ adapter.up.weight.detach().numpy().T + adapter.up.bias.detach().numpy()
        expected.append(gate.detach().numpy() * hidden)
    injections = branch(tokens)
    assert len(injections) == 2
    for injection, value in zip(injections, expected, strict=True):
        assert_close(injection.detach().numpy(), value)


def test_a_new_branch_is_silent_but_learns(tiny_config):
    branch = FrequencyBranch(tiny_config())
    tokens = torch.randn(1, 4, 4, 32)
    assert all(injection.abs().max() == 0 for injection in branch(tokens))
    sum((injection * torch.randn_like(injection)).sum() for injection in branch(tokens)).backward()
    assert (branch.gates.grad.abs().amax(dim=1) > 0).all()

"""On CUDA: the CPU's embeddings, masks, outlines, losses and gradients; compiled, and in half precision."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from imedsam.contours import find_contours
from imedsam.rendering import RENDER_MODES

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator that speaks CUDA")


@pytest.fixture(autouse=True)
def full_precision(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture
def pair(from_sam):
    """The same model on the CPU and on CUDA."""
    return from_sam().eval(), from_sam().eval().to("cuda")


def to_cuda(inputs):
    return {name: value.to("cuda") for name, value in inputs.items()}


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1)], ids=["float32", "bf16"]
)
def test_embeddings(from_sam, inputs, attention, dtype, tolerance):
    """Of the encoder with its adapters, and with LoRA merged."""
    pixels = inputs["pixel_values"]
    expected = from_sam().eval().get_image_embeddings(pixels)
    model = from_sam(attn_implementation=attention).eval().to("cuda")
    for _ in ("not merged", "merged"):
        with torch.autocast("cuda", dtype=dtype, enabled=dtype != torch.float32):
            assert_close(model.get_image_embeddings(pixels.to("cuda")).float().cpu(), expected, atol=tolerance, rtol=0)
        model.merge_and_unload()


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores", "ignore:Torchinductor does not support code")
def test_compiled_as_one_graph_each(pair, inputs):
    """The encoder and the field, by inductor."""
    torch.compiler.reset()
    model, given = pair[1], to_cuda(inputs)
    encode = torch.compile(model.get_image_embeddings, fullgraph=True)
    evaluate = torch.compile(lambda field, points: field(points), fullgraph=True)
    embeddings = encode(given["pixel_values"])
    assert_close(embeddings, model.get_image_embeddings(given["pixel_values"]), atol=1e-4, rtol=1e-4)
    field = model.get_mask_field(embeddings, given["input_boxes"])
    points = 2 * torch.rand(2, 2, 500, 2, device="cuda") - 1
    logits, uncertainty = field(points)
    compiled_logits, compiled_uncertainty = evaluate(field, points)
    # A point whose uncertainty is the threshold, up to rounding, may go to the other field.
    assert ((compiled_logits - logits).abs() < 1e-3).float().mean() > 0.99
    assert_close(compiled_uncertainty, uncertainty, atol=1e-4, rtol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("mode", RENDER_MODES)
def test_masks_and_outlines(pair, inputs, mode):
    fields = [
        model.get_mask_field(model.get_image_embeddings(given["pixel_values"]), given["input_boxes"])
        for model, given in zip(pair, (inputs, to_cuda(inputs)), strict=True)
    ]
    cpu, cuda = (field.render((100, 120), mode=mode) for field in fields)
    assert cuda.logits.is_cuda
    equal = (cpu.logits > 0) == (cuda.logits > 0).cpu()
    assert equal.float().mean() > 0.99
    assert_close(cuda.uncertainty.cpu(), cpu.uncertainty, atol=1e-2, rtol=0)
    areas = [
        sum(contour.area for prompt in image for mask in prompt for contour in mask)
        for field, rendered in zip(fields, (cpu, cuda), strict=True)
        for image in find_contours(field, (100, 120), rendered=rendered)
    ]
    np.testing.assert_allclose(areas[:2], areas[2:], rtol=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_without_dropout(pair, inputs, dtype):
    inputs["labels"] = torch.zeros(2, 2, 40, 40)
    inputs["labels"][..., 10:30, 8:20] = 1
    losses = []
    for model, given in zip(pair, (inputs, to_cuda(inputs)), strict=True):
        device = given["labels"].device.type
        with torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32):
            losses.append(model(**given).loss)
        losses[-1].backward()
    assert losses[1].is_cuda
    assert_close(losses[1].cpu(), losses[0], atol=1e-3 if dtype == torch.float32 else 5e-2, rtol=0)
    on_cpu, on_cuda = (dict(model.named_parameters()) for model in pair)
    for name, parameter in on_cpu.items():
        assert (on_cuda[name].grad is None) == (parameter.grad is None), name
        if parameter.grad is not None and dtype == torch.float32:
            assert_close(on_cuda[name].grad.cpu(), parameter.grad, atol=1e-3, rtol=0.02, msg=name)
        elif parameter.grad is not None:
            assert on_cuda[name].grad.isfinite().all(), name

"""The adversary of SAM-I2I: a frozen CLIP, and heads with spectral norms."""

import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.utils.parametrize import is_parametrized
from torch.testing import assert_close
from transformers import CLIPModel, CLIPVisionModelWithProjection
from translation_folders import CLIP, save_clip, save_sam2

from imedsam.training import discriminator
from imedsam.training.discriminator import (
    ClipFeatures,
    DiscriminatorHeads,
    discriminator_loss,
    generator_loss,
    held_still,
)


@pytest.fixture
def features():
    torch.manual_seed(0)
    return ClipFeatures(CLIPVisionModelWithProjection(CLIP).train())


@pytest.fixture
def heads(monkeypatch):
    monkeypatch.setattr(discriminator, "HEAD_WIDTH", 16)
    torch.manual_seed(1)
    return DiscriminatorHeads(CLIP)


def test_features_are_those_of_clip_at_a_third_and_two_thirds_of_its_depth(features):
    images = torch.rand(2, 1, 32, 32)
    first, second, embeddings = features(images)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).reshape(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).reshape(3, 1, 1)
    seen = features.clip((images.expand(-1, 3, -1, -1) - mean) / std, output_hidden_states=True)
    assert len(seen.hidden_states) == 4  # before the 3 layers, and after each
    assert_close(first, seen.hidden_states[1][:, 1:].transpose(1, 2).reshape(2, 32, 2, 2))
    assert_close(second, seen.hidden_states[2][:, 1:].transpose(1, 2).reshape(2, 32, 2, 2))
    assert_close(embeddings, seen.image_embeds)
    assert not torch.allclose(first, second)


def test_the_image_encoder_of_a_whole_clip_is_taken(tmp_path):
    features = ClipFeatures.from_pretrained(save_clip(tmp_path))
    whole = CLIPModel.from_pretrained(tmp_path)
    assert_close(features.clip.vision_model.state_dict(), whole.vision_model.state_dict())
    assert_close(features.clip.visual_projection.weight, whole.visual_projection.weight)


def test_what_is_no_clip_is_refused(tmp_path):
    with pytest.raises(ValueError, match="Expected a CLIP at .*sam2, got a model of type 'sam2': name one"):
        ClipFeatures.from_pretrained(save_sam2(tmp_path / "sam2"))
    folder = save_clip(tmp_path / "clip")
    weights = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in weights.items() if "visual_projection" not in k}, folder / "model.safetensors")
    with pytest.raises(ValueError, match="Expected CLIP's image encoder at .*clip, got none of visual_proj"):
        ClipFeatures.from_pretrained(folder)


def test_of_the_papers_clip_they_are_the_hidden_states_4_and_8():
    config = CLIP.__class__(**{**CLIP.to_dict(), "num_hidden_layers": 12})
    assert ClipFeatures(CLIPVisionModelWithProjection(config)).layers == (4, 8)


def test_clip_stays_frozen_while_the_gradient_reaches_the_image(features):
    before = {name: value.clone() for name, value in features.state_dict().items()}
    images = torch.rand(2, 1, 40, 24, requires_grad=True)  # another size than CLIP's
    features.train()
    assert not any(module.training for module in features.modules())
    sum(part.square().sum() for part in features(images)).backward()
    assert images.grad.abs().sum((1, 2, 3)).min() > 0
    assert all(not p.requires_grad and p.grad is None for p in features.parameters())
    assert_close(features.state_dict(), before, rtol=0, atol=0)


def test_heads_have_a_logit_per_patch_and_one_per_embedding(features, heads):
    logits = heads(features(torch.rand(5, 1, 32, 32)))
    assert [part.shape for part in logits] == [(5, 4), (5, 4), (5, 1)]


def test_every_weight_of_the_heads_has_a_spectral_norm_of_one(features, heads):
    layers = [module for module in heads.modules() if hasattr(module, "in_channels") or hasattr(module, "in_features")]
    assert len(layers) == 8
    seen = features(torch.rand(2, 1, 32, 32))
    for _ in range(100):  # a power iteration each
        heads(seen)
    heads.eval()
    for layer in layers:
        assert is_parametrized(layer, "weight")
        norms = [torch.linalg.matrix_norm(w.flatten(1), 2).item() for w in (layer.weight, _original(layer))]
        assert norms[0] == pytest.approx(1, abs=0.02) != norms[1]


def _original(layer):
    return layer.parametrizations.weight.original


def test_heads_held_still_get_no_gradients_and_keep_their_vectors(features, heads):
    images = torch.rand(1, 1, 32, 32, requires_grad=True)
    before = {name: value.clone() for name, value in heads.state_dict().items()}
    with held_still(heads):
        generator_loss(heads(features(images))).backward()
    assert images.grad.abs().sum() > 0 and all(p.grad is None for p in heads.parameters())
    assert_close(heads.state_dict(), before, rtol=0, atol=0)
    assert heads.training and all(p.requires_grad for p in heads.parameters())
    heads(features(images))
    assert not torch.equal(
        heads.state_dict()["embedding.0.parametrizations.weight.0._u"],
        before["embedding.0.parametrizations.weight.0._u"],
    )


def test_the_losses_by_hand():
    # The heads' means are averaged, whatever the number of their logits.
    fake = [torch.tensor([[0.0, math.log(3)]]), torch.tensor([[-math.log(3)]])]  # D = 1/2, 3/4 and 1/4
    real = [torch.tensor([[math.log(3), math.log(3)]]), torch.tensor([[0.0]])]
    expected = ((math.log(2) + math.log(4 / 3)) / 2 + math.log(4)) / 2
    assert generator_loss(fake).item() == pytest.approx(expected)
    on_fake = ((math.log(2) + math.log(4)) / 2 + math.log(4 / 3)) / 2
    on_real = (math.log(4 / 3) + math.log(2)) / 2
    assert discriminator_loss(real, fake).item() == pytest.approx(on_real + on_fake)

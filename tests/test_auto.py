"""After `import imedsam` the Auto classes know its checkpoints."""

import torch
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForMaskGeneration, AutoProcessor

from imedsam import IMedSamConfig, IMedSamImageProcessor, IMedSamModel, IMedSamProcessor


def test_auto_classes_load_a_saved_folder(tiny_config, tmp_path):
    torch.manual_seed(0)
    model = IMedSamModel(tiny_config())
    model.add_adapter()
    model.save_pretrained(tmp_path)
    IMedSamProcessor(IMedSamImageProcessor(size=64)).save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is IMedSamConfig
    assert type(AutoProcessor.from_pretrained(tmp_path)) is IMedSamProcessor
    assert type(AutoImageProcessor.from_pretrained(tmp_path)) is IMedSamImageProcessor
    pixel_values = torch.randn(1, 3, 64, 64)
    expected = model.eval()(pixel_values, output_size=(8, 8)).pred_masks
    for auto_class in (AutoModel, AutoModelForMaskGeneration):
        loaded = auto_class.from_pretrained(tmp_path)
        assert type(loaded) is IMedSamModel
        torch.testing.assert_close(loaded(pixel_values, output_size=(8, 8)).pred_masks, expected)

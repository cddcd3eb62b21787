"""I-MedSAM: medical image segmentation with Segment Anything and an implicit decoder."""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageToImage,
    AutoModelForMaskGeneration,
    AutoProcessor,
)

from imedsam.configuration.configuration_imedsam import IMedSamConfig
from imedsam.configuration.configuration_sam_i2i import SamI2IConfig
from imedsam.configuration.configuration_sf_recsam import SFRecSamConfig
from imedsam.mask_field import MaskField
from imedsam.modeling_imedsam import IMedSamModel, IMedSamOutput
from imedsam.modeling_sam_i2i import SamI2IModel
from imedsam.modeling_sf_recsam import SFRecSamModel
from imedsam.pipeline import IMedSamPipeline, Segmentation
from imedsam.processing.image_processing_imedsam import IMedSamImageProcessor
from imedsam.processing.image_processing_sam_i2i import SamI2IImageProcessor
from imedsam.processing.processing_imedsam import IMedSamProcessor

__version__ = "0.1.0"
__all__ = [
    "IMedSamConfig",
    "IMedSamImageProcessor",
    "IMedSamModel",
    "IMedSamOutput",
    "IMedSamPipeline",
    "IMedSamProcessor",
    "MaskField",
    "SFRecSamConfig",
    "SFRecSamModel",
    "SamI2IConfig",
    "SamI2IImageProcessor",
    "SamI2IModel",
    "Segmentation",
]

for model_class in (IMedSamModel, SFRecSamModel):
    config_class = model_class.config_class
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    AutoModel.register(config_class, model_class, exist_ok=True)
    AutoModelForMaskGeneration.register(config_class, model_class, exist_ok=True)
    AutoImageProcessor.register(config_class, image_processor_classes={"pil": IMedSamImageProcessor}, exist_ok=True)
    AutoProcessor.register(config_class, IMedSamProcessor, exist_ok=True)

AutoConfig.register(SamI2IConfig.model_type, SamI2IConfig, exist_ok=True)
AutoModel.register(SamI2IConfig, SamI2IModel, exist_ok=True)
AutoModelForImageToImage.register(SamI2IConfig, SamI2IModel, exist_ok=True)
AutoImageProcessor.register(SamI2IConfig, image_processor_classes={"pil": SamI2IImageProcessor}, exist_ok=True)

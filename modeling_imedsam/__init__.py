"""I-MedSAM: medical image segmentation with Segment Anything and an implicit decoder."""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForMaskGeneration,
    AutoProcessor,
)

from imedsam.configuration.configuration_imedsam import IMedSamConfig
from imedsam.mask_field import MaskField
from imedsam.modeling_imedsam import IMedSamModel, IMedSamOutput
from imedsam.pipeline import IMedSamPipeline, Segmentation
from imedsam.processing.image_processing_imedsam import IMedSamImageProcessor
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
    "Segmentation",
]

AutoConfig.register(IMedSamConfig.model_type, IMedSamConfig, exist_ok=True)
AutoModel.register(IMedSamConfig, IMedSamModel, exist_ok=True)
AutoModelForMaskGeneration.register(IMedSamConfig, IMedSamModel, exist_ok=True)
AutoImageProcessor.register(IMedSamConfig, image_processor_classes={"pil": IMedSamImageProcessor}, exist_ok=True)
AutoProcessor.register(IMedSamConfig, IMedSamProcessor, exist_ok=True)

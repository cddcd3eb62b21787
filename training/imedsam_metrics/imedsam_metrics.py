"""The metrics of imedsam as a module of Hugging Face's `evaluate`, which loads offline from its folder."""

import datasets
import evaluate
import numpy as np

from imedsam.training.calibration import calibration_metrics
from imedsam.training.metrics import MetricTable, segmentation_metrics

_DESCRIPTION = """
Metrics of binary segmentation masks: Dice, IoU, precision, recall, volume difference, Hausdorff distance (HD, HD95),
average surface distance and surface Dice (NSD); of probabilities also the calibration error and the Brier score, and
whether an uncertainty ranks the errors. The rules for empty masks are those of `imedsam.training.metrics`.
"""
_KWARGS_DESCRIPTION = """
Args:
    predictions: masks (H, W) of 0 and 1; or, in the configuration "probabilities", probabilities of the foreground.
    references: masks (H, W) of 0 and 1, of the same sizes.
    uncertainties: of the pixels (H, W), in the configuration "probabilities"; None to do without.
    spacing: height and width of a pixel, such as in millimetres; pixels by default.
    tolerance: of the surface Dice, in the unit of `spacing`.

Returns:
    The mean of each metric over the masks, and its standard deviation as `METRIC_std`. A metric that no mask has a
    value for is nan.
"""
_CITATION = """
@inproceedings{wei2024imedsam,
  title = {{I-MedSAM}: Implicit Medical Image Segmentation with Segment Anything},
  author = {Wei, Xiaobao and Cao, Jiajun and Jin, Yizhu and Lu, Ming and Wang, Guangyu and Zhang, Shanghang},
  booktitle = {European Conference on Computer Vision},
  year = {2024}
}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class IMedSamMetrics(evaluate.Metric):
    def _info(self):
        if self.config_name not in ("default", "masks", "probabilities"):
            raise ValueError(f'Expected the configuration "masks" or "probabilities", got {self.config_name!r}.')
        numbers = datasets.Sequence(datasets.Sequence(datasets.Value("float32")))
        masks = datasets.Sequence(datasets.Sequence(datasets.Value("bool")))
        predictions = numbers if self.config_name == "probabilities" else masks
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"predictions": predictions, "references": masks}),
        )

    def _compute(self, predictions, references, uncertainties=None, spacing=(1.0, 1.0), tolerance=1.0):
        table = MetricTable()
        if uncertainties is not None and len(uncertainties) != len(predictions):
            raise ValueError(f"Expected {len(predictions)} uncertainties, got {len(uncertainties)}.")
        for index, (prediction, reference) in enumerate(zip(predictions, references, strict=True)):
            target, probability = np.array(reference, dtype=bool), np.array(prediction, dtype=np.float64)
            metrics = segmentation_metrics(probability > 0.5, target, tuple(spacing), tolerance)
            if self.config_name == "probabilities":
                uncertainty = None if uncertainties is None else np.asarray(uncertainties[index])
                metrics |= calibration_metrics(probability, target, uncertainty)
            table.add(str(index), metrics)
        return {**table.mean(), **{f"{key}_std": value for key, value in table.std().items()}}

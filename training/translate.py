"""SAM-I2I on files: slices and NIfTI volumes of the target contrast, pictures of them, and a JSON report."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel

from imedsam.processing.image_processing_sam_i2i import SamI2IImageProcessor
from imedsam.processing.volumes import (
    TISSUE_SHARE,
    Volume,
    get_patient,
    get_series,
    get_stem,
    get_tissue_shares,
    is_nifti,
    on_one_grid,
    read_nifti,
    write_nifti,
)
from imedsam.sam_checkpoints import refuse_damaged, refuse_nowhere
from imedsam.training.pictures import save_translations
from imedsam.training.predict import find_images, read_image
from imedsam.training.report import new_folder, provenance, weights_hash, write_json
from imedsam.training.translation_metrics import mean_metrics, slice_metrics
from imedsam.training.translators import TRANSLATOR_CONFIGS, TRANSLATORS, find_translator

NUM_SHOWN = 4  # slices of a volume in its picture


@dataclass(frozen=True)
class Series:
    """
    What shares an intensity range: the slices of one patient, or a volume.

    Args:
        name: what the slices' names share, or that of the NIfTI file.
        patient: whose it is.
        images: a file per slice, or one NIfTI file.
        targets: the same of the true contrast, if that is known.
    """

    name: str
    patient: str
    images: Sequence[Path]
    targets: Sequence[Path] | None = None


def translate_to_folder(
    model: str,
    image: Path,
    output: Path,
    *,
    target: Path | None = None,
    intensity_range: tuple[float, float] | None = None,
    batch_size: int = 8,
    device: str = "cpu",
    revision: str | None = None,
) -> dict:
    """
    Writes a PNG per slice, of 8 bits for one of 8 bits and else of 16, from 0 to its largest value, or a volume as
    `NAME.nii.gz` in float32; `pictures/NAME.png` for each patient or volume; and `report.json`.

    Args:
        model: folder or Hub name of a SAM-I2I.
        image: a slice, a folder of slices (those of one volume have names that differ after the last "_" alone), a
            NIfTI volume, or a folder of such.
        output: a new folder.
        target: the true contrast on the same grid, a file or a folder like the image, to compare with.
        intensity_range: (low, high) of what is written to a volume; [0, 1] by default.
        revision: branch, tag or commit of the model on the Hub.

    Returns:
        The report. With a target it has the metrics of each slice, and their means with intervals that resample
        patients. Of a volume, slices without tissue do not count.

    Raises:
        ValueError: before anything is written, files that are not there or do not match, a model of another type, and
            an output that is there.
        ImportError: nibabel is missing, for volumes.
    """
    series = find_series(image, target)
    check_targets(series)
    if intensity_range is not None and not is_nifti(series[0].images[0]):
        raise ValueError(
            f"Expected an intensity range for a NIfTI volume, got one for {image}: what is written of slices goes "
            "from 0 to the largest value that their PNG can have."
        )
    translator, processor = load_translator(model, device, revision)
    volumes: dict[str, dict] = {}
    with new_folder(output) as folder:
        (folder / "pictures").mkdir()
        for item in tqdm(series, desc="Translating", unit="volume", disable=len(series) == 1):
            try:
                part = _translate_series(translator, processor, item, folder, batch_size, intensity_range)
            except ValueError as error:
                raise ValueError(f"{item.name}: {error}") from error
            volumes[item.name] = part
        report = {
            "model": model,
            "revision": revision,
            "weights": weights_hash(model),
            "image": str(image),
            "target": None if target is None else str(target),
            "intensity_range": intensity_range,
            **provenance(),
            **({} if target is None else _means(volumes)),
            "volumes": volumes,
        }
        write_json(folder / "report.json", report)
    return report


@torch.inference_mode()
def translate(
    model: PreTrainedModel,
    processor: SamI2IImageProcessor,
    slices: Sequence[Any] | np.ndarray,
    batch_size: int = 8,
    progress: bool = False,
) -> list[Tensor]:
    """
    The target contrast of one volume.

    Args:
        slices: all slices of the volume, whose range they are scaled by: (S, H, W), or a list of what the processor
            takes. Those that the model sees are on its device, a batch at a time.

    Returns:
        S tensors (H, W) in [0, 1], float32, on the CPU; what they are does not depend on the batches.
    """
    intensity_range = processor.get_intensity_range(list(slices))
    outputs: list[Tensor] = []
    shown = tqdm(slices, desc="Slices", unit="slice", leave=False, disable=not progress or len(slices) == 1)
    inputs = (processor(item, intensity_range=intensity_range) for item in shown)
    for _, alike in groupby(inputs, key=lambda one: one["pixel_values"].shape):
        while batch := list(islice(alike, batch_size)):
            pixel_values = torch.cat([one["pixel_values"] for one in batch]).to(model.device)
            reconstruction = model(pixel_values).reconstruction.float().cpu()
            sizes = torch.cat([one["original_sizes"] for one in batch])
            outputs += [one.float() for one in processor.post_process_reconstruction(reconstruction, sizes)]
    return outputs


def load_translator(
    pretrained_model_name_or_path: str, device: str | torch.device = "cpu", revision: str | None = None
) -> tuple[PreTrainedModel, SamI2IImageProcessor]:
    """
    A SAM-I2I, or the U-Net that it is compared with, and its processor.

    Raises:
        ValueError: a checkpoint of another type, of another version, damaged or not whole.
    """
    path = str(pretrained_model_name_or_path)
    refuse_nowhere(path)
    finding: dict[str, Any] = {"revision": revision}
    model_type = PreTrainedConfig.get_config_dict(path, **finding)[0].get("model_type")
    name = find_translator(model_type)
    if name is None:
        raise ValueError(
            f"Expected a SAM-I2I at {path}, got a model of type {model_type!r}: `imedsam predict` takes those that "
            "segment, and imedsam.training.train_sam_i2i trains one that translates."
        )
    try:
        TRANSLATOR_CONFIGS[name].from_pretrained(path, **finding)
    except (TypeError, StrictDataclassError) as error:
        raise ValueError(f"Expected a configuration of this version in {path}/config.json, got: {error}") from error
    with refuse_damaged(path):
        # Declared to return the model alone.
        loaded: Any = TRANSLATORS[name].from_pretrained(path, output_loading_info=True, **finding)
    model, found = loaded
    if missing := sorted(found["missing_keys"]):  # which transformers filled at random
        raise ValueError(
            f"Expected a whole model at {path}, got one without {', '.join(missing[:4])}: copy or download it again."
        )
    processor = SamI2IImageProcessor.from_pretrained(path, **finding)
    if processor.size_divisor % model.config.size_divisor:
        raise ValueError(
            f"Expected a processor whose size_divisor is a multiple of {model.config.size_divisor} at {path}, got "
            f"{processor.size_divisor}: save SamI2IImageProcessor(size_divisor={model.config.size_divisor}) there."
        )
    return model.to(device).eval(), processor


def find_series(image: Path, target: Path | None = None) -> list[Series]:
    """
    The volumes, or the slices by the volumes that they are of.

    Raises:
        ValueError: no such files, or images without a target.
    """
    images = find_files(image)
    if target is None:
        targets = {}
    elif target.is_dir() != image.is_dir() or is_nifti(target) != is_nifti(image):
        raise ValueError(f"Expected a target like the image {image}, got {target}: two files, volumes or folders.")
    elif target.is_dir():
        named = {get_stem(path.name): path for path in find_files(target)}
        if missing := [path.name for path in images if get_stem(path.name) not in named]:
            raise ValueError(
                f"Expected a target of the same name for each image, got none in {target} for "
                f"{', '.join(missing[:5])}{f' and {len(missing) - 5} more' if len(missing) > 5 else ''}."
            )
        targets = {path: named[get_stem(path.name)] for path in images}
    else:
        targets = {image: find_files(target)[0]}
    series: dict[str, list[Path]] = {}
    for path in images:
        series.setdefault(get_stem(path.name) if is_nifti(path) else get_series(path.name), []).append(path)
    return [
        Series(name, get_patient(files[0].name), files, None if target is None else [targets[path] for path in files])
        for name, files in series.items()
    ]


def find_files(path: Path) -> list[Path]:
    """The slice or volume itself, or the volumes of a folder, or else its slices."""
    volumes = sorted(file for file in path.iterdir() if is_nifti(file)) if path.is_dir() else []
    return volumes or find_images(path)


def check_targets(series: Sequence[Series]) -> None:
    """
    Raises:
        ValueError: a target that does not lie on the grid of its image.
    """
    for item in series:
        for image, target in zip(item.images, item.targets or (), strict=item.targets is not None):
            if is_nifti(image):
                agree = on_one_grid(read_nifti(image), read_nifti(target))
            else:
                agree = read_image(image).size == read_image(target).size
            if not agree:
                raise ValueError(
                    f"Expected image and target on one grid, got other sizes or places of {image} and {target}: "
                    "register and resample one to the other first."
                )


def _translate_series(
    model: PreTrainedModel,
    processor: SamI2IImageProcessor,
    series: Series,
    folder: Path,
    batch_size: int,
    intensity_range: tuple[float, float] | None,
) -> dict:
    """Writes what is made of a series, and returns its part of the report."""
    slices, volume = _read_series(series.images)
    outputs = translate(model, processor, slices, batch_size, progress=True)
    sources = _scale(processor, slices)
    labels = None if series.targets is None else _scale(processor, _read_series(series.targets)[0])
    if volume is None:
        names = [path.stem for path in series.images]
        for name, image, values in zip(names, slices, outputs, strict=True):
            _to_png(values, image).save(folder / f"{name}.png")
        counted = [True] * len(slices)
    else:
        names = [str(index) for index in range(len(slices))]
        low, high = intensity_range or (0.0, 1.0)
        write_nifti(folder / f"{series.name}.nii.gz", low + (high - low) * torch.stack(outputs).numpy(), volume)
        shares = get_tissue_shares(volume.slices, processor.get_intensity_range(slices))
        counted = (shares > TISSUE_SHARE).tolist()
    save_translations(
        folder / "pictures" / f"{series.name}.png",
        {
            names[index]: (sources[index], outputs[index], *([] if labels is None else [labels[index]]))
            for index in choose(counted, NUM_SHOWN)
        },
        aspect=1.0 if volume is None else volume.spacing[1] / volume.spacing[2],
    )
    rows: dict[str, dict] = {}
    for index, name in enumerate(names):
        rows[name] = {} if volume is None else {"tissue": counted[index]}
        if labels is not None:
            rows[name] |= slice_metrics(outputs[index], labels[index])
    return {"patient": series.patient, "intensity_range": processor.get_intensity_range(slices), "slices": rows}


def _means(volumes: dict[str, dict]) -> dict:
    rows = [
        (volume["patient"], row)
        for volume in volumes.values()
        for row in volume["slices"].values()
        if row.get("tissue", True)
    ]
    means = mean_metrics([row for _, row in rows], [patient for patient, _ in rows])
    return {
        "num_patients": len({patient for patient, _ in rows}),
        "mean": {key: vars(mean) for key, mean in means.items()},
    }


def choose(counted: Sequence[bool], number: int) -> list[int]:
    """The middles of so many equal parts of the slices that count; of all if none counts."""
    candidates = np.flatnonzero(counted) if any(counted) else np.arange(len(counted))
    parts = min(number, len(candidates))
    return candidates[((np.arange(parts) + 0.5) * len(candidates) / parts).astype(int)].tolist()


def _read_series(files: Sequence[Path]) -> tuple[list[Any], Volume | None]:
    if is_nifti(files[0]):
        volume = read_nifti(files[0])
        return list(volume.slices), volume
    return [read_image(path) for path in files], None


def _scale(processor: SamI2IImageProcessor, slices: Sequence[Any]) -> list[Tensor]:
    """(H, W) each, in [0, 1] by their volume's range, as labels are in training."""
    limits = processor.get_intensity_range(slices)
    scaled = (processor(item, labels=item, intensity_range=limits, label_range=limits) for item in slices)
    return [processor.post_process_reconstruction(one["labels"], one["original_sizes"])[0].float() for one in scaled]


def _to_png(values: Tensor, like: Image.Image) -> Image.Image:
    """[0, 1] as 8 bits if the other image has no more, else as 16."""
    kind = np.uint8 if np.asarray(like).dtype.itemsize == 1 else np.uint16
    return Image.fromarray((values.double().numpy() * np.iinfo(kind).max).round().astype(kind))

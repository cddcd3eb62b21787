"""The model card of a model that translates: from what into what, how well, how to use it, and what it is not for."""

from collections.abc import Mapping

from huggingface_hub import ModelCardData

from imedsam.training.model_card import (
    NO_TERMS,
    TERMS,
    Publication,
    counted,
    describe_hardware,
    describe_time,
    shown_name,
)
from imedsam.training.translation_metrics import mean_metrics

METHODS = {
    "sam_i2i": "SAM-I2I (translation between MR contrasts on SAM 2's Hiera, arXiv:2411.12755)",
    "unet": "A baseline of SAM-I2I: MONAI's U-Net",
}
TITLES = {"psnr": "PSNR (dB)", "ssim": "SSIM", "nrmse": "NRMSE"}
DIGITS = {"psnr": 2, "ssim": 3, "nrmse": 4}


def translation_card(report: Mapping, publication: Publication | None = None) -> str:
    """
    Args:
        report: what the metrics.json of a training of imedsam.training.train_sam_i2i holds.
        publication: what there is to say on the Hub; None for the folder of a training.
    """
    arguments = report["arguments"]
    base = (publication and publication.base_model) or arguments["model_name_or_path"]
    on_hub = {*report["on_hub"], *([publication.base_model] if publication and publication.base_model else [])}
    name = publication.name if publication else shown_name(arguments["output_dir"])
    repo = publication.repo_id if publication else f"path/to/{name}"
    data = ModelCardData(
        library_name="imedsam",
        pipeline_tag="image-to-image",
        license=publication.license if publication else None,
        tags=["medical", "mri", "image-translation"],
        base_model=base if base in on_hub else None,
        base_model_relation="finetune" if base in on_hub else None,
    )
    losses = [f"{arguments['l1_weight']:g} L1"]
    if not arguments["no_gan"]:
        losses.append(f"{arguments['gan_weight']:g} GAN, whose discriminator looks with CLIP's frozen image encoder")
    return CARD.format(
        head=data.to_yaml().strip(),
        name=name,
        method=METHODS[arguments["model"]],
        start="nothing" if base is None else f"`{base if base in on_hub else shown_name(base)}`",
        source=shown_name(arguments["source"]),
        target=shown_name(arguments["target"]),
        task=f" Its task: {publication.task}." if publication and publication.task else "",
        picture=f"![What it gives]({publication.picture})\n\n" if publication and publication.picture else "",
        usage=USAGE.format(repo=repo),
        repo=repo,
        table=_table(report),
        slices=report["num_slices"]["train"],
        patients=counted(len(report["patients"]["train"]), "patient"),
        epochs=counted(len(report["history"]), "epoch"),
        losses=" + ".join(losses),
        time=describe_time(report["seconds"]),
        hardware=describe_hardware(report),
        seed=arguments["seed"],
        kept=f"those of epoch {report['best_epoch'] + 1}, the best by validation PSNR"
        if report["best_epoch"] >= 0
        else "the last ones",
        trained=report["trainable_parameters"],
        parameters=report["parameters"],
        terms=TERMS.format(license=publication.license, data=publication.data_terms or NO_TERMS)
        if publication
        else "",
    )


def _table(report: Mapping) -> str:
    """A row per split that was scored."""
    lines = [f"| | {' | '.join(TITLES.values())} |", "|---|---:|---:|---:|"]
    for split in ("validation", "test"):
        if rows := report.get(f"{split}_slices"):
            patients = [row["patient"] for row in rows]
            means = mean_metrics(rows, patients)
            cells = [_shown(means[key], DIGITS[key]) for key in TITLES]
            who = f"{split} ({len(rows)} slices of {counted(len(set(patients)), 'patient')})"
            lines.append(f"| {who} | {' | '.join(cells)} |")
    return "\n".join(lines) if len(lines) > 2 else "It was not scored on patients that it was not trained on."


def _shown(interval, digits: int) -> str:
    bounds = "" if interval.low != interval.low else f" [{interval.low:.{digits}f}, {interval.high:.{digits}f}]"
    return f"{interval.mean:.{digits}f}{bounds}"


USAGE = """from pathlib import Path

import numpy as np
from imedsam.processing.volumes import read_nifti, write_nifti
from imedsam.training.translate import load_translator, translate

model, processor = load_translator("{repo}")
volume = read_nifti(Path("source.nii.gz"))
slices = translate(model, processor, volume.slices)
write_nifti(Path("target.nii.gz"), np.stack(slices), volume)"""
CARD = """---
{head}
---

# {name}

{method};
trained from {start} to make `{target}` out of `{source}`, slice by slice.
What it gives is in [0, 1], of the range of the target's volumes.{task}

{picture}## How to use

`pip install` the path of imedsam's repository with its extra `medical`, then:

```python
{usage}
```

or `imedsam translate --model {repo} --image source.nii.gz -o translated`. Slices in PNG and TIFF files are taken too.

## Metrics

Means over slices, with 95 % intervals in brackets that resample patients, if there are several. PSNR has a data range
of 1, SSIM Gaussian windows of 11 x 11 pixels, and NRMSE is over the target's root mean square.

{table}

## Training

{slices} slices of {patients}, {epochs}, {time}{hardware}, seed {seed}; loss {losses}; the weights are {kept}.
{trained:,} of {parameters:,} parameters were trained. `metrics.json` holds the arguments, versions and history.
{terms}
## Limits and intended use

For research on images like those that it was trained on. Not for clinical use: it makes up what the source does not
show, and may leave out or invent a lesion. The scores say nothing about scanners and populations that are not in them.
"""

"""Files of a trained model that run without this package: its encoder, its prompts, its field at given coordinates."""

import importlib
import inspect
import logging
import math
import warnings
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imedsam.implicit_decoder import ImplicitDecoder, normalise
from imedsam.layers import HiddenLinear
from imedsam.modeling_imedsam import IMedSamModel
from imedsam.pipeline import IMedSamPipeline
from imedsam.prompt_fusion import Prompts
from imedsam.tiles import pixel_centres
from imedsam.training.baselines import load_pipeline
from imedsam.training.report import new_folder, write_json
from imedsam.uncertainty import logit_variance, probability_variance, selection_threshold

TOLERANCE = 1e-3  # of logits, between torch and onnxruntime


def export_to_folder(
    model: str,
    output: Path,
    *,
    file_format: str = "onnx",
    int8: bool = False,
    base_model: str | None = None,
    revision: str | None = None,
) -> float:
    """
    Writes `encoder`, `prompt` and `field`, as .onnx or .pt2, and `export.json`, which says how images are prepared,
    into a new folder, and compares what they give with the model.

    Args:
        model: folder or Hub name of a trained I-MedSAM; its LoRA is merged.
        output: the new folder.
        file_format: "onnx", or "torch" for `torch.export.load`.
        int8: the encoder's matrix products in 8-bit integers, dynamically quantised, for CPUs: smaller and faster, and
            less exact (`benchmarks/onnx_export.py`).
        base_model: the SAM of an adapter, if it is not where the adapter says.
        revision: branch, tag or commit of the model on the Hub.

    Returns:
        The largest difference of a logit to the model's, with int8 of the quantised encoder's.

    Raises:
        ValueError: a model that has no such field (see `check_exportable`), int8 without ONNX, or files that do not
            give what the model gives.
    """
    if int8 and file_format != "onnx":
        raise ValueError(f"Expected int8 with the onnx format, got {file_format}: leave it out.")
    pipeline = load_pipeline(model, base_model_name_or_path=base_model, revision=revision)
    check_exportable(pipeline)
    network = pipeline.model.float().requires_grad_(False)
    inputs = example_inputs(network)
    with new_folder(output) as folder:
        for name, program in export_programs(network, inputs).items():
            if file_format == "torch":
                torch.export.save(program, folder / f"{name}.pt2")
            else:
                write_onnx(program, folder / f"{name}.onnx", list(OUTPUTS[name]))
        write_json(folder / "export.json", description(pipeline))
        difference = largest_difference(network, folder, file_format, inputs)
        if not difference < TOLERANCE:
            raise ValueError(f"Expected files that give the model's logits to {TOLERANCE}, got {difference:.1e}.")
        if int8:
            quantise(folder / "encoder.onnx")
            difference = largest_difference(network, folder, file_format, inputs)
            if not math.isfinite(difference):
                raise ValueError(f"Expected finite logits with the encoder in 8-bit integers, got {difference}.")
    return difference


def check_exportable(pipeline: IMedSamPipeline) -> None:
    """What depends on more than a point and its prompt, or on the size of each image, has no such files."""
    config, image_processor = pipeline.model.config, pipeline.processor.image_processor
    if type(pipeline.model) is not IMedSamModel:
        raise ValueError(f"Expected an I-MedSAM to export, got a {type(pipeline.model).__name__}.")
    wanted = {
        "implicit_decoder=True": (config.implicit_decoder, config.implicit_decoder),
        'uncertainty="closed_form"': (config.uncertainty, config.uncertainty == "closed_form"),
        'selection="threshold" or None': (config.selection, config.selection != "top_k"),
        # Where a phase is pi, rounding decides between that and -pi.
        "a frequency_view other than 'phase'": (config.frequency_view, config.frequency_view != "phase"),
        'resize_mode="stretch" with a frequency branch': (
            image_processor.resize_mode,
            config.frequency_view is None or image_processor.resize_mode == "stretch",
        ),
    }
    for expected, (got, fits) in wanted.items():
        if not fits:
            raise ValueError(f"Expected {expected} to export, got {got!r}: load it with IMedSamPipeline instead.")


# What each file puts out.
OUTPUTS = {
    "encoder": ("image_embeddings",),
    "prompt": ("features", "prompt", "frame", "threshold"),
    "field": ("logits", "uncertainty"),
}


def example_inputs(model: IMedSamModel, prompts: int = 3, points: int = 500) -> dict[str, Tensor]:
    """Noise, and boxes and points on it: three of what may be any number, which two or one would not be."""
    generator = torch.Generator().manual_seed(0)
    side = model.config.image_size
    corners = torch.rand(prompts, 2, 2, generator=generator).sort(dim=1).values * side
    return {
        "pixel_values": torch.randn(1, 3, side, side, generator=generator),
        "input_boxes": corners.flatten(1),
        "class_labels": torch.arange(prompts) % model.config.num_labels,
        "region": torch.tensor([[-1.0, -1.0, 1.0, 1.0]]),
        "coordinates": 2 * torch.rand(points, 2, generator=generator) - 1,
    }


@torch.no_grad()
def export_programs(model: IMedSamModel, inputs: dict[str, Tensor]) -> dict[str, torch.export.ExportedProgram]:
    modules = {"encoder": EncoderModule(model), "prompt": PromptModule(model), "field": FieldModule(model)}
    prompts, points = torch.export.Dim("prompts", min=1), torch.export.Dim("points", min=1)
    dynamic = {"coordinates": {0: points}}
    dynamic |= {name: {0: prompts} for name in ("input_boxes", "class_labels", *OUTPUTS["prompt"])}
    known, programs = dict(inputs), {}
    for name, module in modules.items():
        names = list(inspect.signature(module.forward).parameters)
        shapes = {key: dynamic.get(key) for key in names}
        programs[name] = torch.export.export(
            module.eval(), tuple(known[key] for key in names), dynamic_shapes=shapes, strict=False
        )
        outputs = module(*(known[key] for key in names))
        known |= dict(zip(OUTPUTS[name], (outputs,) if isinstance(outputs, Tensor) else outputs, strict=True))
    return programs


def write_onnx(program: torch.export.ExportedProgram, path: Path, output_names: list[str]) -> None:
    import_onnx("onnxscript")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it says of every file that torchvision is not there
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter about itself
        written = torch.onnx.export(program, output_names=output_names, dynamo=True, verbose=False)
        assert written is not None
        written.save(path, external_data=False)


def description(pipeline: IMedSamPipeline) -> dict[str, Any]:
    """What a program without this package has to know to prepare an image and to name a class."""
    config, image_processor = pipeline.model.config, pipeline.processor.image_processor
    keys = ("resize_mode", "image_mean", "image_std", "window")
    values = {key: getattr(image_processor, key) for key in keys}
    return {"image_size": config.image_size, **values, "classes": config.id2label}


@torch.no_grad()
def largest_difference(model: IMedSamModel, folder: Path, file_format: str, inputs: dict[str, Tensor]) -> float:
    """Between the logits that the model and the files give at points of noise, with other numbers of prompts, too."""
    differences = []
    for prompts in (len(inputs["input_boxes"]), 1):
        chosen = {k: v[:prompts] if k in ("input_boxes", "class_labels") else v for k, v in inputs.items()}
        embeddings = model.get_image_embeddings(chosen["pixel_values"])
        field = model.get_mask_field(
            embeddings, input_boxes=chosen["input_boxes"][None], class_labels=chosen["class_labels"][None]
        )
        expected, _ = field(chosen["coordinates"][None, None])
        values = run_files(folder, file_format, chosen)
        differences.append((values["logits"] - expected[0, :, 0]).abs().max())
    return float(torch.stack(differences).max())  # nan if there is one


def run_files(folder: Path, file_format: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The outputs of all three, one after another."""
    known = dict(inputs)
    for name, outputs in OUTPUTS.items():
        if file_format == "torch":
            module = torch.export.load(folder / f"{name}.pt2").module()
            results = module(*(known[key] for key in inspect.signature(module.forward).parameters))
            results = (results,) if isinstance(results, Tensor) else results
        else:
            session = open_session(folder / f"{name}.onnx")
            found = session.run(None, {node.name: known[node.name].numpy() for node in session.get_inputs()})
            results = tuple(map(torch.from_numpy, found))
        known |= dict(zip(outputs, results, strict=True))
    return known


def open_session(path: Path) -> Any:
    onnxruntime = import_onnx("onnxruntime")
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def quantise(path: Path) -> None:
    """The weights of matrix products as 8-bit integers, and their inputs when they come."""
    quantization = import_onnx("onnxruntime.quantization")
    whole = path.with_name("float32.onnx")
    path.rename(whole)
    # onnxruntime advises to prepare the file, on the root logger; the exporter has.
    root, no_advice = logging.getLogger(), lambda record: "pre-processing" not in record.getMessage()
    root.addFilter(no_advice)
    try:
        quantization.quantize_dynamic(whole, path, op_types_to_quantize=["MatMul", "Gemm"], per_channel=True)
    finally:
        root.removeFilter(no_advice)
    whole.unlink()


def import_onnx(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(
            f"Expected {name} to export to ONNX, got none: pip install '.[onnx]' in the repository."
        ) from error


class EncoderModule(nn.Module):
    """`pixel_values` (1, 3, S, S) -> `image_embeddings` (1, C, s, s)."""

    def __init__(self, model: IMedSamModel):
        super().__init__()
        self.encoder, self.branch = model.vision_encoder, model.frequency_branch
        self.view = model.frequency_view

    def forward(self, pixel_values: Tensor) -> Tensor:
        if self.view is None or self.branch is None:
            return self.encoder(pixel_values)
        return self.encoder(pixel_values, self.branch(self.encoder.embed(self.view(pixel_values))))


class FieldModule(nn.Module):
    """
    The implicit field, of one class per prompt. It refines every point, and takes the fine field's value where a point
    is selected: no shape depends on a value.

    Inputs are `features` (P, D, H, W), `prompt` (P, C), `frame` (P, 4), `threshold` (P,), as `PromptModule` gives
    them, `class_labels` (P,) and `coordinates` (N, 2), x and y in [-1, 1] over the model's square; outputs `logits`
    and `uncertainty`, (P, N).
    """

    def __init__(self, model: IMedSamModel):
        super().__init__()
        self.decoder = cast(ImplicitDecoder, model.implicit_decoder)
        self.dropout = model.config.dropout

    def forward(
        self,
        features: Tensor,
        prompt: Tensor,
        frame: Tensor,
        threshold: Tensor,
        class_labels: Tensor,
        coordinates: Tensor,
    ) -> tuple[Tensor, Tensor]:
        encoded, hidden, prior, coarse, uncertainty = self.coarse(features, prompt, frame, class_labels, coordinates)
        if (fine := self.decoder.fine) is None:
            return coarse[..., 0], uncertainty
        points = torch.cat([encoded, coarse[..., 1:]], dim=-1)
        first, *others = fine.layers
        _, part = self.decoder.prompt_parts(prompt)
        hidden = F.relu(cast(HiddenLinear, first).first(points, cast(Tensor, part)[:, None]))
        for layer in others:
            hidden = F.relu(layer(hidden))
        hidden = F.relu(of_classes(fine.head_hidden, hidden, class_labels))
        refined = of_classes(fine.head_out, hidden, class_labels)[..., 0] + prior
        return torch.where(uncertainty > threshold[:, None], refined, coarse[..., 0]), uncertainty

    def coarse(
        self, features: Tensor, prompt: Tensor, frame: Tensor, class_labels: Tensor, coordinates: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Encoded points, hidden vectors, the prior, the logit and the features for the fine field, uncertainty."""
        encoded = self.decoder.encode(coordinates[None], features, frame)
        part, _ = self.decoder.prompt_parts(prompt)
        hidden = self.decoder.coarse(encoded, part[:, None])
        prior = torch.zeros_like(hidden[..., 0])
        if self.decoder.ellipse is not None:
            prior = self.decoder.ellipse(coordinates[None], frame, class_labels[:, None])[:, 0]
        head = self.decoder.coarse.head
        outputs = of_classes(head, hidden, class_labels)
        logits = outputs[..., :1] + prior[..., None]
        variance = logit_variance(hidden, head.weight[class_labels][:, :1], self.dropout)
        uncertainty = probability_variance(logits[..., 0], variance[:, 0])
        return encoded, hidden, prior, torch.cat([logits, outputs[..., 1:]], dim=-1), uncertainty


class PromptModule(nn.Module):
    """
    `image_embeddings` (1, C, s, s), `input_boxes` (P, 4) in pixels of the model's square, `class_labels` (P,) and
    `region` (1, 4), the part of the square [-1, 1]^2 that the image fills -> what `FieldModule` takes.
    """

    def __init__(self, model: IMedSamModel):
        super().__init__()
        self.prompt_encoder, self.mask_decoder = model.prompt_encoder, model.mask_decoder
        self.field, self.config = FieldModule(model), model.config

    def forward(
        self, image_embeddings: Tensor, input_boxes: Tensor, class_labels: Tensor, region: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        prompts = Prompts((1, input_boxes.shape[0]), input_boxes[None], None, None, None)
        encoded = self.prompt_encoder(prompts)
        positions = self.prompt_encoder.image_positions()
        features, _ = self.mask_decoder._fuse(image_embeddings + encoded.dense, positions, encoded.tokens)
        features, prompt, frame = normalise(features), encoded.mean, prompts.frame(self.config.image_size)
        if (pixel_decoder := self.field.decoder.pixel_decoder) is not None:
            features = pixel_decoder(features, prompt, frame)
        threshold = torch.zeros_like(prompt[:, 0])
        if self.field.decoder.fine is not None:
            lattice = pixel_centres((self.config.selection_lattice,) * 2, region)[0]
            *_, uncertainty = self.field.coarse(features, prompt, frame, class_labels, lattice)
            threshold = selection_threshold(uncertainty[:, None], self.config.selection_share)[:, 0]
        return features, prompt, frame, threshold


def of_classes(layer: nn.Module, inputs: Tensor, class_labels: Tensor) -> Tensor:
    """(P, N, inputs) through the linear layer of each prompt's class: (P, N, outputs)."""
    weight, bias = cast(Tensor, layer.weight)[class_labels], cast(Tensor, layer.bias)[class_labels]
    return inputs @ weight.transpose(1, 2) + bias[:, None]

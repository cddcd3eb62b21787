"""What the benchmarks share: fair timing, peak memory, a trained model, goals, and results as JSON beside a plot."""

import argparse
import gc
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from imedsam import IMedSamConfig, IMedSamImageProcessor, IMedSamModel, IMedSamPipeline, IMedSamProcessor
from imedsam.mask_field import MaskField
from imedsam.tiles import TILE_POINTS
from imedsam.training.arguments import parse_args as parse_training_args
from imedsam.training.examples import Examples, load_examples
from imedsam.training.machine import processor_name
from imedsam.training.metrics import box_from_mask
from imedsam.training.report import write_json
from imedsam.training.train import main as train

SEED = 0
FOLDER = Path(__file__).parent
PAPER = {"ellipse_prior": False}  # the configuration of its fields
FIELD_TRAINING = (
    "--num_train_epochs {epochs} --per_device_train_batch_size 2 --num_points 2500 --uniform_share 0.3 "
    "--point_weighting none --box_jitter 0.03 --evaluation_size 96 --eval_every 100 --learning_rate 1e-3 "
    "--adapter_learning_rate 1e-3 --num_eval_images 4 --seed 0 --resume_from_checkpoint latest"
)


def parse_args(description: str, models: Sequence[str] = ("model",)) -> argparse.Namespace:
    """
    Args:
        models: options that take a trained model's folder.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="Under a minute, once its small model is trained; its figures are not kept.",
    )
    parser.add_argument("--check", action="store_true", help="Exit with 1 if a goal is missed.")
    for option in models:
        parser.add_argument(
            f"--{option}", type=Path, help="A trained model's folder; by default one is trained before."
        )
    parser.add_argument("--output_dir", type=Path, help="By default benchmarks/, or outputs/benchmarks with --quick.")
    args = parser.parse_args()
    args.output_dir = args.output_dir or (Path("outputs/benchmarks") if args.quick else FOLDER)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(SEED)
    return args


def measure(functions: dict[str, Callable[[], object]], rounds: int, warm_up: int = 1) -> dict[str, dict]:
    """
    Times functions in turns, so that what else the machine does falls on all of them alike.

    Returns:
        For each, `seconds` and `cpu_seconds` (medians), and `rounds` and `cpu_rounds`, those of every round.
    """
    for function in functions.values():
        for _ in range(warm_up):
            function()
    wall: dict[str, list[float]] = {name: [] for name in functions}
    cpu: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            cpu_start, start = time.process_time(), time.perf_counter()
            function()
            wall[name].append(time.perf_counter() - start)
            cpu[name].append(time.process_time() - cpu_start)
    return {
        name: {
            "seconds": statistics.median(wall[name]),
            "cpu_seconds": statistics.median(cpu[name]),
            "rounds": wall[name],
            "cpu_rounds": cpu[name],
        }
        for name in functions
    }


def ratio(over: dict, under: dict, times: str = "rounds") -> float:
    """The median over the rounds of one function's time over another's in the same round, or in its only one."""
    return float(np.median(np.divide(over[times], under[times])))


def peak_memory(function: Callable[[], object]) -> int | None:
    """
    Bytes that the process needs at most while a function runs, beyond what it had; None where Linux is not. What is
    used for the first time counts too: run something like it before.
    """
    if sys.platform != "linux":
        function()
        return None
    import ctypes

    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what was freed before would hide what is taken now
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _memory("VmRSS")
    function()
    return _memory("VmHWM") - before


def _memory(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def available_memory() -> float:
    """Bytes; unlimited where Linux is not."""
    if sys.platform != "linux":
        return float("inf")
    lines = Path("/proc/meminfo").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))


def matrix_products() -> Callable[[], object]:
    """The largest matrix product of a tile of the coarse field, 20 times."""
    left, right, product = torch.randn(TILE_POINTS, 1024), torch.randn(1024, 512), torch.empty(TILE_POINTS, 512)

    def multiply():
        for _ in range(20):
            torch.mm(left, right, out=product)

    return multiply


MATRIX_PRODUCTS_FLOPS = 20 * 2 * TILE_POINTS * 1024 * 512


def trained_pipeline(
    args: argparse.Namespace, num_images: int | None = 8, option: str = "model", config: Mapping[str, Any] = PAPER
) -> tuple[IMedSamPipeline, Examples, str]:
    """
    A model whose fields have the paper's widths, images that it has not seen, and what both are: with IMEDSAM_DATA the
    medical start point fine-tuned on Kvasir-Sessile, and validation images; without it, and in quick runs, a small
    encoder trained on phantoms.

    Args:
        option: of `parse_args`, that takes another folder of it.
        config: values of its configuration.
    """
    root = os.environ.get("IMEDSAM_DATA")
    if root is not None and not args.quick:
        dataset, what = str(Path(root) / "data" / "kvasir_sessile"), "Kvasir-Sessile, validation images"
        start, folder = str(Path(root) / "checkpoints" / "medical-tiny-sam-384"), "outputs/benchmarks/kvasir-sessile"
        values = " ".join(f"{key}={json.dumps(value, separators=(',', ':'))}" for key, value in config.items())
        flags = f"--augmentation light --config {values} {FIELD_TRAINING.format(epochs=8)}"
    else:
        dataset, what = "phantoms:ultrasound", "phantoms that the model has not seen"
        start, folder = save_start(config), f"outputs/benchmarks/phantoms{'-quick' if args.quick else ''}"
        images, epochs = (40, 1) if args.quick else (800, 3)
        flags = f"--augmentation none --encoder_learning_rate 5e-4 --num_train_images {images} --phantom_size 384 "
        flags += f"--num_warmup_steps 20 {FIELD_TRAINING.format(epochs=epochs)}"
    given, folder = getattr(args, option), folder if option == "model" else f"{folder}-{option}"
    if given is None:
        train_once([*flags.split(), "--model_name_or_path", start, "--dataset_name", dataset, "--output_dir", folder])
    examples = load_examples(dataset, "validation", num_images=num_images, image_size=384)
    pipeline = IMedSamPipeline.from_pretrained(given or folder)
    if (mode := pipeline.processor.image_processor.resize_mode) != "stretch":
        raise SystemExit(f"Expected a model whose square is the image, resize_mode stretch, got {mode}: give another.")
    return pipeline, examples, what


def train_once(flags: list[str]) -> None:
    """Trains unless the folder holds a run with the same flags."""
    asked_for = json.loads(json.dumps(vars(parse_training_args(flags))))
    path = Path(asked_for["output_dir"]) / "metrics.json"
    made_with = json.loads(path.read_text())["arguments"] if path.exists() else {}
    if any(value not in (None, made_with.get(key)) for key, value in asked_for.items()):
        train(flags)


@torch.no_grad()
def make_field(pipeline: IMedSamPipeline, example: dict) -> MaskField:
    """The field of an image and the box of its object."""
    box = box_from_mask(example["mask"] > 0)
    inputs = pipeline.processor(images=[example["image"]], input_boxes=[[list(map(float, box))]], return_tensors="pt")
    embeddings = pipeline.model.get_image_embeddings(inputs["pixel_values"], inputs["reshaped_input_sizes"])
    return pipeline.model.get_mask_field(
        embeddings, input_boxes=inputs["input_boxes"], reshaped_input_sizes=inputs["reshaped_input_sizes"]
    )


def median_first(fields: list[MaskField]) -> list[int]:
    """Their numbers, first that of the field whose mask of 384 x 384 takes the median number of points."""
    points = [field.render((384, 384), mode="adaptive").num_points for field in fields]
    median = sorted(range(len(fields)), key=points.__getitem__)[len(fields) // 2]
    return sorted(range(len(fields)), key=lambda number: number != median)


def save_start(values: Mapping[str, Any] = PAPER) -> str:
    """
    The folder of an untrained model: a small encoder at 128 pixels below prompt fusion and fields with these values of
    the configuration; all of it is to be trained.
    """
    vision = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "mlp_dim": 384}
    vision |= {"image_size": 128, "patch_size": 8, "window_size": 0, "use_rel_pos": False, "initializer_range": 0.08}
    sam = {"vision_config": vision | {"scale": 1.0}, "prompt_encoder_config": {"image_size": 128, "patch_size": 8}}
    training = {"lora_rank": 0, "train_image_encoder": True, "train_mask_decoder": True}
    config = IMedSamConfig(sam_config=sam, **training, **values)
    folder = "outputs/benchmarks/start"
    torch.manual_seed(SEED)
    IMedSamModel(config).save_pretrained(folder)
    IMedSamProcessor(IMedSamImageProcessor(size=config.image_size)).save_pretrained(folder)
    return folder


class Goals:
    """Figures beside what they should be; printed as they come."""

    def __init__(self) -> None:
        self.rows: list[dict] = []

    def at_most(self, name: str, figure: float, target: float, unit: str = "") -> None:
        self._add(name, figure, f"at most {target:g}{unit}", figure <= target, unit)

    def at_least(self, name: str, figure: float, target: float, unit: str = "") -> None:
        self._add(name, figure, f"at least {target:g}{unit}", figure >= target, unit)

    def not_measured(self, name: str, why: str) -> None:
        self.rows.append({"name": name, "figure": None, "target": None, "met": False})
        print(f"goal {name}: not measured ({why}) missed", flush=True)

    def _add(self, name, figure, target, met, unit):
        self.rows.append({"name": name, "figure": figure, "target": target, "met": bool(met)})
        print(f"goal {name}: {figure:.4g}{unit} ({target}) {'met' if met else 'missed'}", flush=True)


def finish(name: str, args: argparse.Namespace, results: dict, goals: Goals, figure: Figure) -> None:
    """Writes NAME.json and NAME.png, and ends the process: with 1 if a goal is missed and `--check` was given."""
    report = {
        "benchmark": name,
        "quick": args.quick,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": {"processor": processor_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "versions": {
            "python": platform.python_version(),
            **{library: version(library) for library in ("imedsam", "torch", "transformers", "peft")},
        },
        "seed": SEED,
        "goals": goals.rows,
        **({"model": str(args.model or "trained for the benchmark")} if "model" in args else {}),
        **results,
    }
    FigureCanvasAgg(figure)
    figure.savefig(args.output_dir / f"{name}.png", dpi=120)
    write_json(args.output_dir / f"{name}.json", report)
    sys.exit(1 if args.check and not all(row["met"] for row in goals.rows) else 0)

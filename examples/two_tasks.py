"""
Two tasks on one encoder: an adapter for lesions in ultrasound, and one for lesions and organs in tomography, trained
apart on drawn phantoms, then loaded onto the same SAM and switched, with a picture of what each gives.

    python examples/two_tasks.py --base facebook/sam-vit-base --output_dir outputs/two_tasks

With SAM ViT-B some minutes on a GPU; `--image_size 128 --steps 300` and a smaller SAM are enough for a look on a CPU.
"""

import argparse
from pathlib import Path

from imedsam import IMedSamModel, IMedSamPipeline, IMedSamProcessor
from imedsam.training.evaluation import get_objects
from imedsam.training.examples import load_examples
from imedsam.training.pictures import overlay, save_sheet
from imedsam.training.train import main as train

TASKS = {"ultrasound": 1, "tomography": 2}  # kind of phantoms, number of classes


def main() -> None:
    args = parse_args()
    for task, classes in TASKS.items():
        train_adapter(args, task, classes)

    first, second = TASKS
    model = IMedSamModel.from_pretrained(args.output_dir / first / "adapter")
    model.load_adapter(str(args.output_dir / second / "adapter"), second)
    pipeline = IMedSamPipeline(model, IMedSamProcessor.from_pretrained(args.output_dir / first))
    rows = []
    for task, adapter in {first: "default", second: second}.items():
        model.set_adapter(adapter)
        rows.append(segment(pipeline, task))
        size = (args.output_dir / task / "adapter" / "adapter_model.safetensors").stat().st_size
        print(f"{task}: classes {', '.join(model.config.id2label.values())}; {size / 1e6:.1f} MB of adapter")
    save_sheet(rows, ["image and boxes", "masks"], args.output_dir / "two_tasks.png", list(TASKS))
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters in memory; see {args.output_dir}/two_tasks.png")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="facebook/sam-vit-base", help="Hub name, folder or file of a SAM.")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/two_tasks"))
    parser.add_argument("--image_size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=500, help="Of training, for each task.")
    return parser.parse_args()


def train_adapter(args: argparse.Namespace, task: str, classes: int) -> None:
    folder = args.output_dir / task
    flags = f"--dataset_name phantoms:{task} --num_classes {classes} --image_size {args.image_size} "
    flags += f"--phantom_size {args.image_size} --max_train_steps {args.steps} --per_device_train_batch_size 2 "
    flags += "--learning_rate 1e-3 --adapter_learning_rate 1e-3 --num_train_images 200 --num_eval_images 10 "
    flags += "--eval_every 4"
    train(["--model_name_or_path", args.base, "--output_dir", str(folder), *flags.split()])
    IMedSamModel.from_pretrained(folder).save_adapter(folder / "adapter")


def segment(pipeline: IMedSamPipeline, task: str) -> list:
    examples = load_examples(f"phantoms:{task}", "test", num_images=1, image_size=256, num_classes=TASKS[task])
    image, objects = get_objects(examples, 0)
    boxes = [list(map(float, found.box)) for found in objects]
    labels = [found.class_index for found in objects]
    masks = pipeline(image, input_boxes=boxes, class_labels=labels).masks[:, 0]
    return [overlay(image, masks & False, boxes), overlay(image, masks)]


if __name__ == "__main__":
    main()

"""
What the fine field does: are the coarse field's errors among the points that are selected, and does it mend them?

    python experiments/fine_field.py RUN [RUN ...]

RUN are names of `runner.py --dry_run` that have been trained. Writes results/RUN/fine_field.json, of which report.py
makes a table. Cost: 4 seconds an image on two cores. Expected: most errors are selected, and more mended than made;
found: they are selected, but as many are made as mended.
"""

import argparse
from pathlib import Path

import torch
from runner import HERE
from scoring import field_of, load_trained, open_examples
from tqdm.auto import tqdm

from imedsam.training.report import write_json

COUNTS = ("pixels", "selected", "coarse_errors", "coarse_errors_selected", "mended", "made")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/experiments"))
    parser.add_argument("--results", type=Path, default=HERE / "results")
    args = parser.parse_args()
    for run in args.runs:
        data, folder = run.partition("-")[0], args.output_dir / run
        if not (folder / "config.json").exists():
            raise SystemExit(
                f"Expected the weights of {run} in {folder}, got none: count where it was trained, or move its "
                "results away and train it anew."
            )
        model, processor = load_trained(folder, "imedsam")
        counts = count(model, processor, open_examples(folder / "data" / data, data, "validation"))
        write_json(args.results / run / "fine_field.json", counts)


@torch.inference_mode()
def count(model, processor, examples) -> dict[str, int]:
    """Pixels of all images, at their own size, rendered exactly with the exact box as the prompt."""
    totals = dict.fromkeys(COUNTS, 0)
    for example in tqdm(examples, unit="image"):
        field, region, mask = field_of(model, processor, example)
        target = torch.from_numpy(mask)
        masks = field.render(target.shape, region, mode="exact")
        selected = (masks.uncertainty > field.threshold[..., None, None])[0, 0, 0].cpu()
        coarse, merged = ((m[0, 0, 0].cpu() > 0) != target for m in (masks.coarse_logits, masks.logits))
        totals["pixels"] += target.numel()
        totals["selected"] += int(selected.sum())
        totals["coarse_errors"] += int(coarse.sum())
        totals["coarse_errors_selected"] += int((coarse & selected).sum())
        totals["mended"] += int((coarse & ~merged).sum())
        totals["made"] += int((~coarse & merged).sum())
    return totals


if __name__ == "__main__":
    main()

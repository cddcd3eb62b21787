"""
Robustness to loose and tight boxes: each side moves by up to a share of the box's width or height.

    python experiments/box_jitter.py [--test]

Cost: no run of its own. Expected: Dice falls with the jitter, the floors' most.
"""

from dataclasses import replace

from main_table import BEST_UNET
from runner import main
from runs import FLOORS, WITH_PRIOR, Row, Run, Table, changes

METHODS = {
    "I-MedSAM": Run(),
    "I-MedSAM, ellipse prior": Run(flags=WITH_PRIOR),
    "SAM's decoder": Run("sam_decoder"),
    "SAM's decoder, box as mask prompt too": Run("sam_decoder_box_mask"),
    "convolutional head": Run("convolutional"),
    "convolutional head, ellipse prior": Run("convolutional", flags=WITH_PRIOR),
    "U-Net with the box": BEST_UNET,
}
JITTERS = (0.0, 0.05, 0.1, 0.2)
TABLES = (
    Table(
        "box_jitter",
        "Jitter of the boxes",
        tuple(
            replace(
                row,
                label=f"{row.label}, {100 * jitter:g} %",
                changes=changes(box_jitter=jitter),
                against=f"I-MedSAM, {100 * jitter:g} %",
                x=100 * jitter,
                series=row.label,
            )
            for row in (*FLOORS, *(Row(name, (run,)) for name, run in METHODS.items()))
            for jitter in JITTERS
        ),
        (("kvasir_sessile", "validation"), ("kvasir_sessile", "test"), ("cvc_clinicdb", "test")),
        reference="I-MedSAM, 0 %",
        x="largest move of a box's side, %",
    ),
)

if __name__ == "__main__":
    main(tables=["box_jitter"])

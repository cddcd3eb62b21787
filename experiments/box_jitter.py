"""
Robustness to loose and tight boxes: each side moves by up to a share of the box's width or height.

    python experiments/box_jitter.py [--test]

Cost: no run of its own. Expected: Dice falls with the jitter, least where the image is used most.
"""

from runner import main
from runs import Row, Run, Table, changes

METHODS = {
    "I-MedSAM": Run(),
    "SAM's decoder": Run("sam_decoder"),
    "convolutional head": Run("convolutional"),
    "U-Net with the box": Run("unet", flags="--learning_rate 1e-3"),
}
TABLES = (
    Table(
        "box_jitter",
        "Jitter of the boxes",
        tuple(
            Row(
                f"{name}, {100 * jitter:g} %",
                (run,),
                changes(box_jitter=jitter),
                against=f"I-MedSAM, {100 * jitter:g} %",
                x=100 * jitter,
                series=name,
            )
            for name, run in METHODS.items()
            for jitter in (0.0, 0.05, 0.1, 0.2)
        ),
        (("kvasir_sessile", "validation"), ("kvasir_sessile", "test"), ("cvc_clinicdb", "test")),
        reference="I-MedSAM, 0 %",
        x="largest move of a box's side, %",
    ),
)

if __name__ == "__main__":
    main(tables=["box_jitter"])

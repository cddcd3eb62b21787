"""
The correlation of the masks' amplitude spectra in the loss (after arXiv:2401.10373, whose formula is not published:
this one is ours), of a field and of a U-Net, on clean images and with Gaussian noise, which neither was trained on.

    python experiments/spectral.py [--test]

Cost: 4 runs; the loss takes a whole grid, here of 128 pixels, whose 16,384 points are six times as many as in other
runs.
Expected: not known. The source says 0.8 points of Dice over a U-Net on cardiac images.
"""

from dataclasses import replace

from main_table import BEST_UNET
from runner import main
from runs import WITH_PIXEL_DECODER, Row, Run, Table, changes

DENSE, SPECTRAL = "--supervision dense --label_size 128", "--spectral_weight 0.5"
METHODS = {
    "I-MedSAM, pixel decoder": Run(data="acdc", flags=f"{DENSE} {WITH_PIXEL_DECODER}"),
    "U-Net with the box": replace(BEST_UNET, data="acdc", flags=f"{DENSE} {BEST_UNET.flags}"),
}
NOISES = (0.0, 0.05, 0.1, 0.2)


def rows(name: str, run: Run) -> tuple[Row, ...]:
    """Without and with the objective, at every noise."""
    with_spectra = replace(run, flags=f"{run.flags} {SPECTRAL}")
    return tuple(
        Row(
            f"{label}, {100 * noise:g} %",
            (one,),
            changes(noise=noise),
            against=against and f"{against}, {100 * noise:g} %",
            x=100 * noise,
            series=label,
        )
        for label, one, against in ((name, run, ""), (f"{name}, spectra", with_spectra, name))
        for noise in NOISES
    )


TABLES = (
    Table(
        "spectral",
        "The spectral objective and noise",
        tuple(row for name, run in METHODS.items() for row in rows(name, run)),
        (("acdc", "validation"), ("acdc", "test")),
        reference="U-Net with the box, 0 %",
        columns=("dice", "iou", "hd95"),
        compared=("dice", "hd95"),
        x="standard deviation of the noise, % of the range",
        about="Rows with spectra are compared with the same model without, at the same noise.",
    ),
)

if __name__ == "__main__":
    main(tables=["spectral"])

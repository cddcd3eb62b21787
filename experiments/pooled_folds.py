"""
Five folds over the training and validation images of Kvasir-Sessile, whose objects are then taken together: four
times as many as a split has, for choices and claims that 39 images cannot carry.

    python experiments/pooled_folds.py

Cost: 25 runs, at most 25 minutes each. Expected: all near their Dice on the validation split, 88 to 89. The epoch that
is kept is the best on the fold that is scored, as everywhere here: nearly always the last one.
"""

from main_table import COMPARED, OURS, WITH_CONVOLUTIONS
from runner import main
from runs import WITH_PIXEL_DECODER, WITH_PRIOR, Row, Run, Table, folds

TABLES = (
    Table(
        "pooled_folds",
        "Kvasir-Sessile in five folds",
        (
            Row("I-MedSAM", folds(Run())),
            Row(OURS, folds(Run(flags=WITH_PRIOR))),
            Row(WITH_CONVOLUTIONS, folds(Run(flags=WITH_PIXEL_DECODER))),
            Row("SAM's decoder, box as mask prompt too", folds(Run("sam_decoder_box_mask"))),
            Row("convolutional head, ellipse prior", folds(Run("convolutional", flags=WITH_PRIOR))),
        ),
        (("kvasir_sessile", "validation"),),
        reference=OURS,
        compared=COMPARED,
    ),
)

if __name__ == "__main__":
    main(tables=["pooled_folds"])

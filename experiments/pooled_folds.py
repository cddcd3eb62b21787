"""
Five folds over the training and validation images of Kvasir-Sessile, whose objects are then taken together: four times
as many as a split has, for choices and claims that 39 images cannot carry.

    python experiments/pooled_folds.py

Cost: 10 runs. Expected: I-MedSAM near its Dice on the validation split.
"""

from runner import main
from runs import Row, Run, Table, folds

TABLES = (
    Table(
        "pooled_folds",
        "Kvasir-Sessile in five folds",
        (
            Row("I-MedSAM", folds(Run())),
            Row("SAM's decoder", folds(Run("sam_decoder"))),
        ),
        (("kvasir_sessile", "validation"),),
        reference="I-MedSAM",
    ),
)

if __name__ == "__main__":
    main(tables=["pooled_folds"])

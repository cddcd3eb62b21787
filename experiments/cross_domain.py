"""
Kvasir-Sessile -> CVC-ClinicDB: the main table's models on another hospital's 612 frames, which none has seen.

    python experiments/cross_domain.py --test    # all of CVC-ClinicDB is for test

Cost: no run of its own beside the main table's. Expected: Dice 87 for I-MedSAM (the paper: 88.8), 88 with the ellipse
prior, 88.5 for the convolutional head, 84 for the ellipse in the box.
"""

from main_table import SESSILE
from runner import main
from runs import Table

TABLES = (
    Table(
        "cross_domain",
        "Kvasir-Sessile to CVC-ClinicDB",
        SESSILE.rows,
        (("cvc_clinicdb", "test"),),
        reference=SESSILE.reference,
        columns=SESSILE.columns,
        compared=SESSILE.compared,
        about="Intervals resample the 29 sequences, not the frames.",
    ),
)

if __name__ == "__main__":
    main(tables=["cross_domain"])

"""
Kvasir-Sessile -> CVC-ClinicDB: the main table's models on another hospital's 612 frames, which none has seen.

    python experiments/cross_domain.py --test    # all of CVC-ClinicDB is for test

Cost: no run of its own beside the main table's. Expected: I-MedSAM ahead of the ellipse's Dice 84 (the paper: 88.8).
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
        reference="I-MedSAM",
        columns=SESSILE.columns,
        compared=SESSILE.compared,
        about="Intervals resample the 29 sequences, not the frames.",
    ),
)

if __name__ == "__main__":
    main(tables=["cross_domain"])

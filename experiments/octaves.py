"""
Octaves of the Fourier features of a point's position in the image.

    python experiments/octaves.py [--test]

Cost: 1 run of its own, at most 25 minutes. Expected: 10, the paper's value, no worse than 8; Dice 88.
"""

from runner import main
from runs import Row, Run, Table

TABLES = (
    Table(
        "octaves",
        "Octaves of the coordinates",
        (Row("8", (Run(flags="--config coordinate_octaves=8"),)), Row("10", (Run(),))),
        (("kvasir_sessile", "validation"), ("kvasir_sessile", "test"), ("cvc_clinicdb", "test")),
        reference="10",
    ),
)

if __name__ == "__main__":
    main(tables=["octaves"])

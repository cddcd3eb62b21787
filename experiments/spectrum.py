"""
What the frequency adapter is shown.

    python experiments/spectrum.py [--test]

Cost: 4 runs of its own, at most 25 minutes each. Expected: amplitude ahead of phase and none (the paper's Table 6);
found: Dice 88 for all.
"""

from runner import main
from runs import Row, Run, Table

TABLES = (
    Table(
        "spectrum",
        "Picture of the spectrum",
        (
            Row("none", (Run(flags="--config frequency_view=null"),)),
            Row("phase", (Run(flags="--config frequency_view=phase"),)),
            Row("Haar wavelets", (Run(flags="--config frequency_view=haar"),)),
            Row("amplitude, no logarithm", (Run(flags="--config frequency_log=false"),)),
            Row("amplitude", (Run(),)),
        ),
        (("kvasir_sessile", "validation"), ("kvasir_sessile", "test"), ("cvc_clinicdb", "test")),
        reference="amplitude",
    ),
)

if __name__ == "__main__":
    main(tables=["spectrum"])

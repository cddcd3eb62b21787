"""
Kinds of uncertainty on one trained model: they rank the points to refine, and should rank the errors.

    python experiments/uncertainty.py [--test]

Cost: no run of its own. Expected: the closed form as good as many passes of Monte Carlo dropout, an
AUROC of 93 in both.
"""

from runner import main
from runs import Row, Run, Table, changes

TABLES = (
    Table(
        "uncertainty",
        "Kinds of uncertainty",
        (
            *(
                Row(
                    f"Monte Carlo, T = {samples}",
                    (Run(),),
                    changes(config={"uncertainty": "monte_carlo", "monte_carlo_samples": samples}),
                )
                for samples in (2, 8, 32)
            ),
            Row("closed form", (Run(),)),
        ),
        (("kvasir_sessile", "validation"), ("kvasir_sessile", "test"), ("cvc_clinicdb", "test")),
        reference="closed form",
        columns=("uncertainty_auroc", "confidence_auroc", "dice", "hd95", "ece", "brier"),
        compared=("uncertainty_auroc",),
    ),
)

if __name__ == "__main__":
    main(tables=["uncertainty"])

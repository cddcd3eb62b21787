"""
Which points the fine field decides: none, or the most uncertain share of them, by a threshold or by the paper's rule
on the rendered grid; chosen when the model is scored, and when it is trained.

    python experiments/selection.py [--test]

Cost: 2 runs of its own, at most 25 minutes each. Expected: some selection ahead of none (the paper's Table 7: 12.5 %
is best); found: Dice 88 for all, none included.
"""

from runner import main
from runs import Row, Run, Table, changes

RULES = {"threshold": "threshold", "top K": "top_k"}
AS_TRAINED = ("threshold", 0.125)
SHARES = (0.5, 0.25, 0.125, 0.0625, 0.03125)
TABLES = (
    Table(
        "selection",
        "Selection of points",
        (
            Row("none", (Run(),), changes(config={"selection": None}), x=0, series="none"),
            *(
                Row(
                    f"{100 * share:g} %, {name}",
                    (Run(),),
                    ()
                    if (rule, share) == AS_TRAINED
                    else changes(config={"selection": rule, "selection_share": share}),
                    x=100 * share,
                    series=name,
                )
                for name, rule in RULES.items()
                for share in SHARES
            ),
            Row("every point", (Run(),), changes(config={"selection_share": 1.0}), x=100, series="every point"),
            Row("trained with none", (Run(flags="--config selection=null"),), x=0, series="trained with it"),
            Row("trained with 50 %", (Run(flags="--config selection_share=0.5"),), x=50, series="trained with it"),
        ),
        (("kvasir_sessile", "validation"), ("kvasir_sessile", "test"), ("cvc_clinicdb", "test")),
        reference="12.5 %, threshold",
        x="share of points, %",
    ),
)

if __name__ == "__main__":
    main(tables=["selection"])

"""
What each part adds, from LoRA with SAM's own mask decoder on.

    python experiments/components.py [--test]

Cost: 2 runs of its own, at most 25 minutes each. Expected: every part adds (the paper's Table 5); without the
prompt's frame Dice 74, below the ellipse in the box.
"""

from runner import main
from runs import Row, Run, Table

TABLES = (
    Table(
        "components",
        "Components",
        (
            Row("LoRA", (Run("sam_decoder", flags="--config frequency_view=null"),)),
            Row("+ frequency adapter", (Run("sam_decoder"),)),
            Row("+ implicit decoder", (Run(flags="--config prompt_frame=false"),)),
            Row("+ coordinates in the prompt's frame: all", (Run(),)),
        ),
        (("kvasir_sessile", "validation"), ("kvasir_sessile", "test"), ("cvc_clinicdb", "test")),
        reference="+ coordinates in the prompt's frame: all",
        about="SAM's decoder sees the box through its prompt encoder alone here, which the start point has hardly "
        "learnt; with the box as a mask prompt too it does far better (above).",
    ),
)

if __name__ == "__main__":
    main(tables=["components"])

"""
How many training images it takes; all rows are trained for equally many steps.

    python experiments/training_share.py [--test]

Cost: 3 runs of its own, at most 25 minutes each. Expected: Dice grows with the share, from 83 at 10 % to 88.
"""

from runner import main
from runs import Row, Run, Table

# What counts in epochs is to happen after as many steps as with all 117 images.
SHARES = {10: "12 --eval_every 30 --coarse_ramp_epochs 48", 25: "29 --eval_every 12 --coarse_ramp_epochs 20"}
SHARES |= {50: "58 --eval_every 6 --coarse_ramp_epochs 10"}
TABLES = (
    Table(
        "training_share",
        "Share of the training images",
        (
            *(
                Row(f"{share} %", (Run(flags=f"--num_train_images {flags}"),), x=share)
                for share, flags in SHARES.items()
            ),
            Row("100 %", (Run(),), x=100),
        ),
        (("kvasir_sessile", "validation"), ("kvasir_sessile", "test"), ("cvc_clinicdb", "test")),
        reference="100 %",
        x="share of training images, %",
    ),
)

if __name__ == "__main__":
    main(tables=["training_share"])

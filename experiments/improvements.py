"""
What makes up for the implicit field's weaknesses: spots far from the box, and boundaries no finer than a
convolutional head's. The ellipse in the box as a prior; fewer octaves; more points drawn far from the boundary. At 128
pixels, where a run is short; what helps there has rows of its own in the main tables.

    python experiments/improvements.py

Cost: 3 runs of its own, 10 to 20 minutes each. Expected: the prior has fewer far spots (HD 20 instead of 30) and more
Dice; the others change little.
"""

from runner import main
from runs import FLOORS, WITH_PRIOR, Row, Run, Table

AT_128 = "--image_size 128"
TABLES = (
    Table(
        "improvements",
        "Improvements of the field, at 128 pixels",
        (
            *FLOORS,
            Row("I-MedSAM", (Run(flags=AT_128),)),
            Row("+ ellipse prior", (Run(flags=f"{AT_128} {WITH_PRIOR}"),)),
            Row("6 octaves instead of 10", (Run(flags=f"{AT_128} --config coordinate_octaves=6"),)),
            Row("60 % of the points uniform instead of 30", (Run(flags=f"{AT_128} --uniform_share 0.6"),)),
            Row("SAM's decoder, box as mask prompt too", (Run("sam_decoder_box_mask", flags=AT_128),)),
            Row("convolutional head", (Run("convolutional", flags=AT_128),)),
        ),
        (("kvasir_sessile", "validation"),),
        reference="I-MedSAM",
        columns=("dice", "hd", "hd95", "nsd", "asd"),
        compared=("dice", "hd", "nsd"),
    ),
)

if __name__ == "__main__":
    main(tables=["improvements"])

"""
What makes up for the implicit field's weaknesses: spots far from the box, and boundaries no finer than a
convolutional head's. The ellipse in the box as a prior; image features that have seen their neighbours, since SAM's
upscaling unfolds each token by itself; fewer octaves; more points drawn far from the boundary. At 128 pixels, where a
run is short; what helps there, at 384 too.

    python experiments/improvements.py [--test]

Cost: 7 runs of its own, 10 to 20 minutes each, at 384 pixels 40. Expected: the prior has fewer far spots (HD 20
instead of 27, at 384 pixels 19 instead of 47) and more Dice, and the context a finer boundary; found: the first holds,
the second does not.
"""

from runner import main
from runs import FLOORS, WITH_PRIOR, Row, Run, Table, seeds

AT_128 = "--image_size 128"
SCORED_ON = (("kvasir_sessile", "validation"), ("kvasir_sessile", "test"), ("cvc_clinicdb", "test"))

TABLES = (
    Table(
        "improvements",
        "Improvements of the field, at 128 pixels",
        (
            *FLOORS,
            Row("I-MedSAM", (Run(flags=AT_128),)),
            Row("+ ellipse prior", (Run(flags=f"{AT_128} {WITH_PRIOR}"),)),
            Row("+ feature context", (Run(flags=f"{AT_128} --config feature_context=true"),)),
            Row("+ both", (Run(flags=f"{AT_128} {WITH_PRIOR} feature_context=true"),)),
            Row("6 octaves instead of 10", (Run(flags=f"{AT_128} --config coordinate_octaves=6"),)),
            Row("60 % of the points uniform instead of 30", (Run(flags=f"{AT_128} --uniform_share 0.6"),)),
            Row("SAM's decoder, box as mask prompt too", (Run("sam_decoder_box_mask", flags=AT_128),)),
            Row("convolutional head", (Run("convolutional", flags=AT_128),)),
        ),
        SCORED_ON,
        reference="I-MedSAM",
        columns=("dice", "hd", "hd95", "nsd", "asd"),
        compared=("dice", "hd", "nsd"),
    ),
    Table(
        "improvements_384",
        "Improvements of the field, at 384 pixels",
        (
            *FLOORS,
            Row("I-MedSAM", seeds(Run(), 0, 1, 2)),
            Row("+ ellipse prior", (Run(flags=WITH_PRIOR),)),
            Row("+ both", (Run(flags=f"{WITH_PRIOR} feature_context=true"),)),
            Row("SAM's decoder, box as mask prompt too", (Run("sam_decoder_box_mask"),)),
            Row("convolutional head", (Run("convolutional"),)),
        ),
        SCORED_ON,
        reference="I-MedSAM",
        columns=("dice", "hd", "hd95", "nsd", "asd"),
        compared=("dice", "hd", "nsd"),
    ),
)

if __name__ == "__main__":
    main(tables=["improvements"])

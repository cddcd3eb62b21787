"""
How much of what masks get wrong lies outside of the box? Masks as they are, and ended at the prompt's box, of models
that are told the box by its corners and the frame alone, or as SAM's mask prompt too. At 128 pixels, where a run is
short.

    python experiments/far_spots.py [--test]

Cost: no run of its own beside those of resolution.py. Expected: ended at the box, masks have less than
half of the largest distance (HD), and the field that is told the box twice gains less by it; found: I-MedSAM's have
three quarters, and the latter holds.
"""

from runner import main
from runs import FLOORS, Row, Run, Table, changes

FLAGS = "--image_size 128"
METHODS = {
    "I-MedSAM": "imedsam",
    "I-MedSAM, box as mask prompt too": "imedsam_box_mask",
    "SAM's decoder, box as mask prompt too": "sam_decoder_box_mask",
}
TABLES = (
    Table(
        "far_spots",
        "Outside of the box, at 128 pixels",
        (
            *FLOORS,
            *(
                Row(label + (", ended at the box" if within_box else ""), (Run(method, flags=FLAGS),), chosen)
                for label, method in METHODS.items()
                for within_box, chosen in ((False, ()), (True, changes(within_box=True)))
            ),
        ),
        (("kvasir_sessile", "validation"), ("kvasir_sessile", "test"), ("cvc_clinicdb", "test")),
        reference="I-MedSAM",
        columns=("dice", "hd", "hd95", "nsd", "precision", "recall"),
        compared=("dice", "hd"),
    ),
)

if __name__ == "__main__":
    main(tables=["far_spots"])

"""
SF-RecSAM and its parts on BUSI, from a click: SAM's decoder with the same click, the adapters and overlapping patches
alone, what is fused with them, the uncertainty-guided loss, and the correction of false positives and negatives, by
further clicks or learnt; and I-MedSAM with boxes, with and without the same correction by its dropout samples.

    python experiments/sf_recsam.py [--test]

Cost: 10 runs of its own at 256 pixels, 5 to 60 minutes each on one core, longest with the convolutional branch, and
the main table's pixel decoder on BUSI. The learned corrector is a second stage: its run needs that of SF-RecSAM.
Expected: no numbers are published in our sources, so what counts are the differences between rows.
"""

from runner import main
from runs import WITH_PIXEL_DECODER, Row, Run, Table, changes, seeds

CLICK = "--image_size 256 --prompt click"
FUSIONS = {
    "adapters and overlapping patches": "null",
    "+ spatial branch": "spatial",
    "+ frequency branch": "frequency",
    "SF-RecSAM: + both": "spatial_frequency",
    "+ spectral filter instead": "spectral_filter",
}


def sf_recsam(fusion: str, flags: str = "") -> tuple[Run, ...]:
    config = f"--config train_mask_decoder=true fusion={fusion}"
    return (Run("sf_recsam", "busi", flags=f"{CLICK} {config} {flags}"),)


SAM = Run("sam_decoder", "busi", flags=f"{CLICK} --config lora_rank=0 frequency_view=null")
WHOLE = sf_recsam("spatial_frequency")
LEARNT = sf_recsam("spatial_frequency", "--train_corrector")
I_MEDSAM = (Run(data="busi", flags=WITH_PIXEL_DECODER),)
CORRECTED = changes(prompt="click", correct="prompts")
TABLES = (
    Table(
        "sf_recsam",
        "SF-RecSAM and its parts",
        (
            Row("SAM's decoder", seeds(SAM, 0, 1, 2), changes(prompt="click")),
            *(Row(label, sf_recsam(fusion), changes(prompt="click")) for label, fusion in FUSIONS.items()),
            Row("SAM's decoder, corrected", seeds(SAM, 0, 1, 2), CORRECTED, against="SAM's decoder"),
            Row("SF-RecSAM, corrected", WHOLE, CORRECTED, against="SF-RecSAM: + both"),
            Row("SF-RecSAM, learned corrector", LEARNT, changes(prompt="click"), against="SF-RecSAM: + both"),
            Row(
                "SF-RecSAM, uncertainty-guided loss",
                sf_recsam("spatial_frequency", "--uncertainty_weight 0.5"),
                changes(prompt="click"),
                against="SF-RecSAM: + both",
            ),
            Row("I-MedSAM, pixel decoder, boxes", I_MEDSAM),
            Row(
                "I-MedSAM, pixel decoder, boxes, corrected by dropout",
                I_MEDSAM,
                changes(correct="dropout"),
                against="I-MedSAM, pixel decoder, boxes",
            ),
        ),
        (("busi", "validation"), ("busi", "test")),
        reference="SAM's decoder",
        columns=("dice", "iou", "hd95", "uncertainty_auroc"),
        compared=("dice", "hd95"),
        about=(
            "A click in the middle of each lesion, of the larger one where an image has two; boxes, which say more, "
            "for I-MedSAM alone. The start point has seen the training images."
        ),
    ),
)

if __name__ == "__main__":
    main(tables=["sf_recsam"])

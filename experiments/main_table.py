"""
I-MedSAM beside what it has to beat, with the same start point, data, steps, augmentation and seeds.

    python experiments/main_table.py [--test]

Cost: 15 runs, 3 of them on BUSI. Expected, on Kvasir-Sessile's validation split: Dice 89 for I-MedSAM, 84 for the
ellipse in the box (the paper: 91.5 on its test split with SAM ViT-B and 1000 epochs). The U-Net's learning rate is the
one of its rows that is best on validation. With SAM's own weights: see runner.py.
"""

from runner import main
from runs import FLOORS, Row, Run, Table, seeds

UNET_RATES = ("3e-4", "1e-3", "3e-3")
COLUMNS = ("dice", "iou", "hd", "hd95", "nsd", "asd", "ece", "brier", "uncertainty_auroc")
SESSILE = Table(
    "kvasir_sessile",
    "Methods on Kvasir-Sessile",
    (
        *FLOORS,
        Row("I-MedSAM", seeds(Run(), 0, 1, 2)),
        Row("SAM's decoder", (Run("sam_decoder"),)),
        Row("SAM's decoder, box as mask prompt too", (Run("sam_decoder_box_mask"),)),
        Row("convolutional head", (Run("convolutional"),)),
        *(
            Row(f"U-Net with the box, rate {rate}", (Run("unet", flags=f"--learning_rate {rate}"),))
            for rate in UNET_RATES
        ),
        Row("U-Net without a prompt", (Run("unet_without_prompt"),)),
        Row("I-MedSAM, ImageNet start", (Run(start="imagenet"),)),
        Row("SAM's decoder, ImageNet start", (Run("sam_decoder", start="imagenet"),)),
    ),
    (("kvasir_sessile", "validation"), ("kvasir_sessile", "test")),
    reference="I-MedSAM",
    columns=COLUMNS,
)
BUSI = Table(
    "busi",
    "Methods on BUSI",
    (
        *FLOORS,
        Row("I-MedSAM", (Run(data="busi"),)),
        Row("SAM's decoder", (Run("sam_decoder", data="busi"),)),
        Row("U-Net with the box, rate 1e-3", (Run("unet", data="busi", flags="--learning_rate 1e-3"),)),
    ),
    (("busi", "validation"), ("busi", "test")),
    reference="I-MedSAM",
    columns=COLUMNS,
    about="The start point has seen the training images.",
)
TABLES = (SESSILE, BUSI)

if __name__ == "__main__":
    main(tables=["main_table"])

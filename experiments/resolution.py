"""
Does a continuous field give finer masks than logits that are upsampled? Trained and fed at 128, 192 and 384 pixels,
masks are rendered at the images' own size, beside (a) the same model's logits on its own square, interpolated
bilinearly, and (b) SAM's decoder, with the box as a mask prompt too, whose grid is coarser still. As that decoder is
told the box twice, so is the field in a row of its own; and the field with the ellipse prior is there as (a) too.
Phantoms have exact truth at 896 pixels.

    python experiments/resolution.py [--test]

Cost: 21 runs of its own, at most 25 minutes each. Expected: if the claim holds, NSD at a pixel above (a) and (b), most
at 128; it may fail. The paper's Dice at 128 and 896 pixels, 91.5 and 91.3, is near that at 384.
"""

from runner import main
from runs import WITH_PRIOR, Row, Run, Table, changes

SIZES = (128, 192, 384)
COLUMNS = ("nsd", "hd95", "asd", "dice")
COMPARED = ("nsd", "hd95")


def rows(data: str, sizes: tuple[int, ...]) -> tuple[Row, ...]:
    made = []
    for size in sizes:
        flags = f"--image_size {size}"
        ours, told_twice, sam = (
            Run(method, data=data, flags=flags) for method in ("imedsam", "imedsam_box_mask", "sam_decoder_box_mask")
        )
        prior = Run(data=data, flags=f"{flags} {WITH_PRIOR}")
        field, with_prior = f"{size}: field", f"{size}: field, ellipse prior"
        made += [
            Row(field, (ours,), x=size, series="field"),
            Row(
                f"{size}: its logits upsampled", (ours,), changes(upsampled=True), against=field, x=size, series="(a)"
            ),
            Row(f"{size}: SAM's decoder upsampled", (sam,), against=field, x=size, series="(b)"),
            Row(
                f"{size}: field, box as mask prompt too",
                (told_twice,),
                against=field,
                x=size,
                series="field, box mask",
            ),
            Row(with_prior, (prior,), against=field, x=size, series="field, prior"),
            Row(
                f"{size}: its logits upsampled, ellipse prior",
                (prior,),
                changes(upsampled=True),
                against=with_prior,
                x=size,
                series="(a), prior",
            ),
        ]
    return tuple(made)


OTHER_SIZES = tuple(
    Row(
        f"384, fed at {size}: {'its logits upsampled' if upsampled else 'field'}",
        (Run(),),
        changes(input_size=size, upsampled=upsampled),
        against=f"384, fed at {size}: field",
        x=size,
        series="384, upsampled" if upsampled else "384, field",
    )
    for size in SIZES[:2]
    for upsampled in (False, True)
)
TABLES = (
    Table(
        "resolution",
        "Input size, on polyps",
        rows("kvasir_sessile", SIZES) + OTHER_SIZES,
        (("kvasir_sessile", "validation"), ("kvasir_sessile", "test"), ("cvc_clinicdb", "test")),
        reference="384: field",
        columns=COLUMNS,
        compared=COMPARED,
        x="side of the model's square",
    ),
    Table(
        "resolution_busi",
        "Input size, on BUSI",
        rows("busi", SIZES),
        (("busi", "validation"), ("busi", "test")),
        reference="384: field",
        columns=COLUMNS,
        compared=COMPARED,
        x="side of the model's square",
    ),
    Table(
        "resolution_phantoms",
        "Input of 128 pixels, on phantoms of 896",
        rows("phantoms:ultrasound", SIZES[:1]),
        (("phantoms:ultrasound", "validation"), ("phantoms:ultrasound", "test")),
        reference="128: field",
        columns=COLUMNS,
        compared=COMPARED,
    ),
    Table(
        "output_size",
        "Output size",
        tuple(Row(f"384 to {size or 'own size'}", (Run(),), changes(output_size=size)) for size in (128, None, 896)),
        (("kvasir_sessile", "validation"), ("kvasir_sessile", "test")),
        reference="384 to own size",
        columns=("dice", "iou"),
    ),
)

if __name__ == "__main__":
    main(tables=["resolution"])

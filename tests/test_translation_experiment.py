"""The comparison of models that translate: flags that the training script takes, floors, and a table by hand."""

import json

import numpy as np
import pytest
import translation
from translation_folders import draw_slice

from imedsam.training.translation_arguments import parse_args


@pytest.mark.parametrize("method", translation.METHODS)
def test_each_run_is_one_of_the_training_script(method):
    run = translation.Run(method, "t1", "t2", "TCGA-DU-7294")
    args = parse_args([*run.flags(), "--output_dir", "out"])
    assert (args.test_patients, args.validation_patients) == (["TCGA-DU-7294"], []) and args.no_gan and args.do_test
    tried = parse_args([*translation.Run(method, "flair", "t1c", "AURORA", 3e-4).flags(), "--output_dir", "out"])
    assert (tried.test_patients, tried.validation_patients, tried.learning_rate) == ([], ["AURORA"], 3e-4)


def test_floors(monkeypatch):
    """The target is the source's negative, of which the others' histogram knows values alone."""
    volumes = {
        patient: np.stack([draw_slice(10 * number + index) / 255 for index in range(2)])
        for number, patient in enumerate(translation.PATIENTS)
    }
    negatives = {patient: 1 - values for patient, values in volumes.items()}
    monkeypatch.setattr(translation, "read_volumes", {"t1": volumes, "t2": negatives}.get)
    rows = translation.floors()
    assert [len(found) for found in rows.values()] == [16, 16]
    first = rows["identity"][0]
    assert (first["way"], first["patient"]) == ("t1-t2", "AURORA")
    given, true = volumes["AURORA"][0], negatives["AURORA"][0]
    assert first["psnr"] == pytest.approx(-10 * np.log10(((given - true) ** 2).mean()))
    assert rows["histogram match"][0]["psnr"] != pytest.approx(first["psnr"], abs=0.01)


def test_the_table(tmp_path):
    def slices(psnr):
        return [{"patient": p, "psnr": psnr, "ssim": 0.5, "nrmse": 0.25} for p in translation.PATIENTS]

    floors = [{**row, "way": way} for way in ("t1-t2", "t2-t1") for row in slices(20.0)]
    (tmp_path / "floors.json").write_text(json.dumps({"identity": floors}))
    unet, hiera, _ = translation.METHODS
    for method, patients, psnr in ((unet, 4, 24.0), (hiera, 3, 30.0)):  # one of Hiera's is missing
        for patient, row in list(zip(translation.PATIENTS, slices(psnr), strict=True))[:patients]:
            name = translation.Run(method, "t1", "t2", patient).name
            (tmp_path / f"{name}.json").write_text(json.dumps({"test_slices": [row]}))
    there, back = translation.report(tmp_path).split("\n\n")
    assert there.splitlines()[2:] == [
        "| identity | 20.00 [20.00, 20.00] | 0.500 [0.500, 0.500] | 0.250 [0.250, 0.250] | -4.00 [-4.00, -4.00] |",
        "| MONAI's U-Net | 24.00 [24.00, 24.00] | 0.500 [0.500, 0.500] | 0.250 [0.250, 0.250] |  |",
    ]
    assert len(back.splitlines()) == 3

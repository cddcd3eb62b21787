"""The module for `evaluate` loads offline from its folder, and says what the package's functions say."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import imedsam.training
from imedsam.training.calibration import calibration_metrics
from imedsam.training.metrics import segmentation_metrics

FOLDER = Path(list(imedsam.training.__path__)[0]) / "imedsam_metrics"
CODE = """
import json, sys
import evaluate, numpy as np
folder, files = sys.argv[1:]
arrays = np.load(files)
masks = evaluate.load(folder)
results = [masks.compute(predictions=arrays["probability"] > 0.5, references=arrays["target"], spacing=(2.0, 1.0))]
for row in range(2):
    masks.add(prediction=arrays["probability"][row] > 0.5, reference=arrays["target"][row])
results.append(masks.compute(tolerance=2.0))
probabilities = evaluate.load(folder, "probabilities")
arguments = {"predictions": arrays["probability"], "references": arrays["target"]}
results.append(probabilities.compute(**arguments, uncertainties=arrays["uncertainty"]))
percent, cut = evaluate.load(folder, "probabilities"), evaluate.load(folder, "probabilities")
for call in (
    lambda: evaluate.load(folder, "logits"),
    lambda: probabilities.compute(**arguments, uncertainties=[1]),
    lambda: percent.compute(predictions=100 * arrays["probability"], references=arrays["target"]),
    lambda: cut.compute(**arguments, uncertainties=arrays["uncertainty"][:, 1:]),
):
    try:
        call()
    except ValueError as error:
        results.append(str(error))
print(json.dumps(results))
"""


@pytest.mark.slow
def test_the_module_loads_offline_and_agrees(tmp_path):
    rng = np.random.default_rng(0)
    probability, uncertainty = rng.random((2, 2, 12, 20)).astype(np.float32)
    target = rng.random((2, 12, 20)) < probability
    np.savez(tmp_path / "arrays.npz", probability=probability, uncertainty=uncertainty, target=target)
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1"}
    command = [sys.executable, "-W", "error", "-c", CODE, str(FOLDER), str(tmp_path / "arrays.npz")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    scaled, tolerant, probabilistic, *errors = json.loads(done.stdout.splitlines()[-1])

    pairs = list(zip(probability, uncertainty, target, strict=True))
    for result, options in ((scaled, {"spacing": (2.0, 1.0)}), (tolerant, {"tolerance": 2.0}), (probabilistic, {})):
        rows = [segmentation_metrics(p > 0.5, t, **options) for p, _, t in pairs]
        if not options:
            for row, (p, u, t) in zip(rows, pairs, strict=True):
                row |= calibration_metrics(p, t, u)
        expected = {key: np.mean([row[key] for row in rows]) for key in rows[0]}
        expected |= {f"{key}_std": np.std([row[key] for row in rows]) for key in rows[0]}
        assert result == pytest.approx(expected)
    assert scaled["hd_std"] != 0 and probabilistic["uncertainty_auroc"] != 0.5
    assert 'Expected the configuration "masks" or "probabilities", got \'logits\'' in errors[0]
    assert "Expected 2 uncertainties, got 1" in errors[1]
    assert "`probability` must be in [0, 1], got values from" in errors[2]
    assert "`uncertainty` and `target` must have one shape (H, W), got (11, 20) and (12, 20)" in errors[3]

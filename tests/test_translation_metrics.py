"""PSNR, SSIM and NRMSE against scikit-image, what the paper's table implies, and what has no value."""

import math

import numpy as np
import pytest
import torch
from skimage.metrics import normalized_root_mse, peak_signal_noise_ratio, structural_similarity

from imedsam.training.intervals import mean_interval
from imedsam.training.translation_metrics import mean_metrics, slice_metrics


def draw(height, width, seed=0):
    """A slice with smooth parts and air, and one that is not far from it."""
    generator = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width]
    true = np.clip(np.sin(rows / 7) * np.cos(columns / 5), 0, 1)
    return np.clip(true * 0.9 + 0.05 * generator.normal(size=true.shape), 0, 1), true


@pytest.mark.parametrize(("height", "width"), [(64, 48), (11, 30), (240, 240)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_against_scikit_image(height, width, dtype):
    given, true = (torch.from_numpy(values).to(dtype) for values in draw(height, width))
    options = {"data_range": 1, "gaussian_weights": True, "use_sample_covariance": False}
    assert slice_metrics(given, true) == pytest.approx(
        {
            "psnr": peak_signal_noise_ratio(true.numpy(), given.numpy(), data_range=1),
            "ssim": structural_similarity(true.double().numpy(), given.double().numpy(), **options),
            "nrmse": normalized_root_mse(true.numpy(), given.numpy()),
        },
        rel=1e-5,
    )
    default = structural_similarity(true.numpy(), given.numpy(), data_range=1)
    assert slice_metrics(given, true)["ssim"] != pytest.approx(default, abs=1e-3)  # 7 x 7, uniform


def test_by_hand():
    true, given = torch.zeros(4, 5), torch.zeros(4, 5)
    true[0, 0], given[0, 0], given[1, 2] = 0.6, 0.8, 0.1
    metrics = slice_metrics(given, true)
    assert metrics["psnr"] == pytest.approx(-10 * math.log10((0.2**2 + 0.1**2) / 20))
    assert metrics["nrmse"] == pytest.approx(math.sqrt(0.2**2 + 0.1**2) / 0.6)
    assert math.isnan(metrics["ssim"])  # smaller than a window


def test_the_relation_of_the_papers_columns():
    """Tables 1 and 2: PSNR + 20 log10(NRMSE) is that of the target contrast, as it is here for one slice."""
    tables = {
        "T1 to T2": ([27.00, 27.15, 27.60, 27.89, 28.01, 27.68], [0.2132, 0.2100, 0.1997, 0.1925, 0.1904, 0.1974]),
        "T2 to T1": ([29.09, 29.62, 29.77, 30.19, 30.53, 30.21], [0.0901, 0.0841, 0.0829, 0.0786, 0.0757, 0.0781]),
        "T1 to PD": ([27.06, 27.77, 27.97, 28.20, 28.58, 28.24], [0.1205, 0.1110, 0.1082, 0.1055, 0.1013, 0.1052]),
        "PD to T1": ([29.03, 29.33, 29.80, 30.20, 30.42, 30.11], [0.0901, 0.0870, 0.0822, 0.0786, 0.0767, 0.0795]),
    }
    constants = {task: np.add(psnr, 20 * np.log10(nrmse)) for task, (psnr, nrmse) in tables.items()}
    for constant in constants.values():
        assert np.ptp(constant) < 0.13  # of dB; means of slices do not have it exactly
    assert [round(float(values.mean()), 1) for values in constants.values()] == [13.6, 8.1, 8.7, 8.1]
    assert abs(constants["T2 to T1"].mean() - constants["PD to T1"].mean()) < 0.05  # one target

    true = torch.from_numpy(draw(40, 40)[1])
    of_target = -10 * math.log10(true.square().mean())
    for seed in range(3):
        metrics = slice_metrics(torch.from_numpy(draw(40, 40, seed)[0]), true)
        assert metrics["psnr"] + 20 * math.log10(metrics["nrmse"]) == pytest.approx(of_target)


def test_perfect_and_empty():
    true = torch.from_numpy(draw(20, 20)[1])
    assert slice_metrics(true, true) == pytest.approx({"psnr": 100, "ssim": 1, "nrmse": 0})
    assert slice_metrics(true + 1e-7, true)["psnr"] == 100
    air = torch.zeros(20, 20)
    perfect, wrong = slice_metrics(air, air), slice_metrics(air + 0.1, air)
    assert (perfect["psnr"], perfect["ssim"]) == (100, 1) and math.isnan(perfect["nrmse"])
    assert wrong["psnr"] == pytest.approx(20) and wrong["ssim"] < 0.1 and math.isnan(wrong["nrmse"])


def test_means_resample_patients():
    rows = [slice_metrics(*map(torch.from_numpy, draw(12, 12, seed))) for seed in range(6)]
    rows.append(slice_metrics(torch.zeros(12, 12), torch.zeros(12, 12)))
    patients = ["a", "a", "b", "b", "c", "c", "c"]
    means = mean_metrics(rows, patients, seed=3)
    assert list(means) == ["psnr", "ssim", "nrmse"]
    assert means["psnr"] == mean_interval([row["psnr"] for row in rows], patients, seed=3)
    assert (means["psnr"].count, means["nrmse"].count) == (7, 6) and means["nrmse"].low < means["nrmse"].high


def test_other_shapes():
    for given, true in (((4, 4), (4, 5)), ((1, 4, 4), (1, 4, 4))):
        with pytest.raises(
            ValueError, match=r"Expected two slices of one shape \(height, width\), got \(.*one by one"
        ):
            slice_metrics(torch.zeros(given), torch.zeros(true))

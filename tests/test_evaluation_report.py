"""`imedsam evaluate` writes what `evaluate_masks` and the bootstrap say, with one process or several."""

import csv
import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from accelerate.state import AcceleratorState, GradientState
from drawn_folders import disk, make_processor, write_folder
from PIL import Image
from processes import TWO_PROCESSES
from typer.testing import CliRunner

from imedsam.training import evaluation_plots, evaluation_report
from imedsam.training.cli import app
from imedsam.training.data import jitter_box
from imedsam.training.evaluation import evaluate_masks, floor_metrics, get_objects
from imedsam.training.evaluation_plots import draw_cases
from imedsam.training.evaluation_report import MethodScores, Setting, method_names, share_of_images
from imedsam.training.evaluation_tables import csv_table
from imedsam.training.examples import load_examples
from imedsam.training.intervals import mean_interval, paired_bootstrap
from imedsam.training.metrics import box_from_mask

FILES = {"metrics.json", "report.md", "summary.csv", "comparisons.csv", "objects.csv"}
FILES |= {f"{name}.png" for name in ("boxes", "calibration", "retention", "best", "worst")}


@pytest.fixture(autouse=True)
def fresh_accelerator():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(scope="module")
def models(from_sam, tmp_path_factory):
    """Folders of two tiny models."""
    folders = []
    for seed in (0, 1):
        folders.append(tmp_path_factory.mktemp("models") / f"model-{seed}")
        from_sam(seed=seed).save_pretrained(folders[-1])
        make_processor().save_pretrained(folders[-1])
    return folders


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    masks = [disk(40, 60, 12 + 8 * i, 20, 8 + i) for i in range(5)]
    masks[3][:] = 0
    folder = write_folder(tmp_path_factory.mktemp("data") / "set", masks)
    (folder / "splits.json").write_text(json.dumps({"test": list("abcde")}))
    return folder


def read_csv(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def evaluate(*arguments):
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments)])


def without_none(values):
    return {key: value for key, value in values.items() if value is not None}


def strictly(path):
    """JSON without the NaN that no other language reads."""

    def refuse(constant):
        raise AssertionError(constant)

    return json.loads(path.read_text(), parse_constant=refuse)


@pytest.fixture(scope="module")
def report(models, data, tmp_path_factory):
    output = tmp_path_factory.mktemp("evaluation") / "report"
    flags = ["--model", models[0], "--compare", models[1], "--data", data, "-o", output]
    flags += ["--seed", 3, "--tolerance", 3]
    result = evaluate(*flags, "--sizes", "native,24", "--box-jitter", "0.1", "--spacing", 0.5, 2)
    assert result.exit_code == 0, result.output
    assert "native size, boxes jittered by 10 %\n  model-0: Dice" in result.output
    return output


@pytest.mark.slow
def test_the_folder(report):
    assert {path.name for path in report.iterdir()} == FILES
    for path in report.glob("*.png"):
        with Image.open(path) as picture:
            assert np.asarray(picture.convert("L")).std() > 5
    with Image.open(report / "worst.png") as sheet:
        assert sheet.size == (6 * 260, 4 * 260)  # four objects; image, reference, mask and uncertainty of two models


@pytest.mark.slow
def test_the_numbers_are_those_of_evaluate_masks(report, models, data):
    content, examples = strictly(report / "metrics.json"), load_examples(str(data), "test")
    assert (content["num_images"], content["unit"], content["spacing"]) == (5, "mm", [2, 0.5])
    settings = {(s["output_size"], s["box_jitter"]): s for s in content["settings"]}
    assert list(settings) == [(None, 0.1), (24, 0.1)]
    setting = settings[24, 0.1]
    assert list(setting["methods"]) == ["model-0", "model-1", "filled box", "inscribed ellipse"]
    options = {"output_size": 24, "box_jitter": 0.1, "spacing": (2, 0.5), "seed": 3, "tolerance": 3}
    tables = floor_metrics(examples, **options)
    for model in models:
        pipeline = evaluation_report.load_pipeline(str(model), "cpu")
        table = evaluate_masks(pipeline.model, pipeline.processor, examples, **options, progress=False)
        tables[model.name] = table
    for name, table in tables.items():
        summary = setting["methods"][name]
        assert [row["name"] for row in summary["objects"]] == ["a", "b", "c", "e"]
        for key, mean in table.mean().items():
            expected = pytest.approx(mean, rel=1e-5, abs=1e-7)
            assert summary["mean"][key] == (expected if summary["count"][key] else None)
            values = [row[key] for row in summary["objects"] if row[key] is not None]
            np.testing.assert_allclose(values, table.column(key)[~np.isnan(table.column(key))], rtol=1e-5, atol=1e-7)
    dice = {name: [row["dice"] for row in summary["objects"]] for name, summary in setting["methods"].items()}
    for key in ("dice", "iou", "hd", "asd", "nsd", "ece", "brier"):
        interval = mean_interval([row[key] for row in setting["methods"]["model-0"]["objects"]], seed=3)
        assert setting["methods"]["model-0"]["interval"][key] == pytest.approx([interval.low, interval.high])
    compared = [row for row in setting["comparisons"] if row["metric"] == "dice"]
    assert [row["against"] for row in compared] == ["model-1", "filled box", "inscribed ellipse"]
    for row in compared:
        expected = paired_bootstrap(dice["model-0"], dice[row["against"]], seed=3)
        assert (row["mean"], row["low"], row["high"]) == pytest.approx((expected.mean, expected.low, expected.high))


@pytest.mark.slow
def test_a_click_for_each_object(models, data, tmp_path):
    result = evaluate("--model", models[0], "--data", data, "-o", tmp_path, "--prompt", "click", "--num-images", 2)
    assert result.exit_code == 0 and "native size, a click each" in result.output
    content = strictly(tmp_path / "metrics.json")
    pipeline, examples = evaluation_report.load_pipeline(str(models[0]), "cpu"), load_examples(str(data), "test")
    options = {"prompt": "click", "indices": [0, 1], "progress": False}
    table = evaluate_masks(pipeline.model, pipeline.processor, examples, **options)
    assert content["prompt"] == "click"
    methods = content["settings"][0]["methods"]
    assert methods["model-0"]["mean"]["dice"] == pytest.approx(table.mean()["dice"])
    floors = floor_metrics(examples, [0, 1])
    assert methods["filled box"]["mean"]["dice"] == pytest.approx(floors["filled box"].mean()["dice"])
    assert "prompted with a click per object" in (tmp_path / "report.md").read_text()


@pytest.mark.slow
def test_curves(report):
    setting = strictly(report / "metrics.json")["settings"][0]
    assert "retention" not in setting["methods"]["filled box"]
    method = setting["methods"]["model-0"]
    retention = {key: np.array(curve) for key, curve in method["retention"].items()}
    assert set(retention) == {"uncertainty", "confidence", "ideal", "random"}
    for curve in retention.values():
        assert curve[0] == 0 and curve[-1] == pytest.approx(retention["random"][-1])
        assert (curve >= retention["ideal"] - 1e-9).all()
    area = np.mean([row["retention_auc"] for row in method["objects"]])
    assert np.trapezoid(retention["uncertainty"], np.linspace(0, 1, 101)) == pytest.approx(area)
    probability, foreground, pixels = np.array(method["reliability"])
    assert len(pixels) == 15 and (foreground <= pixels).all() and (probability <= pixels).all() and pixels.sum() > 500


@pytest.mark.slow
def test_the_tables(report):
    content = strictly(report / "metrics.json")
    text = (report / "report.md").read_text()
    assert (
        text.count("| filled box | 4 |") == text.count("| inscribed ellipse | 4 |") == 2 * 2
    )  # in every table of means
    summary = content["settings"][0]["methods"]["model-0"]
    mean, std = (100 * summary[part]["dice"] for part in ("mean", "std"))
    low, high = (100 * bound for bound in summary["interval"]["dice"])
    assert f"| model-0 | 4 | {mean:.1f} ± {std:.1f} [{low:.1f}, {high:.1f}] |" in text
    assert "Distances are in\nmillimetres, NSD has a tolerance of 3 mm" in text and "nan" not in text
    assert "model-0` by Dice (native size, boxes jittered by 10 %):\n\n![Worst cases](worst.png)" in text
    rows = read_csv(report / "summary.csv")
    assert len(rows) == 2 * 4 * 14
    assert float(rows[0]["mean"]) == summary["mean"]["dice"] and rows[0]["count"] == "4"
    areas = [row["mean"] for row in rows if row["method"] == "filled box" and row["metric"] == "retention_auc"]
    assert areas == ["", ""]
    objects = read_csv(report / "objects.csv")
    assert len(objects) == 2 * 4 * 4 and float(objects[0]["hd"]) == summary["objects"][0]["hd"]
    assert len(read_csv(report / "comparisons.csv")) == sum(len(s["comparisons"]) for s in content["settings"])


@pytest.mark.slow
def test_worst_and_best_cases(models, data, tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(evaluation_report, "draw_cases", lambda cases, path: drawn.update({path.stem: cases}))
    monkeypatch.setattr(evaluation_report, "NUM_CASES", 2)
    report = evaluation_report.evaluate_to_folder(str(models[0]), str(data), tmp_path)
    rows = report["settings"][0]["methods"]["model-0"]["objects"]
    ranked = [row["name"] for row in sorted(rows, key=lambda row: row["dice"])]
    assert [prompted.name for _, prompted, _ in drawn["worst"]] == ranked[:2]
    assert [prompted.name for _, prompted, _ in drawn["best"]] == ranked[:-3:-1]
    _, prompted, predictions = drawn["worst"][0]
    prediction, dice = predictions["model-0"]
    common = (prediction.mask & prompted.target).sum()
    assert dice == pytest.approx(2 * common / (prediction.mask.sum() + prompted.target.sum()))
    draw_cases(drawn["worst"], tmp_path / "sheet.png")
    assert (tmp_path / "sheet.png").exists()


@pytest.mark.slow
def test_classes(from_sam, label_folder, tmp_path, monkeypatch):
    modes, predict = [], evaluation_report.predict_objects
    monkeypatch.setattr(
        evaluation_report,
        "predict_objects",
        lambda *args, mode, **options: modes.append(mode) or predict(*args, mode=mode, **options),
    )
    labels = {0: "organ", 1: "lesion"}
    from_sam(id2label=labels).save_pretrained(tmp_path / "model")
    make_processor().save_pretrained(tmp_path / "model")
    groups = {path.stem: "a and c" if path.stem in "ac" else path.stem for path in label_folder.glob("images/*")}
    (label_folder / "groups.json").write_text(json.dumps(groups))
    flags = ["--model", tmp_path / "model", "--data", label_folder, "-o", tmp_path / "report"]
    result = evaluate(*flags, "--split", "train", "--mode", "adaptive")
    assert result.exit_code == 0, result.output
    assert set(modes) == {"adaptive"}
    content = strictly(tmp_path / "report/metrics.json")
    method = content["settings"][0]["methods"]["model"]
    assert content["settings"][0]["num_groups"] == 2
    assert [row["name"] for row in method["objects"]] == ["a/organ", "b/organ", "b/lesion", "c/organ"]
    assert {name: part["num_objects"] for name, part in method["classes"].items()} == {"organ": 3, "lesion": 1}
    dice = [row["dice"] for row in method["objects"] if row["name"].endswith("organ")]
    assert method["classes"]["organ"]["mean"]["dice"] == pytest.approx(np.mean(dice))
    assert method["classes"]["organ"]["std"]["dice"] == pytest.approx(np.std(dice))
    # Image b shows both classes, and a and c are of one group: they are resampled together.
    together = ["a and c", "b", "b", "a and c"]
    interval = mean_interval([row["dice"] for row in method["objects"]], together)
    assert np.isfinite(interval.low) and interval.low < interval.high
    assert method["interval"]["dice"] == pytest.approx([interval.low, interval.high])
    boxes = content["settings"][0]["methods"]["filled box"]["objects"]
    pairs = [[row["dice"] for row in rows] for rows in (method["objects"], boxes)]
    expected, apart = paired_bootstrap(*pairs, together), paired_bootstrap(*pairs)
    row = next(row for row in content["settings"][0]["comparisons"] if row["metric"] == "dice")
    assert row["against"] == "filled box" and expected.low != pytest.approx(apart.low)
    assert (row["low"], row["high"]) == pytest.approx((expected.low, expected.high))
    assert "| model, lesion | 1 |" in (tmp_path / "report/report.md").read_text()


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(models, data, tmp_path):
    flags = f"evaluate --model {models[0]} --data {data} --batch-size 2 --box-jitter 0.1"
    command = [*TWO_PROCESSES, "imedsam.training.cli"]
    command += [*flags.split(), "-o", str(tmp_path / "two")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    subprocess.run(command, check=True, env=environment)
    assert CliRunner().invoke(app, [*flags.split(), "-o", str(tmp_path / "one")]).exit_code == 0
    one, two = (strictly(tmp_path / name / "metrics.json") for name in ("one", "two"))
    assert {path.name for path in (tmp_path / "two").iterdir()} == FILES
    for setting, other in zip(one["settings"], two["settings"], strict=True):
        assert setting["methods"].keys() == other["methods"].keys()
        for name, summary in setting["methods"].items():
            expected = other["methods"][name]
            for row, same in zip(summary["objects"], expected["objects"], strict=True):
                assert row.pop("name") == same.pop("name")
                assert without_none(row) == pytest.approx(without_none(same), rel=1e-5, abs=1e-7)
            for part in ("mean", "std"):
                assert without_none(summary[part]) == pytest.approx(without_none(expected[part]), rel=1e-5, abs=1e-7)
            assert summary["count"] == expected["count"]


@pytest.mark.parametrize("num_processes", [1, 2, 3, 5])
def test_processes_share_whole_batches(num_processes):
    shares = [share_of_images(7, 2, process, num_processes) for process in range(num_processes)]
    assert sorted(index for share in shares for index in share) == list(range(7))
    batches = {tuple(share[start : start + 2]) for share in shares for start in range(0, len(share), 2)}
    assert batches == {(0, 1), (2, 3), (4, 5), (6,)}


def test_the_seed_decides_the_jitter(data):
    examples = load_examples(str(data), "test")
    mask = examples[1]["mask"] > 0
    for seed in (0, 3):
        expected = jitter_box(box_from_mask(mask), 0.1, mask.shape, np.random.default_rng([seed, 1]))
        _, (prompted,) = get_objects(examples, 1, box_jitter=0.1, seed=seed)
        np.testing.assert_array_equal(prompted.box, expected)


def test_names_of_methods(tmp_path):
    assert method_names("runs/a", None) == {"a": "runs/a"}
    assert method_names("runs/a", "runs/b/") == {"a": "runs/a", "b": "runs/b/"}
    assert method_names("one/best", "two/best") == {"one/best": "one/best", "two/best": "two/best"}
    for same in ("a", "a/", str(Path("a").resolve())):
        with pytest.raises(ValueError, match=f"model to compare with, got 'a' and '{same}': they are the same"):
            method_names("a", same)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--sizes native,big", "Expected --sizes as numbers of pixels"),
        ("--box-jitter 0.7", "Expected --box-jitter as shares in"),
        ("--box-jitter many", "got 'many'"),
        ("--split holdout", "Expected split to be one of train, validation, test, all, got 'holdout'"),
        ("--tolerance -1", "must be a distance from 0 on"),
        ("--num-images 0", "Expected num_images of 1 or more"),
        ("--prompt click --box-jitter 0,0.1", "Expected no box jitter with clicks, got 0.1: leave one of them out"),
        ("--prompt scribble", "'scribble' is not one of 'box', 'click'"),
        ("--mode fast", "'fast' is not one of 'exact', 'adaptive'"),
        ("--spacing 0 1", "Expected --spacing as a positive width and height, got (0.0, 1.0)"),
        ("--compare /no/model", "Expected --compare to be a folder or a name on the Hub such as user/model, got '/no"),
        ("--model /no/model", "Expected --model to be a folder or a name on the Hub such as user/model, got '/no"),
    ],
)
def test_wrong_flags_are_refused(models, data, tmp_path, monkeypatch, flags, message):
    monkeypatch.setenv("COLUMNS", "1000")
    monkeypatch.setattr(evaluation_report, "predict_objects", None)  # before anything is predicted
    result = evaluate("--model", models[0], "--data", data, "-o", tmp_path / "report", *flags.split())
    assert result.exit_code == 2 and message in result.output
    assert not (tmp_path / "report").exists()


def test_wrong_arguments_are_refused_before_the_work(models, data, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation_report, "load_pipeline", None)
    with pytest.raises(ValueError, match=r"two positive numbers \(height, width\), got \(1.0, 0.0\)"):
        evaluation_report.evaluate_to_folder(
            str(models[0]), str(data), tmp_path / "report", spacing=(np.float64(1), 0)
        )
    (tmp_path / "report").write_text("a file")
    with pytest.raises(ValueError, match="Expected a folder for the report, got the file .*report: name another one"):
        evaluation_report.evaluate_to_folder(str(models[0]), str(data), tmp_path / "report")


@pytest.mark.parametrize("flag", ["--model", "--compare"])
def test_a_configuration_of_another_version_is_named(models, data, tmp_path, monkeypatch, flag):
    monkeypatch.setenv("COLUMNS", "1000")
    shutil.copytree(models[0], tmp_path / "other")
    config = json.loads((tmp_path / "other/config.json").read_text())
    for values, message in (
        ({"lora_rnak": 4}, "Unknown configuration key 'lora_rnak'"),
        ({"dropout": "0"}, "dropout"),
    ):
        (tmp_path / "other/config.json").write_text(json.dumps({**config, **values}))
        result = evaluate("--model", models[0], "--data", data, "-o", tmp_path / "report", flag, tmp_path / "other")
        assert result.exit_code == 2 and message in result.output
        assert f"Expected a configuration of this version in {tmp_path / 'other'}/config.json" in result.output


def test_data_of_other_classes_or_without_objects_are_refused(models, label_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    flags = ["--model", models[0], "-o", tmp_path / "report", "--split", "train"]
    result = evaluate(*flags, "--data", label_folder)
    assert result.exit_code == 2 and "got organ, lesion: name and number them alike in labels.json" in result.output
    empty = write_folder(tmp_path / "empty", [0 * disk(40, 60, 15, 20, 9)] * 5)
    result = evaluate(*flags, "--data", empty)
    assert result.exit_code == 2 and "Expected masks with an object in them in train" in result.output


@pytest.fixture
def evaluated_examples(models, tmp_path, monkeypatch):
    """`evaluated_examples(data, **options)`: what a model is evaluated on, without a report."""
    written = []
    monkeypatch.setattr(evaluation_report, "write_folder", lambda *args: written.append(args[2].examples))

    def evaluated(data, **options):
        evaluation_report.evaluate_to_folder(str(models[0]), str(data), tmp_path / "report", **options)
        return written.pop()

    return evaluated


@pytest.mark.parametrize(("sizes", "drawn"), [([None], 256), ([64], 256), ([64, 280, None], 280)])
def test_phantoms_are_drawn_at_the_largest_size(evaluated_examples, sizes, drawn):
    examples = evaluated_examples("phantoms:ultrasound", sizes=sizes, num_images=1)
    expected = load_examples("phantoms:ultrasound", "test", num_images=1, image_size=drawn)
    np.testing.assert_array_equal(examples[0]["mask"], expected[0]["mask"])


def test_splits_of_a_folder_without_any(evaluated_examples, folder):
    names = {seed: load_examples(str(folder), "test", seed=seed).names for seed in range(4)}
    seed = next(seed for seed in names if names[seed] != names[0])
    assert evaluated_examples(folder, seed=seed).names == names[seed]
    assert evaluated_examples(folder, split="all").names == list("abcde")


def test_csv_leaves_missing_values_empty():
    assert csv_table([{"a": 1, "b": float("nan")}, {"a": "x, y", "b": None}]) == 'a,b\n1,\n"x, y",\n'


@pytest.mark.parametrize(
    "name, shown", [("model", "model"), ("start" + 100 * "-" + "end", "start" + 15 * "-" + "..." + 17 * "-" + "end")]
)
def test_the_calibration_plot_says_whose_error_it_names(tmp_path, monkeypatch, name, shown):
    """And keeps its panel, however long the name is."""
    figures, make = [], evaluation_plots._figure
    monkeypatch.setattr(
        evaluation_plots, "_figure", lambda *args, **sizes: figures.append(make(*args, **sizes)) or figures[0]
    )
    scores = MethodScores(curves=[{"reliability": np.array([[0.2, 1.8], [0.0, 2.0], [2.0, 2.0]])}])
    for object_name, error in {"a": 0.1, "b": 0.2}.items():
        scores.table.add(object_name, {"ece": error})
    evaluation_plots.plot_calibration([Setting(None, 0.0, {name: scores})], tmp_path / "calibration.png")
    axis = figures[0][1][0, 0]
    legend = axis.get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["calibrated", f"{shown}\nmean ECE per object 15.0 %"]
    assert legend.get_window_extent().width < axis.get_window_extent().width

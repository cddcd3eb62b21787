"""The experiments' runs, their scores, and the tables that are made of them."""

import difflib
import json
import math
import re
import shlex
from dataclasses import replace
from pathlib import Path

import duplicates
import fine_field
import generalist
import numpy as np
import one_run
import plots
import pytest
import report
import runner
import scored_rows
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState, GradientState
from drawn_folders import disk, make_processor, write_folder
from matplotlib.backends.backend_agg import FigureCanvasAgg
from one_run import Task, carry_out, refuse_another_recipe, refuse_other_results
from PIL import Image
from runs import DATASETS, RECIPE, STARTS, Row, Run, Scoring, Table, changes, folds, seeds
from scoring import (
    ModelWithinBox,
    UpsampledModel,
    add_noise,
    at_input_size,
    changed_config,
    crop_and_resize,
    load_trained,
    score,
    to_columns,
    with_noise,
)
from torch.testing import assert_close

from imedsam.modeling_imedsam import IMedSamModel
from imedsam.training.arguments import parse_args
from imedsam.training.evaluation import evaluate_masks, predict_objects
from imedsam.training.examples import load_examples
from imedsam.training.metrics import MetricTable

GOLDEN = Path(__file__).parent / "experiments.txt"
SMALL = (
    "--max_train_steps 2 --image_size 64 --num_points 200 --evaluation_size 32 --augmentation none --eval_every 1 "
    "--mixed_precision no --config coarse_widths=[32,32] fine_widths=[32,32] coarse_features=16 fine_head_width=16 "
    "selection_lattice=8"
)


@pytest.fixture(autouse=True)
def fresh_accelerator():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


# Runs


def test_runs_are_the_same_if_their_flags_come_to_the_same():
    usual = Run()
    assert Run(flags="--config selection_share=0.125 frequency_view=amplitude --num_points 2500").name == usual.name
    different = [
        *("--config selection_share=0.25", "--config frequency_view=null", "--num_points 100", "--image_size 128"),
    ]
    runs = [usual, *(Run(flags=flags) for flags in different), *seeds(usual, 1, 2), *folds(usual)]
    runs += [Run("sam_decoder"), Run("unet"), Run("unet", flags="--learning_rate 3e-4"), Run(data="busi")]
    runs += [Run(start="imagenet")]
    assert len({run.name for run in runs}) == len(runs)


def test_flags_of_a_run_prevail_over_the_recipe():
    args = parse_args([*"--model_name_or_path m --dataset_name d --output_dir o".split(), *Run(
        flags="--num_points 7 --config lora_rank=2", seed=3).arguments(["--max_train_steps", "5"])])  # fmt: skip
    assert (args.num_points, args.seed, args.max_train_steps) == (7, 3, 5)
    assert args.config == {"lora_rank": 2, "lora_alpha": 16, "train_mask_decoder": True, "ellipse_prior": False}
    assert Run("unet").arguments()[:2] == ["--model", "unet"] and "--config" not in Run("unet").arguments()


def test_runs_of_a_model_with_a_configuration_of_its_own():
    usual, same, small = (
        Run("unet", flags=flags) for flags in ("", "--config num_res_units=2", "--config channels=[8,16]")
    )
    assert same.name == usual.name
    assert small.name == "kvasir_sessile-medical-unet-channels=8x16-seed0"
    assert "--config" not in usual.arguments() and "lora_rank=16" in Run("convolutional").arguments()
    assert Run("unet", flags="--num_points 4096").name != usual.name == Run("unet", flags="--num_points 2500").name


def test_results_are_of_the_recipes_that_the_tables_have():
    tasks = runner.make_tasks(runner.parse_args([], runner.FILES), runner.load_tables(runner.FILES))
    there = [task for task in tasks if task.run and (task.results / task.run.name / "run.json").exists()]
    assert len(there) > 40
    for task in there:
        refuse_other_results(task)


def test_every_table_compares_with_rows_that_it_has():
    tables = runner.load_tables(runner.FILES)
    assert len({table.name for table in tables}) == len(tables)
    for table in tables:
        labels = [row.label for row in table.rows]
        assert len(set(labels)) == len(labels)
        assert {table.reference, *(row.against for row in table.rows)} - {""} <= set(labels)
        assert all(metric in scored_rows.METRICS for metric in table.columns)
        assert set(table.compared) <= set(table.columns)
        for row in table.rows:
            assert bool(row.runs) != bool(row.floor)


def describe_experiments() -> str:
    """The recipe, and of each table's rows the run, its seeds and folds, and how it is scored, a line each."""
    lines = [f"recipe: {RECIPE}"]
    lines += [f"start {name}: {folder} {flags}" for name, (folder, flags) in STARTS.items()]
    lines += [f"data {name}: {flags}".rstrip() for name, flags in DATASETS.items()]
    for table in runner.load_tables(runner.FILES):
        parts = ", ".join("/".join(part) for part in table.scored_on)
        lines += [
            "",
            f"{table.name} on {parts}; {table.reference}; {' '.join(table.compared)} of {' '.join(table.columns)}",
        ]
        for row in table.rows:
            repeated = " ".join(
                f"seed{run.seed}" + ("" if run.fold is None else f"-fold{run.fold}") for run in row.runs
            )
            runs = {replace(run, seed=0, fold=None).name.removesuffix("-seed0") for run in row.runs} or {row.floor}
            how = [Scoring("", "", **dict(row.changes)).name[2:], row.against and f"against {row.against}"]
            lines.append(
                "; ".join([f"  {row.label}: {' '.join([*sorted(runs), repeated]).strip()}", *filter(None, how)])
            )
    return "\n".join(lines) + "\n"


def test_recipe_and_tables_are_those_that_were_meant(tmp_path):
    """Whoever changes a recipe or a table on purpose copies the file that the message names over the golden one."""
    expected, got = GOLDEN.read_text(), describe_experiments()
    new = tmp_path / GOLDEN.name
    new.write_text(got)
    changed = [line for line in difflib.ndiff(expected.splitlines(), got.splitlines()) if line[0] in "+-"]
    assert got == expected, "\n".join([*changed, f"If that is meant: {shlex.join(['cp', str(new), str(GOLDEN)])}"])


def test_test_splits_are_scored_only_on_demand():
    for table in runner.load_tables(runner.FILES):
        splits = {scoring.split for scorings in table.scorings(False).values() for scoring in scorings}
        assert splits <= {"validation"}


def test_a_dry_run_says_what_is_shared_and_starts_nothing(tmp_path, capsys):
    flags = ["--tables", "spectrum", "octaves", "--dry_run", "--results", str(tmp_path / "results")]
    runner.main(flags)
    out = capsys.readouterr().out
    assert "spectrum, 5 rows of 5 runs, 5 of its own" in out and "octaves, 2 rows of 2 runs, 1 of its own" in out
    assert f"  ({Run().name})" in out and f"{Run().name}: train and 1 scorings" in out
    assert out.endswith("6 distinct runs\n")
    assert not list(tmp_path.iterdir())


def test_unknown_runs_are_refused(tmp_path):
    with pytest.raises(SystemExit, match="Expected --runs out of .*, got nonsense"):
        runner.main(["--tables", "octaves", "--runs", "nonsense", "--results", str(tmp_path)])


def test_tasks_survive_the_way_to_another_process(tmp_path):
    scoring = Scoring("set", "test", 0.1, config=(("selection", None), ("selection_share", 0.5)))
    task = Task(Run(fold=2), [scoring], tmp_path, {"medical": "x"}, tmp_path / "o", tmp_path / "r", ["--seed", "1"], 3)
    assert Task.from_json(task.to_json()) == task
    assert Task.from_json(replace(task, run=None).to_json()).run is None


# Scores


def test_noise_by_hand(tmp_path):
    grey = Image.fromarray(np.full((200, 300), 100, np.uint8))
    noisy = np.asarray(add_noise(grey, 0.1, seed=3), dtype=float) - 100
    assert noisy.mean() == pytest.approx(0, abs=0.5) and noisy.std() == pytest.approx(25.5, abs=0.5)
    stronger = np.asarray(add_noise(grey, 0.2, seed=3), dtype=float) - 100  # the same pattern, clipped
    middle = np.abs(noisy) < 40
    np.testing.assert_allclose(stronger[middle], 2 * noisy[middle], atol=1.5)
    assert stronger.min() == -100
    colour = np.asarray(add_noise(grey.convert("RGB"), 0.1, seed=3), dtype=float)
    assert colour.shape == (200, 300, 3) and np.abs(np.corrcoef(colour.reshape(-1, 3).T)[0, 1]) < 0.02
    with pytest.raises(ValueError, match="Expected images of 8 bits .*, got \"?'I;16'\"?: score them without noise"):
        add_noise(Image.fromarray(np.zeros((4, 4), np.uint16)), 0.1, 0)
    examples = load_examples(str(write_folder(tmp_path, [disk(40, 60, 20, 20, 9)] * 2)), "all")
    one, other = with_noise(examples, 0.1), with_noise(examples, 0.1)
    for index in (1, 0):
        assert np.array_equal(one[index]["image"], add_noise(examples[index]["image"], 0.1, index))
        assert np.array_equal(one[index]["image"], other[index]["image"])
        assert np.array_equal(one[index]["mask"], examples[index]["mask"])
    pixels = np.asarray([one[index]["image"] for index in (0, 1)])
    assert not np.array_equal(pixels[0], pixels[1])


def test_scores_with_clicks_noise_and_corrections(from_sam, tmp_path, monkeypatch):
    model, processor = from_sam(), make_processor()
    examples = load_examples(str(write_folder(tmp_path, [disk(64, 64, 30, 34, 12)] * 2)), "all")
    usual = Scoring("set", "test")
    assert replace(usual, prompt="click", noise=0.1, correct="prompts").name == (
        "set-test-prompt=click-noise=0.1-correct=prompts"
    )
    clean, noisy, click = (
        score(model, processor, examples, one)
        for one in (usual, replace(usual, noise=0.2), replace(usual, prompt="click"))
    )
    expected = evaluate_masks(model, processor, examples, prompt="click")
    assert click == to_columns(expected) and click["dice"] != clean["dice"]
    expected = evaluate_masks(model, processor, with_noise(examples, 0.2))
    assert noisy == to_columns(expected) and noisy["brier"] != clean["brier"]
    given = {}
    monkeypatch.setattr("scoring.evaluate_masks", lambda *args, **options: given.update(options) or expected)
    score(model, processor, examples, replace(usual, correct="dropout"))
    assert given["correct"] == "dropout"


def test_upsampling_is_bilinear_interpolation_at_pixel_centres():
    maps = torch.randn(2, 1, 1, 12, 12)
    expected = F.interpolate(maps[:, 0], (30, 20), mode="bilinear", align_corners=False)[:, None]
    assert_close(crop_and_resize(maps, (30, 20), None), expected, atol=1e-5, rtol=1e-5)
    left = torch.tensor([[-1.0, -1.0, 0.0, 1.0]])
    half = F.interpolate(maps[:, 0], (30, 40), mode="bilinear", align_corners=False)[:, None, ..., :20]
    assert_close(crop_and_resize(maps, (30, 20), left), half, atol=1e-5, rtol=1e-5)


def test_upsampled_masks_are_those_of_the_square_where_the_image_has_its_size(from_sam, tmp_path):
    model, processor = from_sam(), make_processor()
    mask = disk(64, 64, 30, 34, 12)
    same, larger = (
        write_folder(tmp_path / "same", [mask] * 2),
        write_folder(tmp_path / "large", [disk(100, 80, 40, 50, 20)] * 2),
    )
    for folder, equal in ((same, True), (larger, False)):
        examples = load_examples(str(folder), "train")
        native, upsampled = (evaluate_masks(m, processor, examples) for m in (model, UpsampledModel(model)))
        assert (native.rows == upsampled.rows) == equal


def test_masks_end_at_the_box(from_sam, inputs):
    model = from_sam(64).merge_and_unload().eval()
    prompts = {"input_boxes": torch.tensor([[[8.0, 16, 40, 48], [0, 0, 64, 64]], [[30, 2, 60, 20], [8, 8, 24, 64]]])}
    with torch.no_grad():
        embeddings = model.get_image_embeddings(inputs["pixel_values"])
        plain, within = (one.get_mask_field(embeddings, **prompts) for one in (model, ModelWithinBox(model)))
        expected, rendered = (field.render((32, 64), mode="exact") for field in (plain, within))
        left = within.render((32, 32), torch.tensor([-1.0, -1.0, 0.0, 1.0]), "exact").logits
    for image, prompt in ((0, 0), (0, 1), (1, 0), (1, 1)):
        x0, y0, x1, y1 = prompts["input_boxes"][image, prompt].int().tolist()
        inside = torch.zeros(32, 64, dtype=torch.bool)
        inside[y0 // 2 : y1 // 2, x0:x1] = True
        logits, uncertainty = rendered.logits[image, prompt, 0], rendered.uncertainty[image, prompt, 0]
        assert torch.equal(logits[inside], expected.logits[image, prompt, 0][inside])
        assert (logits[~inside] < -10).all() and (uncertainty[~inside] == 0).all()
        assert_close(left[image, prompt, 0], logits[:, :32], atol=1e-4, rtol=1e-4)


def test_another_input_size_is_that_of_a_model_made_for_it(from_sam, inputs):
    model = from_sam(64).merge_and_unload()
    smaller, processor = at_input_size(model, make_processor(), 32)
    made = from_sam(32).merge_and_unload()
    assert_close(smaller.state_dict(), made.state_dict())
    assert processor.image_processor.size == {"height": 32, "width": 32} and smaller.config.image_size == 32
    boxes = inputs["input_boxes"] / 2
    pixels = F.interpolate(inputs["pixel_values"], 32)
    one, other = (m(pixel_values=pixels, input_boxes=boxes).pred_masks for m in (smaller, made))
    assert_close(one, other)
    assert at_input_size(model, make_processor(), 64)[0] is model and model.config.image_size == 64


def test_a_changed_configuration_holds_for_its_block(from_sam, inputs):
    model = from_sam(selection_share=0.5)

    def values():
        embeddings = model.get_image_embeddings(inputs["pixel_values"])
        field = model.get_mask_field(embeddings, input_boxes=inputs["input_boxes"])
        return field.values(torch.rand(2, 1, 50, 2, generator=torch.Generator().manual_seed(0)))

    with torch.no_grad():
        before = values()
        with changed_config(model, {"selection": None}):
            none = values()
        with changed_config(model, {"selection_share": 1.0}):
            every = values()
        after = values()
    assert_close(none.logits, before.coarse_logits)
    assert (every.logits != before.coarse_logits).all()
    assert 0 < (before.logits != before.coarse_logits).float().mean() < 1
    assert_close(after.logits, before.logits, atol=0, rtol=0)


def test_columns_have_few_digits_and_no_nan():
    table = MetricTable()
    table.add("a", {"dice": 0.123456789, "hd": math.nan})
    table.add("b", {"dice": 1.0, "hd": 12345.678})
    assert to_columns(table) == {"name": ["a", "b"], "dice": [0.12346, 1.0], "hd": [None, 12346.0]}


# From a run to a table


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Two small data sets under the names of real ones."""
    root = tmp_path_factory.mktemp("data")
    masks = [disk(40, 60, 12 + 4 * i, 20, 8 + i) for i in range(8)]
    folder = write_folder(root / "kvasir_sessile", masks)
    parts = {"train": list("abcd"), "validation": ["e", "f"], "test": ["g", "h"]}
    (folder / "splits.json").write_text(json.dumps(parts))
    write_folder(root / "cvc_clinicdb", masks[:3])
    for kind in ("images", "masks"):
        for number, path in enumerate(sorted((root / "cvc_clinicdb" / kind).iterdir())):
            path.rename(path.with_name(f"{1 + 30 * number}{path.suffix}"))
    return root


@pytest.fixture(scope="module")
def done(root, sam_folder, tmp_path_factory):
    """A run of two steps and its scores; and the task."""
    place = tmp_path_factory.mktemp("place")
    scorings = [
        Scoring("kvasir_sessile", "validation"),
        Scoring("kvasir_sessile", "validation", config=(("selection", None),)),
        Scoring("cvc_clinicdb", "test", output_size=16, upsampled=True),
    ]
    starts = {"medical": str(sam_folder)}
    task = Task(Run(), scorings, root, starts, place / "outputs", place / "results", SMALL.split())
    carry_out(task)
    carry_out(replace(task, run=None, scorings=scorings[:1]))
    return task


def test_a_run_leaves_its_facts_and_the_scores_of_every_object(done):
    folder = done.results / done.run.name
    facts = json.loads((folder / "run.json").read_text())
    assert facts["run"] == done.run.name and facts["arguments"]["max_train_steps"] == 2
    assert facts["arguments"]["config"]["lora_rank"] == 16 and "output_dir" not in facts["arguments"]
    assert facts["num_images"] == {"train": 4, "validation": 2} and facts["start"].startswith("sam")
    assert facts["machine"]["cores"] and facts["versions"]["torch"]
    assert facts["peak_memory"]["process"] > 1e8 and facts["trainable_parameters"]["LoRA"] > 0
    assert len(facts["frequency_ratio"]) == 2
    assert {path.name for path in folder.iterdir()} == {
        "run.json",
        "kvasir_sessile-validation.json",
        "kvasir_sessile-validation-selection=None.json",
        "cvc_clinicdb-test-output_size=16-upsampled=True.json",
    }
    columns = json.loads((folder / "kvasir_sessile-validation.json").read_text())
    assert columns["name"] == ["e", "f"]
    model = IMedSamModel.from_pretrained(done.output_dir / done.run.name)
    table = evaluate_masks(model, make_processor(), load_examples(str(done.data / "kvasir_sessile"), "validation"))
    np.testing.assert_allclose(columns["dice"], [row["dice"] for row in table.rows], rtol=1e-4)
    floors = json.loads((done.results / "floors" / "kvasir_sessile-validation.json").read_text())
    assert floors["inscribed ellipse"]["dice"][0] > 0.9 > floors["filled box"]["dice"][0]


def test_floors_are_those_of_the_boxes_that_a_row_has(done):
    usual, loose = Scoring("kvasir_sessile", "validation"), Scoring("kvasir_sessile", "validation", box_jitter=0.2)
    carry_out(replace(done, run=None, scorings=[loose]))
    row = Row("", floor="inscribed ellipse", changes=changes(box_jitter=0.2))
    exact, jittered = (scored_rows.read_row(row, scoring, done.results).values("dice") for scoring in (usual, loose))
    assert max(jittered) < min(exact)
    tasks = runner.make_tasks(
        runner.parse_args(["--runs", "floors"], ["box_jitter"]), runner.load_tables(["box_jitter"])
    )
    assert [task.run for task in tasks] == [None]
    assert [scoring.box_jitter for scoring in tasks[0].scorings] == [0.0, 0.05, 0.1, 0.2]


def test_what_is_done_is_not_done_again(done, monkeypatch):
    assert runner.is_done(done)
    monkeypatch.setattr("one_run.train", None)
    monkeypatch.setattr("one_run.load_trained", None)
    carry_out(done)
    more = replace(done, scorings=[*done.scorings, Scoring("kvasir_sessile", "test")])
    assert not runner.is_done(more)


def test_scores_can_be_added_to_a_trained_run(done, monkeypatch):
    monkeypatch.setattr("one_run.train", None)
    scoring = Scoring("kvasir_sessile", "validation", box_jitter=0.2)
    carry_out(replace(done, scorings=[scoring]))
    path = done.results / done.run.name / f"{scoring.name}.json"
    assert json.loads(path.read_text())["name"] == ["e", "f"]
    path.unlink()


def test_results_of_another_machine_are_not_trained_again(done, tmp_path):
    more = replace(done, scorings=[Scoring("kvasir_sessile", "test")], output_dir=tmp_path)
    with pytest.raises(SystemExit, match="Expected the weights of .*, got none: score it where it was trained"):
        carry_out(more)


def test_adaptive_scores_stand_in_for_exact_ones(done, monkeypatch):
    monkeypatch.setattr("one_run.train", None)
    scoring = Scoring("kvasir_sessile", "validation", output_size=48)
    row = Row("", (done.run,), changes(output_size=48))
    assert scored_rows.read_row(row, scoring, done.results) is None
    carry_out(replace(done, scorings=[replace(scoring, mode=None)]))
    adaptive = scored_rows.read_row(row, scoring, done.results)
    carry_out(replace(done, scorings=[scoring]))
    exact = scored_rows.read_row(row, scoring, done.results)
    assert adaptive.adaptive and not exact.adaptive
    np.testing.assert_allclose(adaptive.values("dice"), exact.values("dice"), atol=0.02)
    for mode in ("exact", None):
        (done.results / done.run.name / f"{replace(scoring, mode=mode).name}.json").unlink()


def test_another_recipe_or_other_images_are_refused(done, tmp_path):
    flags = [*done.run.arguments(done.flags), *"--model_name_or_path m --dataset_name d --output_dir o".split()]
    path = done.results / done.run.name / "run.json"
    refuse_another_recipe(path, flags)
    with pytest.raises(SystemExit, match="Expected a run of this recipe in .*, got another num_points: move it away"):
        refuse_another_recipe(path, [*flags, "--num_points", "7"])
    facts = json.loads(path.read_text())
    for flag in ("prompt", "spectral_weight", "uncertainty_weight"):
        del facts["arguments"][flag]
    (tmp_path / "run.json").write_text(json.dumps(facts))
    refuse_another_recipe(tmp_path / "run.json", flags)
    with pytest.raises(SystemExit, match="got another prompt: move it away"):
        refuse_another_recipe(tmp_path / "run.json", [*flags, "--prompt", "click"])
    splits = done.output_dir / done.run.name / "data" / "kvasir_sessile" / "splits.json"
    before = splits.read_text()
    splits.write_text(json.dumps({**json.loads(before), "train": ["a"]}))
    with pytest.raises(SystemExit, match="Expected a run with these images in .*, got one with others"):
        carry_out(replace(done, results=tmp_path))
    splits.write_text(before)


def test_tables_are_written_between_the_markers(done, tmp_path, monkeypatch):
    run = done.run
    table = Table(
        "small",
        "A table",
        (
            Row("inscribed ellipse", floor="inscribed ellipse"),
            Row("merged", (run,)),
            Row("coarse", (run,), changes(config={"selection": None})),
            Row("not there", seeds(run, 0, 1)),
        ),
        (("kvasir_sessile", "validation"), ("kvasir_sessile", "test")),
        reference="merged",
        columns=("dice", "hd95"),
    )
    monkeypatch.setattr(report, "load_tables", lambda names: [table])
    document = tmp_path / "results.md"
    document.write_text(f"# Results\n{report.BEGIN}\nold\n{report.END}\nAfter.\n")
    monkeypatch.setattr("sys.argv", ["report.py", "--results", str(done.results), "--document", str(document)])
    report.main()
    text = document.read_text()
    assert "HD95 (px), difference" not in text and "Dice, difference" in text
    assert text.startswith("# Results\n") and text.endswith("\nAfter.\n") and "old" not in text
    assert "### A table: kvasir_sessile, validation (2 objects)" in text and "kvasir_sessile, test" not in text
    dice = json.loads((done.results / run.name / "kvasir_sessile-validation.json").read_text())["dice"]
    assert f"| merged | 1 | {100 * np.mean(dice):.1f} |" in text
    assert "| coarse | 1 |" in text and "not there |" not in text and "2 steps" in text
    assert "|\n\nNot scored here: not there.\n\n2 steps" in text
    with Image.open(tmp_path / "images/experiments/small-kvasir_sessile-validation.png") as plot:
        assert plot.width > 300
    report.main()
    assert document.read_text() == text
    document.write_text("# Results\n")
    with pytest.raises(SystemExit, match="Expected the lines .* once each in .*results.md, got others: put them in"):
        report.main()


def test_what_the_fine_field_mends_and_makes(done):
    folder = done.output_dir / done.run.name
    model, processor = load_trained(folder, "imedsam")
    examples = load_examples(str(done.data / "kvasir_sessile"), "validation")

    def errors(**config):
        with changed_config(model, config):
            found = predict_objects(model, processor, examples)
            return [prediction.mask != prompted.target for prompted, prediction in found]

    merged, coarse = errors(), errors(selection=None)
    count = fine_field.count(model, processor, examples)
    assert count["pixels"] == sum(e["mask"].size for e in examples)
    assert count["coarse_errors"] == sum(c.sum() for c in coarse)
    assert count["mended"] == sum((c & ~m).sum() for c, m in zip(coarse, merged, strict=True))
    assert count["made"] == sum((~c & m).sum() for c, m in zip(coarse, merged, strict=True))
    assert count["mended"] + count["made"] > 0
    assert count["mended"] <= count["coarse_errors_selected"] <= min(count["coarse_errors"], count["selected"])


def test_what_was_left_out_is_said_of_each_set_and_fold(tmp_path):
    for run, dropped in {
        "busi-medical-imedsam-seed0": {"validation": {"a": "busi/b"}, "test": {"c": "busi/d", "e": "busi/d"}},
        "kvasir_sessile-fold0-medical-imedsam-seed0": {"validation": {"f": "kvasir_other/g"}, "test": {}},
        "kvasir_sessile-imagenet-imedsam-seed0": {"validation": {}, "test": {"h": "kvasir_sessile/i"}},
        "phantoms_ultrasound-medical-imedsam-seed0": {},
    }.items():
        (tmp_path / run).mkdir()
        (tmp_path / run / "run.json").write_text(json.dumps({"run": run, "dropped": dropped}))
    assert report.hygiene(tmp_path).splitlines()[-3:] == [
        "| busi | 1 | 2 |",
        "| kvasir_sessile-fold0 | 1 | 0 |",
        "| kvasir_sessile | 0 | 1 |",
    ]


def test_the_fine_fields_table_by_hand(tmp_path):
    assert report.fine_field(tmp_path) == ""
    (tmp_path / "run").mkdir()
    count = dict(zip(fine_field.COUNTS, (1000, 125, 40, 32, 8, 4), strict=True))
    (tmp_path / "run" / "fine_field.json").write_text(json.dumps(count))
    assert report.fine_field(tmp_path).splitlines()[-1] == "| run | 12.5 % | 4.0 % | 80.0 % | 25.0 % | 0.50 |"
    (tmp_path / "run" / "fine_field.json").write_text(json.dumps(count | {"mended": 0}))
    assert report.fine_field(tmp_path).splitlines()[-1] == "| run | 12.5 % | 4.0 % | 80.0 % | 0.0 % | nan |"


def test_seeds_are_averaged_by_object_and_folds_stand_together(tmp_path):
    run = Run()

    def write(run, columns):
        (tmp_path / run.name).mkdir(exist_ok=True)
        facts = {"arguments": {"seed": run.seed}}
        (tmp_path / run.name / "run.json").write_text(json.dumps(facts))
        (tmp_path / run.name / "kvasir_sessile-validation.json").write_text(json.dumps(columns))

    for one, dice in zip(seeds(run, 0, 1), ([0.5, 0.75], [0.75, 0.75]), strict=True):
        write(one, {"name": ["a", "b"], "dice": dice, "hd95": [None, 2.0]})
    for number, one in enumerate(folds(run, 2)):
        write(one, {"name": [f"f{number}"], "dice": [0.5 + number / 4]})
    scoring = Scoring("kvasir_sessile", "validation")
    repeated = scored_rows.read_row(Row("", seeds(run, 0, 1)), scoring, tmp_path)
    assert repeated.values("dice") == [0.625, 0.75] and repeated.values("hd95", ["b"]) == [2.0]
    assert report.average(repeated, "dice") == f"68.8 ± {100 * 0.125 / math.sqrt(2):.1f}"
    assert report.average(repeated, "hd95") == "2.0 ± 0.0" and report.average(repeated, "nsd") == ""
    pooled = scored_rows.read_row(Row("", folds(run, 2)), scoring, tmp_path)
    assert pooled.values("dice") == [0.5, 0.75] and report.average(pooled, "dice") == "62.5"
    changed = replace(repeated, objects={"a": {"dice": 0.425}, "b": {"dice": 0.55}})
    interval = scored_rows.difference(changed, repeated, "dice", "kvasir_sessile")
    assert (interval.mean, interval.low, interval.high) == pytest.approx((-20, -20, -20))


def make_scored(label="", objects=(), start="medical-tiny-sam-384", config=None, square=384, **row):
    """A row of one run of these (name, Dice, HD) and facts."""
    method, config = row.pop("method", "imedsam"), {"lora_rank": 16, "ellipse_prior": False, **(config or {})}
    facts = {
        "arguments": {
            "method": method,
            "config": {} if method.startswith("unet") else config,
            "seed": 0,
            "max_train_steps": 9,
            "num_train_epochs": 3,
            "mixed_precision": None,
        },
        "start": start,
        "image_size": square,
        "trainable_parameters": {"LoRA": 1_250_000},
        "peak_memory": {"process": 1.25e9, "gpu": None},
        "machine": {"gpu": None, "processor": "a processor"},
        "side_by_side": 2,
        "seconds": 60.0,
        "date": "2026-01-01",
        "commit": "abc",
    }
    values = {name: {"dice": dice, "hd": hd} for name, dice, hd in objects}
    return scored_rows.Scored(Row(label, (Run(),), **row), values, [], [facts])


def make_table(scored, **values):
    rows = tuple(one.row for one in scored)
    values = {"reference": rows[0].label, "columns": ("dice", "hd"), "compared": ("dice", "hd"), **values}
    return Table("table", "A table", rows, (("cvc_clinicdb", "test"),), **values)


def cells(text):
    """Of a table in Markdown, by the first cell of the row and the head of the column."""
    heads, _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines())
    return {row[0]: dict(zip(heads[1:], row[1:], strict=True)) for row in rows}


# Frames 1 and 2 of CVC-ClinicDB are of one sequence, 26 and 27 of the next one; with HD in whole pixels.
FRAMES = ("1", "2", "26", "27")
REFERENCE = make_scored("reference", [(name, 0.5, 20.0) for name in FRAMES])
BETTER = make_scored("better", zip(FRAMES, (0.5, 0.75, 0.5, 0.75), (20.0, 10.0, 20.0, 10.0), strict=True))
AGAINST = make_scored("against", [(name, 0.875, 5.0) for name in FRAMES], against="better")


def test_what_is_resampled_together_is_not_taken_apart():
    """The mean is the same in both sequences, and so in every resample of them; it is not in resamples of frames."""
    interval = scored_rows.difference(BETTER, REFERENCE, "dice", "cvc_clinicdb")
    assert (interval.mean, interval.low, interval.high) == (12.5, 12.5, 12.5)
    apart = scored_rows.difference(BETTER, REFERENCE, "dice", "busi")
    assert (apart.mean, apart.low < 12.5 < apart.high) == (12.5, True)


def test_rows_are_compared_with_the_row_that_they_name():
    scored = [REFERENCE, BETTER, AGAINST]
    found = cells(report.markdown(make_table(scored), scored, "cvc_clinicdb", None))
    assert "Dice, difference" in found["better"] and found["reference"]["Dice, difference"] == ""
    assert found["better"]["Dice, difference"] == "+12.5 [12.5, 12.5]"
    assert found["against"]["Dice, difference"] == "+25.0 [25.0, 25.0]"
    assert found["against"]["HD (px), difference"] == "-10.0 [-10.0, -10.0]"
    alone = cells(report.markdown(make_table(scored), [REFERENCE, AGAINST], "cvc_clinicdb", None))
    assert "Dice, difference" not in alone["against"]


def test_plotted_differences_are_those_of_the_table():
    scored = [REFERENCE, BETTER, AGAINST]
    figure = plots.draw_differences(make_table(scored), scored, "cvc_clinicdb")
    dice, distance = figure.axes
    assert [axis.containers[0].lines[0].get_xdata().tolist() for axis in (dice, distance)] == [[12.5, 25], [-5, -10]]
    assert dice.containers[0].lines[0].get_ydata().tolist() == [0, 1] and dice.yaxis_inverted()
    assert [label.get_text() for label in dice.get_yticklabels()] == ["better", "against\n(to better)"]
    assert "reference" in figure.get_suptitle()


def test_plots_of_differences_can_be_read_and_cut_nothing():
    distances = {"much worse": 290.0, "worse": 45.0, "little worse": 21.5, "little better": 18.75, "better": 12.0}
    rows = [make_scored(name, [(frame, hd / 300, hd) for frame in FRAMES]) for name, hd in distances.items()]
    scored = [REFERENCE, *rows]
    figure = plots.draw_differences(make_table(scored, compared=("dice", "hd", "dice")), scored, "cvc_clinicdb")
    FigureCanvasAgg(figure).draw()
    for axis in figure.axes:
        ticks = axis.get_xticks().tolist()
        labels = [label.get_window_extent() for label in axis.get_xticklabels() if label.get_text()]
        assert len(labels) == len(ticks) >= 4 and 0 in ticks
        assert all(left.x1 < right.x0 for left, right in zip(labels, labels[1:], strict=False))
        marker = axis.containers[0].lines[0]
        room = marker.get_markersize() / 2 * figure.dpi / 72
        frame = axis.get_window_extent()
        for x, y in axis.transData.transform(np.transpose(marker.get_data()).astype(float)):
            assert frame.x0 + room < x < frame.x1 - room and frame.y0 + room < y < frame.y1 - room
    assert max(figure.axes[1].get_xticks()) > 100


def test_curves_of_every_compared_metric_stand_side_by_side():
    scored = [REFERENCE]
    scored += [
        make_scored(f"{series} {x}", [(name, 0.5 + x / 1000, 10 * x) for name in FRAMES], x=x, series=series)
        for series in ("one", "other")
        for x in (384, 128)
    ]
    figure = plots.draw_curves(make_table(scored, x="size"), scored, "cvc_clinicdb")
    dice, distance = figure.axes
    assert (dice.get_ylabel(), distance.get_ylabel()) == ("Dice", "HD (px)")
    for axis, expected in ((dice, [62.8, 88.4]), (distance, [1280, 3840])):
        one, other = (container.lines[0] for container in axis.containers)
        assert one.get_ydata().tolist() == pytest.approx(expected) == other.get_ydata().tolist()
        left, right = (np.asarray(line.get_xdata(), dtype=float) for line in (one, other))
        assert np.round(left).tolist() == np.round(right).tolist() == axis.get_xticks().tolist()
        assert (right - left > 0.1).all()
        assert [label.get_text() for label in axis.get_xticklabels()] == ["128", "384"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["one", "other"]


@pytest.mark.parametrize(
    ("peaks", "said"),
    [
        ({"process": 2.75e9, "gpu": 8e8}, "0.8 GPU"),
        ({"process": 1.25e9, "gpu": None}, "1.2 process"),
        ({"process": None, "gpu": None}, ""),
        (None, ""),
    ],
)
def test_memory_of_training_says_of_what(peaks, said):
    one = make_scored()
    one.facts[0]["peak_memory"] = peaks
    assert report.cost(one, None) == ["1.25 M", "", said]


PIXEL_DECODER = {
    "pixel_decoder_width": 192,
    "coarse_widths": [256, 128],
    "coarse_features": 128,
    "fine_widths": [128, 128],
    "ellipse_prior": True,
}
MEASURED = {
    "methods": {
        "imedsam": {"seconds_per_image": 0.25},
        "imedsam, pixel decoder": {"seconds_per_image": 0.5},
        "unet": {"seconds_per_image": 0.125},
    },
    "images": "some images",
    "machine": {"threads": 2, "processor": "another processor"},
}


@pytest.mark.parametrize(
    ("values", "seconds"),
    [
        ({}, "0.25"),
        ({"config": {"ellipse_prior": True, "lora_rank": 0}, "start": "deit-tiny-sam-384"}, "0.25"),
        ({"config": PIXEL_DECODER}, "0.50"),
        ({"method": "unet", "start": "from nothing"}, "0.12"),
        ({"changes": changes(box_jitter=0.2)}, "0.25"),
        ({"config": {**PIXEL_DECODER, "pixel_decoder_width": 64}}, ""),
        ({"config": {"coordinate_octaves": 6}}, ""),
        ({"method": "convolutional"}, ""),
        ({"square": 128}, ""),
        ({"start": "sam-vit-base"}, ""),
        ({"changes": changes(output_size=128)}, ""),
    ],
)
def test_seconds_are_those_of_the_same_model_when_it_was_timed_alone(values, seconds):
    one = make_scored(**values)
    assert report.cost(one, MEASURED)[1] == seconds
    assert report.cost(one, None)[1] == ""
    assert ("Seconds are those of [methods.py]" in report.details([one], MEASURED)) == bool(seconds)


def test_methods_that_are_timed_are_those_of_the_tables():
    names = json.loads(report.BENCHMARK.read_text())["methods"]
    assert {"imedsam", "convolutional", "unet"} <= set(names)
    assert report.pixel_decoder_config() == {
        key: PIXEL_DECODER[key] for key in PIXEL_DECODER if key != "ellipse_prior"
    }


def test_details_name_the_commits():
    scored = [make_scored(), make_scored(), make_scored()]
    scored[0].facts[0]["commit"] = "123"
    assert "; 3 runs made from 123 and abc. " in report.details(scored, None)
    scored[1].facts[0]["commit"] = None
    del scored[2].facts[0]["commit"]
    assert "; 3 runs made from 123 (commit not recorded for 2 of them). " in report.details(scored, None)
    assert "; commits not recorded. " in report.details(scored[1:], None)


def test_a_folder_without_results_is_refused(tmp_path, monkeypatch):
    document = tmp_path / "results.md"
    document.write_text(before := f"{report.BEGIN}\nold\n{report.END}\n")
    (tmp_path / "floors").mkdir()
    monkeypatch.setattr("sys.argv", ["report.py", "--results", str(tmp_path), "--document", str(document)])
    with pytest.raises(
        SystemExit, match="Expected results of runs, RUN/run.json each, in .*, got none: give the --resu"
    ):
        report.main()
    assert document.read_text() == before


@pytest.mark.parametrize(
    "write",
    [
        lambda path: report.write_between_markers(path, "new"),
        lambda path: duplicates.write_pairs(path, [], 44, {}),
        lambda path: one_run.write_scores(path, {"name": ["a"]}),
    ],
)
def test_files_are_the_old_or_the_new_ones_when_the_process_is_stopped(tmp_path, monkeypatch, write):
    path = tmp_path / "file"
    path.write_text(before := f"{report.BEGIN}\nold\n{report.END}\n")

    def stop(self, target):
        raise KeyboardInterrupt

    with monkeypatch.context() as stopped:
        stopped.setattr(Path, "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            write(path)
    assert path.read_text() == before
    write(path)
    assert path.read_text() != before


@pytest.mark.slow
def test_runs_side_by_side_in_processes_of_their_own(root, sam_folder, tmp_path, capsys):
    places = ["--data", root, "--medical", sam_folder, "--output_dir", tmp_path / "o", "--results", tmp_path / "r"]
    flags = [*map(str, places), "--tables", "octaves", "--jobs", "2", f"--flags={SMALL}"]
    runner.main(flags)
    assert "failed" not in capsys.readouterr().out
    for run in runner.load_tables(["octaves"])[0].scorings(False):
        facts = json.loads((tmp_path / "r" / run.name / "run.json").read_text())
        assert facts["side_by_side"] == 2 and (tmp_path / "o" / run.name / "log.txt").stat().st_size > 0
    runner.main(flags)
    assert "started" not in capsys.readouterr().out
    with pytest.raises(SystemExit, match="Expected a run of this recipe in .*, got another num_points"):
        runner.main([*flags[:-1], f"--flags={SMALL} --num_points 7"])
    places[places.index("--results") + 1] = tmp_path / "others"
    with pytest.raises(SystemExit, match="Expected every run to finish, got errors in .*octaves=8.*log.txt"):
        runner.main([*map(str, places), "--tables", "octaves", "--jobs", "2", f"--flags={SMALL} --num_points 7"])


# The released model

DUPLICATES = "cju8amfdtqi4x09871tygrgqe", "cju886ryxnsl50801r93jai7q"  # of kvasir_other, and of Sessile


@pytest.fixture(scope="module")
def all_sets(tmp_path_factory):
    """Small data sets under the names of all real ones, with two images of one scene."""
    root, masks = tmp_path_factory.mktemp("data"), [disk(40, 60, 12 + 4 * i, 20, 8 + i) for i in range(8)]
    parts = {"train": list("abcd"), "validation": ["e", "f"], "test": ["g", "h"]}
    for name in ("kvasir_sessile", "busi", "kvasir_other", "cvc_clinicdb"):
        folder = write_folder(root / name, masks)
        if name in ("kvasir_sessile", "busi"):
            (folder / "splits.json").write_text(json.dumps(parts))
    for number, letter in enumerate("abcdefgh"):
        rename(root / "cvc_clinicdb", letter, f"{1 + 70 * number}")
    rename(root / "kvasir_other", "c", DUPLICATES[0])
    rename(root / "kvasir_sessile", "h", DUPLICATES[1])
    (root / "kvasir_sessile" / "splits.json").write_text(json.dumps({**parts, "test": ["g", DUPLICATES[1]]}))
    hearts = [np.maximum(disk(40, 60, 30, 20, 15), disk(40, 60, 30, 20, 8, 3)) for _ in range(6)]
    folder = write_folder(root / "acdc", hearts, scale=1)
    for number, letter in enumerate("abcdef"):
        rename(folder, letter, f"patient{number // 2}_slice{number % 2}")
    patients = [[f"patient{p}_slice0", f"patient{p}_slice1"] for p in range(3)]
    (folder / "splits.json").write_text(json.dumps(dict(zip(parts, patients, strict=True))))
    (folder / "labels.json").write_text('{"0": "background", "1": "myocardium", "2": "none", "3": "left ventricle"}')
    return root


def rename(folder, old, new):
    for kind, suffix in (("images", "jpg"), ("masks", "png")):
        (folder / kind / f"{old}.{suffix}").rename(folder / kind / f"{new}.{suffix}")


def test_the_released_model_learns_nothing_that_it_is_scored_on(all_sets, tmp_path):
    names = generalist.split_names(all_sets)
    assert names["kvasir_other"] == {"train": list("abdefgh"), "validation": [], "test": []}
    assert names["kvasir_sessile"]["test"] == ["g"]  # the start point has seen the other
    generalist.write_folders(all_sets, tmp_path)
    together = tmp_path / generalist.TOGETHER
    learnt = load_examples(str(together), "train")
    assert len(learnt) == 4 + 4 + 2 * 2 + 7
    assert not [name for name in learnt.names if name.startswith("cvc_clinicdb") or DUPLICATES[0] in name]
    unseen = load_examples(str(tmp_path / "cvc_clinicdb"), "test")
    assert len(unseen) == 8 and len(set(unseen.groups)) == 8
    scored = [load_examples(str(together), split) for split in ("validation", "test")]
    assert not set(learnt.groups) & {group for part in scored for group in part.groups}
    acdc = load_examples(str(tmp_path / "acdc"), "train")
    assert acdc.names == [f"patient0_slice{i}_{what}" for i in "01" for what in ("myocardium", "left_ventricle")]
    ring, ventricle = acdc[0]["mask"], acdc[1]["mask"]
    assert ring[20, 30] == 0 and ventricle[20, 30] == 1 and ring[20, 19] == 1 and not (ring & ventricle).any()


@pytest.mark.slow
def test_the_released_model_from_data_to_card(all_sets, sam_folder, tmp_path, capsys, monkeypatch):
    places = ["--data", all_sets, "--start", sam_folder, "--output_dir", tmp_path / "o", "--results", tmp_path / "r"]
    flags = [*map(str, places), f"--flags={SMALL} --num_warmup_steps 0 --config pixel_decoder_width=16"]
    for test in ([], ["--test"]):
        monkeypatch.setattr("sys.argv", ["generalist.py", *flags, *test])
        generalist.main()
    assert "cvc_clinicdb, test, native size, exact boxes" in capsys.readouterr().out
    card = (tmp_path / "o" / "published" / "README.md").read_text()
    for name in ("kvasir_sessile", "busi", "acdc", "cvc_clinicdb"):
        assert f"| {name}, test (" in card
    assert "non-commercial research" in card and re.search(" cores? of ", card) and str(tmp_path) not in card
    results = json.loads((tmp_path / "r").read_text())["evaluations"]
    assert [one["num_images"] for one in results] == [1, 2, 4, 8]
    Image.new("RGB", (128, 128)).save(tmp_path / "example.png")
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    code = next(block for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "folder = " in block)
    code = code.replace("outputs/demo/example.png", str(tmp_path / "example.png"))
    exec(code.replace("outputs/demo", str(tmp_path / "o" / "published")), names := {})
    assert names["model"].config.pixel_decoder_width == 16 and "expected Dice 0." in capsys.readouterr().out
    generalist_table = report.generalist(tmp_path / "r")
    assert "cvc_clinicdb, exact boxes | 8 |" in generalist_table and "2 steps of 4" in generalist_table

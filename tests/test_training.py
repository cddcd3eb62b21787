import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import set_seed
from known_fields import KnownField
from PIL import Image
from processes import TWO_PROCESSES
from safetensors.torch import load_file
from torch.testing import assert_close
from typer.testing import CliRunner

from imedsam.mask_field import FieldValues
from imedsam.modeling_imedsam import IMedSamModel
from imedsam.processing.image_processing_imedsam import IMedSamImageProcessor
from imedsam.processing.processing_imedsam import IMedSamProcessor
from imedsam.training import checkpoints, train
from imedsam.training.arguments import parse_args, parse_config
from imedsam.training.averaging import WeightAverage
from imedsam.training.calibration import CALIBRATION_METRICS
from imedsam.training.cli import app
from imedsam.training.evaluation import (
    class_means,
    evaluate_masks,
    floor_metrics,
    get_objects,
    predict_objects,
    sample_mask,
)
from imedsam.training.examples import load_examples
from imedsam.training.metrics import OVERLAP_METRICS, SURFACE_METRICS

SMALL = ["coarse_widths=[32,32]", "fine_widths=[32,32]", "coarse_features=16", "fine_head_width=16"]
SMALL += ["selection_lattice=8"]


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """Accelerate's state is the process's; a run that was stopped by an exception leaves its own."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def run(sam_folder, tmp_path):
    """Runs the training script on phantoms; returns the output folder."""

    def run(*flags, name="run", config=(), main=train.main):
        output = tmp_path / name
        main(arguments(sam_folder, output, flags, config))
        return output

    return run


PAPER = ["ellipse_prior=false"]


def arguments(sam, output, flags, config=()):
    args = f"--model_name_or_path {sam} --dataset_name phantoms --output_dir {output} --image_size 64"
    args += " --phantom_size 64 --num_train_images 8 --num_eval_images 3 --num_points 200 --evaluation_size 32"
    return [*args.split(), "--config", *SMALL, *config, *map(str, flags)]


def read(folder, file="metrics.json"):
    return json.loads((folder / file).read_text())


def assert_equal_files(one, other):
    one, other = load_file(one), load_file(other)
    assert one.keys() == other.keys()
    for key in one:
        torch.testing.assert_close(one[key], other[key], atol=0, rtol=0)


# What is trained


@pytest.fixture(scope="module")
def trained(sam_folder, tmp_path_factory):
    """
    A run long enough to learn something, on phantoms with two classes; of the paper's fields, as the ellipse in the
    box has most of a phantom before any training.
    """
    output = tmp_path_factory.mktemp("trained")
    flags = "--num_train_epochs 12 --per_device_train_batch_size 2 --adapter_learning_rate 1e-3 --learning_rate 1e-2"
    flags += " --augmentation light --num_classes 2 --eval_every 4 --do_test --lr_scheduler_type constant"
    train.main(arguments(sam_folder, output, flags.split(), PAPER))
    return output


def test_training_lowers_the_loss_and_finds_the_object(trained):
    report = read(trained)
    losses = [row["loss"] for row in report["history"]]
    assert len(losses) == 12 and losses[-1] < 0.7 * losses[0]
    assert report["validation"]["dice"] > 0.6


def test_only_what_the_configuration_names_is_trained(sam_folder, trained):
    args = parse_args(arguments(sam_folder, trained, ["--num_classes", 2], PAPER))
    set_seed(args.seed)
    model, _ = train.get_model_and_processor(args, load_examples("phantoms", "train", num_images=1, num_classes=2))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    after = load_file(trained / "step_48" / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert changed <= set(trainable)
    changed = {id(trainable[name]) for name in changed}
    parts = model.parameter_parts()
    others = {"mask head", "convolutional head", "U-Net", "ellipse prior", "pixel decoder"}
    others |= {"positions", "convolutional branch", "cross attention", "spectral filter", "adapters"}  # of SF-RecSAM
    others |= {"learned corrector"}
    assert set(parts) == set(train.LEARNING_RATES) - {"image encoder", "mask decoder"} - others
    for name, parameters in parts.items():
        unchanged = [p for p in parameters if id(p) not in changed]
        # Prompts that are not boxes have embeddings that no gradient reaches.
        assert len(unchanged) < len(parameters) if name == "prompt encoder" else not unchanged, name


def test_the_final_folder_is_the_best_model(trained):
    report = read(trained)
    assert_equal_files(trained / "model.safetensors", trained / "best" / "model.safetensors")
    assert_equal_files(trained / "adapter_model.safetensors", trained / "best" / "adapter_model.safetensors")
    scores = {row["epoch"]: row["validation"]["dice"] for row in report["history"] if "validation" in row}
    assert sorted(scores) == [3, 7, 11]
    assert report["best_epoch"] == max(scores, key=scores.get)

    model, processor = IMedSamModel.from_pretrained(trained), IMedSamProcessor.from_pretrained(trained)
    examples = load_examples("phantoms", "validation", num_images=3, image_size=64, num_classes=2)
    assert model.config.id2label == examples.id2label == {0: "lesion", 1: "organ"}
    table = evaluate_masks(model, processor, examples, mode=None, progress=False)
    assert table.mean() == pytest.approx(report["validation"])
    assert table.mean()["uncertainty_auroc"] > 0.5
    for name, means in class_means(table, examples).items():
        assert means == pytest.approx(report["validation_classes"][name])


def test_the_report(trained):
    report = read(trained)
    assert report["num_images"] == {"train": 8, "validation": 3, "test": 3}
    assert report["arguments"]["config"]["coarse_widths"] == [32, 32]
    assert report["trainable_parameters"]["frequency gates"] == 64
    assert report["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]  # not of all builds
    assert set(report["floors"]) == set(report["test_floors"]) == {"filled box", "inscribed ellipse"}
    assert 0.5 < report["floors"]["filled box"]["dice"] < report["floors"]["inscribed ellipse"]["dice"] < 1
    assert set(report["validation_jittered"]) == set(report["test"]) == set(report["floors"]["filled box"])
    assert {*OVERLAP_METRICS, *SURFACE_METRICS, *CALIBRATION_METRICS} == set(report["test"])
    assert set(report["history"][-1]["validation"]) == set(OVERLAP_METRICS)  # while training, what costs no time
    assert set(report["validation_classes"]) <= {"lesion", "organ"}
    assert report["seconds"] > 0 and report["date"].endswith("+00:00")
    assert len(report["history"][-1]["frequency_ratio"]) == 2 and min(report["history"][-1]["frequency_ratio"]) > 0
    with Image.open(trained / "curves.png") as curves:
        assert curves.size[0] > 500


def test_the_card(trained):
    card = (trained / "README.md").read_text()
    head, body = card.removeprefix("---\n").split("\n---\n", 1)
    assert "library_name: imedsam" in head and "pipeline_tag: mask-generation" in head
    assert f"| this model | {100 * read(trained)['validation']['dice']:.1f} |" in body
    assert "inscribed ellipse" in body and "test (3 images)" in body and "Limits" in body
    machine = read(trained)["machine"]
    assert f"on {machine['gpu'] or '{threads} core'.format(**machine)}" in body and machine["processor"] in body
    code = body.split("```python\n")[1].split("```")[0]
    image = trained / "image.png"
    Image.new("RGB", (50, 40)).save(image)
    code = code.replace(f'"path/to/{trained.name}"', f'r"{trained}"').replace("image.png", str(image))
    names = {"x0": 5, "y0": 5, "x1": 30, "y1": 20}
    exec(code, names)
    assert names["mask"].shape == (40, 50) and names["mask"].dtype == bool


# Interruptions


class Interrupted(Exception):
    pass


def interrupt_at(monkeypatch, batch_number):
    """Stops the run at its n-th batch."""
    seen, seed_step = [], train.seed_step

    def stop(*args):
        seen.append(args)
        if len(seen) == batch_number:
            raise Interrupted
        seed_step(*args)

    monkeypatch.setattr(train, "seed_step", stop)


def interrupt_before_evaluation(monkeypatch, number):
    """Stops the run where its n-th validation would begin."""
    seen, evaluate = [], train.evaluate

    def stop(*args, **options):
        seen.append(args)
        if len(seen) == number:
            raise Interrupted
        return evaluate(*args, **options)

    monkeypatch.setattr(train, "evaluate", stop)


def assert_equal_runs(one, other, step):
    assert_equal_files(one / f"step_{step}" / "model.safetensors", other / f"step_{step}" / "model.safetensors")
    assert_equal_files(one / "model.safetensors", other / "model.safetensors")
    assert_equal_files(one / "adapter_model.safetensors", other / "adapter_model.safetensors")
    one, other = read(one), read(other)
    assert one["history"] == other["history"]
    assert one["validation_objects"] == other["validation_objects"]


# 8 images, one at a time, 2 per optimisation step: 4 steps per epoch. Stopped within an epoch, and in its last batch,
# after which only the validation is left to do.
@pytest.mark.parametrize("batch_number", [6, 11, 9])
def test_an_interrupted_run_ends_with_the_same_weights(run, monkeypatch, batch_number):
    flags = "--max_train_steps 6 --per_device_train_batch_size 1 --gradient_accumulation_steps 2 --num_warmup_steps 2"
    flags = [*flags.split(), "--checkpointing_steps", 1, "--learning_rate", 3e-3, "--dataloader_num_workers", 2]
    straight = run(*flags, name="straight")
    with monkeypatch.context() as patch:
        interrupt_at(patch, batch_number)
        with pytest.raises(Interrupted):
            run(*flags, name="resumed")
    done = (batch_number - 1) // 2
    resumed = straight.with_name("resumed")
    assert [p.name for p in checkpoints.find_checkpoints(resumed)] == [f"step_{n}" for n in (done - 1, done) if n > 0]
    assert not (resumed / "metrics.json").exists()
    different = load_file(resumed / f"step_{done}" / "model.safetensors")
    assert any(
        not torch.equal(v, different[k]) for k, v in load_file(straight / "step_6" / "model.safetensors").items()
    )
    run(*flags, "--resume_from_checkpoint", "latest", name="resumed")
    assert_equal_runs(straight, resumed, step=6)


# The last step ends the last of two epochs, or lies within it.
@pytest.mark.parametrize("steps", [4, 3])
def test_a_run_stopped_after_its_last_step_still_validates(run, monkeypatch, steps):
    flags = "--per_device_train_batch_size 4 --checkpointing_steps 1 --learning_rate 1e-2".split()
    flags += ["--max_train_steps", steps]
    straight = run(*flags, name="straight")
    with monkeypatch.context() as patch:
        interrupt_before_evaluation(patch, 2)
        with pytest.raises(Interrupted):
            run(*flags, name="resumed")
    resumed = straight.with_name("resumed")
    assert checkpoints.find_checkpoints(resumed)[-1].name == f"step_{steps}"
    run(*flags, "--resume_from_checkpoint", "latest", name="resumed")
    assert len(read(resumed)["history"]) == 2
    assert_equal_runs(straight, resumed, step=steps)
    assert read(straight)["best_epoch"] == read(resumed)["best_epoch"]


def test_the_best_model_goes_along_to_another_folder(run):
    flags = "--num_train_epochs 2 --per_device_train_batch_size 4".split()
    one = run(*flags, name="one")
    two = run(*flags, "--resume_from_checkpoint", one / "step_4", name="two")  # nothing is left to train
    assert_equal_files(one / "best" / "model.safetensors", two / "best" / "model.safetensors")
    assert_equal_files(one / "model.safetensors", two / "model.safetensors")
    assert read(one)["history"] == read(two)["history"]
    shutil.rmtree(one / "best")
    with pytest.raises(FileNotFoundError, match="Expected the best model so far in .*one/best, got none"):
        run(*flags, "--resume_from_checkpoint", one / "step_4", name="three")


def test_a_new_run_starts_without_an_older_best_model(run, monkeypatch, tmp_path):
    for name in ("best", "best.old"):
        (tmp_path / "run" / name).mkdir(parents=True)
    interrupt_at(monkeypatch, 1)
    with pytest.raises(Interrupted):
        run("--max_train_steps", 1)
    assert not list((tmp_path / "run").glob("best*"))


def test_a_run_without_a_best_model_says_so(run, monkeypatch):
    monkeypatch.setattr(train, "save_model", lambda *args: None)
    with pytest.raises(FileNotFoundError, match=r"Expected the best model in .*best, got none \(best epoch 0\)"):
        run("--max_train_steps", 1)


@pytest.mark.parametrize("more", ["", "--ema_decay 0.5 --num_candidates 300 --boundary_share 0.3 --copy_paste 0.5"])
def test_resuming_from_epochs_keeps_history_and_best(run, monkeypatch, more):
    flags = f"--num_train_epochs 3 --per_device_train_batch_size 4 --learning_rate 1e-2 {more}".split()
    straight = run(*flags, name="straight")
    with monkeypatch.context() as patch:
        interrupt_at(patch, 6)
        with pytest.raises(Interrupted):
            run(*flags, name="resumed")
    resumed = run(*flags, "--resume_from_checkpoint", straight.with_name("resumed") / "step_4", name="resumed")
    assert_equal_runs(straight, resumed, step=6)
    assert read(straight)["best_epoch"] == read(resumed)["best_epoch"]


def test_what_is_validated_and_kept_is_the_average_of_the_weights(run):
    flags = "--max_train_steps 2 --per_device_train_batch_size 4 --checkpointing_steps 1 --learning_rate 1e-2".split()
    output = run(*flags, "--ema_decay", 0.25)
    first, second = (load_file(output / f"step_{step}" / "model.safetensors") for step in (1, 2))
    assert (output / "step_2" / "average.safetensors").exists() and not list(output.glob("step_2/custom_checkpoint*"))
    kept = IMedSamModel.from_pretrained(output)
    moved = 0
    for name, value in kept.named_parameters():
        assert_close(value, 0.25 * first[name] + 0.75 * second[name], msg=name)
        moved += not torch.equal(first[name], second[name])
    assert moved > 10
    plain = read(run(*flags, name="plain"))
    assert plain["history"][0]["loss"] == read(output)["history"][0]["loss"]  # training itself is the same
    assert plain["history"][0]["validation"] != read(output)["history"][0]["validation"]
    with pytest.raises(ValueError, match="Expected --ema_decay 0.25 as in .*step_2, got 0.0"):
        run(*flags, "--resume_from_checkpoint", "latest")


def test_a_moving_average_by_hand():
    weight = torch.nn.Parameter(torch.tensor([1.0, 8.0]))
    average = WeightAverage([weight], decay=0.75)
    for value in ([2.0, 8.0], [6.0, 0.0], [0.0, 4.0]):
        weight.data = torch.tensor(value)
        average.update()
    with average.applied():
        assert_close(weight.data, torch.tensor([0.75 * (0.75 * 2 + 0.25 * 6), 0.75 * (0.75 * 8) + 0.25 * 4]))
    assert_close(weight.data, torch.tensor([0.0, 4.0]))
    with pytest.raises(Interrupted), average.applied():
        raise Interrupted
    assert_close(weight.data, torch.tensor([0.0, 4.0]))


def test_checkpoints_that_cannot_continue_the_same_run(run, caplog, tmp_path):
    output = run("--max_train_steps", 1, "--resume_from_checkpoint", "latest")
    assert read(output)["arguments"]["max_train_steps"] == 1
    with caplog.at_level("WARNING", logger="imedsam"):
        run("--max_train_steps", 2, "--seed", 1, "--resume_from_checkpoint", "latest")
    assert "max_train_steps 1 -> 2, num_train_epochs" not in caplog.text
    assert "max_train_steps 1 -> 2, seed 0 -> 1" in caplog.text
    with pytest.raises(FileNotFoundError, match="Expected a checkpoint with trainer_state.json"):
        run("--resume_from_checkpoint", tmp_path)


def test_a_new_run_replaces_the_checkpoints_of_an_earlier_one(run, caplog):
    output = run("--max_train_steps", 8, "--per_device_train_batch_size", 4)
    assert [p.name for p in checkpoints.find_checkpoints(output)] == ["step_6", "step_8"]
    with caplog.at_level("WARNING", logger="imedsam"):
        run("--max_train_steps", 7, "--checkpointing_steps", 7, "--per_device_train_batch_size", 4, "--seed", 1)
    assert "holds step_8 of an earlier run" in caplog.text
    assert [p.name for p in checkpoints.find_checkpoints(output)] == ["step_6", "step_7"]


def test_folders_are_replaced_whole(tmp_path):
    folder = tmp_path / "best"
    for content in ("one", "two"):
        temporary = checkpoints.new_temporary_folder(folder)
        (temporary / "file").write_text(content)
        checkpoints.replace_folder(temporary, folder)
        assert (folder / "file").read_text() == content
        assert [p.name for p in tmp_path.iterdir()] == ["best"]
    folder.rename(tmp_path / "best.old")  # stopped between the two renamings
    checkpoints.recover_folder(folder)
    assert (folder / "file").read_text() == "two"


@pytest.mark.slow
def test_a_killed_process_is_resumed(sam_folder, tmp_path):
    flags = "--max_train_steps 60 --per_device_train_batch_size 2 --checkpointing_steps 1 --learning_rate 3e-3"
    flags += " --dataloader_num_workers 2 --eval_every 20"
    command = [sys.executable, "-m", "imedsam.training.train"]
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    subprocess.run([*command, *arguments(sam_folder, straight, flags.split())], check=True, env=environment())
    command += arguments(sam_folder, resumed, [*flags.split(), "--resume_from_checkpoint", "latest"])
    process = subprocess.Popen(command, env=environment(), start_new_session=True)
    deadline = time.monotonic() + 60
    while len(checkpoints.find_checkpoints(resumed)) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (resumed / "step_60").exists()
    subprocess.run(command, check=True, env=environment())
    assert_equal_runs(straight, resumed, step=60)


@pytest.mark.slow
def test_two_processes_are_one_with_the_double_batch(sam_folder, tmp_path):
    # 10 images: a batch of 4 does not divide them.
    flags = "--num_train_epochs 2 --coarse_ramp_epochs 1 --learning_rate 3e-3 --num_train_images 10".split()
    config = ["dropout=0.0", "selection=null"]
    one, two = tmp_path / "one", tmp_path / "two"
    train.main(arguments(sam_folder, one, [*flags, "--per_device_train_batch_size", 4], config))
    command = [*TWO_PROCESSES, "imedsam.training.train"]
    command += arguments(sam_folder, two, [*flags, "--per_device_train_batch_size", 2], config)
    subprocess.run(command, check=True, env=environment() | {"ACCELERATE_USE_CPU": "true"})
    one, two = read(one), read(two)
    assert (one["num_processes"], two["num_processes"]) == (1, 2)
    for a, b in zip(one["history"], two["history"], strict=True):
        assert a["step"] == b["step"] and a["loss"] == pytest.approx(b["loss"], abs=1e-5)
    for report in (one, two):  # without dropout there is no uncertainty that could rank errors: rounding would
        del report["validation"]["uncertainty_auroc"], report["validation"]["retention_auc"]
    assert one["validation"] == pytest.approx(two["validation"], abs=1e-5)
    assert [row["name"] for row in one["validation_objects"]] == [row["name"] for row in two["validation_objects"]]


def environment():
    """One thread, so that processes do not wait for each other's cores."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


# The parts of the script


def test_dense_supervision_and_other_configurations(run):
    flags = "--max_train_steps 1 --supervision dense --label_size 24 --resize_mode longest_side --with_tracking"
    config = ["frequency_view=null", "lora_rank=0", "train_image_encoder=true"]
    output = run(*flags.split(), "--report_to", "tensorboard", config=config)
    report = read(output)
    assert "image encoder" in report["trainable_parameters"] and "LoRA" not in report["trainable_parameters"]
    assert report["history"][0]["frequency_ratio"] == []
    assert report["history"][0]["learning_rates"].keys() >= {"image encoder", "image encoder (no decay)"}
    assert read(output, "processor_config.json")["image_processor"]["resize_mode"] == "longest_side"
    assert list((output / "imedsam").rglob("events.out.tfevents.*"))


@pytest.mark.parametrize("supervision", ["points", "dense"])
def test_training_with_clicks(run, supervision):
    flags = "--max_train_steps 2 --do_test --num_train_images 4 --label_size 16 --prompt click".split()
    folder = run(*flags, "--supervision", supervision)
    report = read(folder)
    assert report["arguments"]["prompt"] == "click" and "validation_jittered" not in report
    examples = load_examples("phantoms", "test", num_images=report["num_images"]["test"], image_size=64)
    model, processor = IMedSamModel.from_pretrained(folder), IMedSamProcessor.from_pretrained(folder)
    table = evaluate_masks(model, processor, examples, mode=None, prompt="click", progress=False)
    assert table.mean()["dice"] == pytest.approx(report["test"]["dice"])
    card = (folder / "README.md").read_text()
    assert "an image and a click per object" in card and "input_points=[[[29, 28]]]" in card


def test_training_goes_on_from_an_imedsam_checkpoint(run, trained, sam_folder, label_folder):
    flags = "--max_train_steps 1 --num_train_images 2 --num_eval_images 1 --dataset_name phantoms --phantom_size 64"
    flags = [*flags.split(), "--model_name_or_path", str(trained), "--output_dir", str(trained.with_name("more"))]
    train.main([*flags, "--num_classes", "2"])
    report = read(trained.with_name("more"))
    assert report["image_size"] == 64 and report["history"][0]["loss"] < read(trained)["history"][0]["loss"]
    with pytest.raises(ValueError, match="Expected 2 classes in phantoms, .* got 1"):
        train.main(flags)
    with pytest.raises(ValueError, match="{0: 'lesion', 1: 'organ'} in .*: name and number them alike"):
        train.main([*flags, "--dataset_name", str(label_folder)])
    for others, named in (
        (["--config", "lora_rank=8", "frequency_hidden=4"], "another lora_rank: it"),
        (["--image_size", "32", "--resize_mode", "longest_side"], "another --image_size, --resize_mode: it"),
        (["--window", "-100", "300"], "another --window: it"),
    ):
        with pytest.raises(ValueError, match=f"Expected the configuration and processor of .*, got {named}"):
            train.main([*flags, "--num_classes", "2", *others])
    train.main([*flags, "--num_classes", "2", "--config", "lora_rank=4", "--image_size", "64"])


def test_a_loss_that_is_not_finite_stops_the_run(run):
    with pytest.raises(FloatingPointError, match="Expected a finite loss, got nan at step"):
        run("--learning_rate", 1e30, "--adapter_learning_rate", 1e30, "--max_train_steps", 20, "--max_grad_norm", 1e9)


def test_parameter_groups(sam_folder):
    args = parse_args(arguments(sam_folder, "out", ["--weight_decay", 0.02]))
    model, _ = train.get_model_and_processor(args, load_examples("phantoms", "train", num_images=1))
    groups = train.get_parameter_groups(model, args)
    grouped = [id(p) for group in groups for p in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(p) for p in model.parameters() if p.requires_grad}
    rates = {group["name"]: (group["lr"], group["weight_decay"]) for group in groups}
    assert rates["coarse field"] == rates["fine field"] == (1e-3, 0.02)
    assert rates["coarse field (no decay)"] == rates["frequency gates (no decay)"] == (1e-3, 0.0)
    assert rates["LoRA"] == rates["upscaling"] == rates["frequency adapters"] == (5e-5, 0.02)
    assert all(p.ndim > 1 for g in groups if g["weight_decay"] for p in g["params"])


def test_the_coarse_weight_falls_linearly(sam_folder):
    args = parse_args(arguments(sam_folder, "out", ["--coarse_ramp_epochs", 2]))
    weights = [train.get_coarse_loss_weight(args, epoch, batch, 4) for epoch in range(3) for batch in range(4)]
    np.testing.assert_allclose(np.diff(weights), [-0.9 / 8] * 8 + [0] * 3, atol=1e-12)
    assert weights[0] == 1 and weights[-1] == pytest.approx(0.1)
    args.coarse_ramp_epochs = 0
    assert train.get_coarse_loss_weight(args, 0, 0, 4) == pytest.approx(0.1)


def test_only_weights_decay(sam_folder):
    args = parse_args(arguments(sam_folder, "out", ["--weight_decay", 0.02]))
    model = IMedSamModel.from_sam_pretrained(sam_folder, image_size=64, **args.config, num_labels=2)
    decays = {
        id(p): group["weight_decay"] for group in train.get_parameter_groups(model, args) for p in group["params"]
    }
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name.endswith("bias"):
            assert decays[id(parameter)] == 0, name
    assert sum(value == 0.02 for value in decays.values()) > 10


def test_config_flags(sam_folder, capsys):
    assert parse_config("frequency_view=null") == ("frequency_view", None)
    assert parse_config("coarse_widths=[8, 4]") == ("coarse_widths", [8, 4])
    assert parse_config("frequency_view=haar") == ("frequency_view", "haar")
    args = parse_args([*arguments(sam_folder, "out", []), "--config", "lora_rank=8"])
    assert args.config["lora_rank"] == 8 and args.config["coarse_features"] == 16
    with pytest.raises(SystemExit):
        parse_args([*arguments(sam_folder, "out", []), "--config", "lora_rank"])
    assert "Expected KEY=VALUE after --config" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--num_points 0", "argument --num_points: Expected a whole number from 1 on, got '0'"),
        ("--gradient_accumulation_steps 0", "from 1 on, got '0'"),
        ("--eval_every 1.5", "from 1 on, got '1.5'"),
        ("--checkpointing_steps 0", "from 1 on, got '0'"),
        ("--dataloader_num_workers -1", "expected one argument|from 0 on, got '-1'"),
        ("--num_train_images 0", "from 1 on, got '0'"),
        (
            "--coarse_ramp_epochs -3",
            "argument --coarse_ramp_epochs: Expected a number from 0 on, got '-3'|one argument",
        ),
        ("--learning_rate nan", "Expected a number from 0 on, got 'nan'"),
        ("--max_grad_norm 0", "Expected a number above 0, got '0'"),
        ("--uniform_share 2", r"Expected a number in \[0, 1\], got '2'"),
        ("--box_jitter 0.9", r"Expected a number in \[0, 0.5\), got '0.9'"),
        ("--num_candidates 10", "argument --num_candidates: Expected at least --num_points = 200, got 10"),
        ("--num_candidates 300 --supervision dense", "Expected --supervision points, got dense"),
        ("--spectral_weight 0.5", "argument --spectral_weight: Expected --supervision dense, got points"),
        ("--boundary_share 0.6", "argument --boundary_share: Expected at most 1 - uniform_share = 0.5, got 0.6"),
        ("--ema_decay 1", r"Expected a number in \[0, 1\), got '1'"),
        ("--config num_labels=2", "num_labels follows from the data"),
        ("--config lora_rnk=8", "argument --config: .*lora_rnk"),
        ("--config lora_rank=many", "argument --config: .*lora_rank"),
        ("--config selection_share=2", "argument --config: .*selection_share"),
    ],
)
def test_wrong_flags_are_refused(sam_folder, capsys, flags, message):
    with pytest.raises(SystemExit) as exit:
        parse_args([*arguments(sam_folder, "out", []), *flags.split()])
    assert exit.value.code == 2
    assert re.search(message, capsys.readouterr().err, flags=re.DOTALL)


def test_the_command_line_says_in_a_line_what_is_refused(sam_folder, tmp_path, monkeypatch, capsys):
    output = tmp_path / "out"
    monkeypatch.setattr(train, "run", lambda *parts: pytest.fail("was trained"))
    (tmp_path / "damaged").mkdir()
    shutil.copy(sam_folder / "config.json", tmp_path / "damaged")
    (tmp_path / "damaged" / "model.safetensors").write_bytes(b"x")
    for flags, message in (
        (["--train_corrector"], "Expected an SF-RecSAM checkpoint for --train_corrector, got a SAM at"),
        (["--dataset_name", tmp_path / "none"], "Expected "),
        (["--model_name_or_path", tmp_path / "damaged"], "got a damaged one"),
        (["--resume_from_checkpoint", tmp_path], "Expected a checkpoint with"),
    ):
        given = arguments(sam_folder, output, flags)
        with pytest.raises((ValueError, OSError), match=message):
            train.main(given)
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            train.command(given)
        *_, said = capsys.readouterr().err.strip().splitlines()
        assert exit.value.code == 2 and ": error: Expected " in said and message in said
    result = CliRunner().invoke(app, ["train", *arguments(sam_folder, output, ["--train_corrector"])])
    assert result.exit_code == 2 and ": error: Expected an SF-RecSAM checkpoint" in result.output
    assert not (output / "metrics.json").exists()


@pytest.mark.slow
def test_the_module_is_a_command_line_too(sam_folder, tmp_path):
    command = [sys.executable, "-m", "imedsam.training.train"]
    command += arguments(sam_folder, tmp_path / "out", ["--train_corrector"])
    result = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "train.py: error: Expected an SF-RecSAM checkpoint for --train_corrector" in result.stderr


def test_images_of_other_types_are_trained_on_through_a_window(run, tmp_path):
    data = tmp_path / "data"
    columns, rows = np.meshgrid(np.arange(40), np.arange(30))
    for kind in ("images", "masks"):
        (data / kind).mkdir(parents=True)
    for i in range(5):
        mask = (columns - 15 - i) ** 2 + (rows - 15) ** 2 < 60
        Image.fromarray(np.where(mask, 250, -150).astype((np.float32, np.int32)[i % 2])).save(
            data / "images" / f"{i}.tif"
        )
        Image.fromarray(mask.astype(np.uint8) * 255).save(data / "masks" / f"{i}.png")
    output = run("--dataset_name", data, "--max_train_steps", 1, "--window", -160, 240)
    assert read(output, "processor_config.json")["image_processor"]["window"] == [-160, 240]
    assert IMedSamProcessor.from_pretrained(output).image_processor.window == (-160, 240)


def test_the_progress_bar_names_the_best_score_once_it_is_known():
    class Bar:
        def set_postfix(self, **shown):
            self.shown = shown

    bar = Bar()
    train.show_progress(bar, 0.5, checkpoints.TrainerState())
    assert bar.shown == {"loss": "0.5000"}
    train.show_progress(bar, 0.5, checkpoints.TrainerState(best_score=0.75, best_epoch=2))
    assert bar.shown == {"loss": "0.5000", "best_dice": "0.7500"}


def test_the_frequency_ratio_is_of_the_image_without_its_padding(sam_folder):
    args = parse_args(arguments(sam_folder, "out", ["--resize_mode", "longest_side"]))
    model, processor = train.get_model_and_processor(args, load_examples("phantoms", "train", num_images=1))
    for gate in model.parameter_parts()["frequency gates"]:
        torch.nn.init.ones_(gate)  # they start closed
    model.eval()
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 60, 3), dtype=np.uint8))
    inputs = processor.image_processor(image)
    ratio = train.get_frequency_ratio(Accelerator(cpu=True), model, processor, [{"image": image}])
    assert ratio == model.frequency_ratio(inputs["pixel_values"], inputs["reshaped_input_sizes"]).tolist()
    assert ratio != model.frequency_ratio(inputs["pixel_values"]).tolist()


# Evaluation


class BoxField(KnownField):
    """Foreground within the prompts' boxes, a field with known metrics."""

    def __init__(self, boxes, side):
        super().__init__(*boxes.shape[:2], boxes.device)
        self.boxes = 2 * boxes / side - 1

    def values(self, coordinates, point_areas=None):
        inside = (coordinates >= self.boxes[:, :, None, :2]) & (coordinates <= self.boxes[:, :, None, 2:])
        logits = inside.all(dim=-1)[:, :, None] * 2.0 - 1
        return FieldValues(logits, logits, logits)


class BoxModel(torch.nn.Module):
    device = torch.device("cpu")

    def get_image_embeddings(self, pixel_values, reshaped_input_sizes=None):
        assert not self.training and not torch.is_grad_enabled()
        return pixel_values

    def get_mask_field(self, embeddings, input_boxes, class_labels, reshaped_input_sizes=None):
        return BoxField(input_boxes, embeddings.shape[-1])


@pytest.fixture
def label_maps(tmp_path):
    """Three images of three sizes; the second without an object."""
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    columns, rows = np.meshgrid(np.arange(70), np.arange(50))
    one = ((columns - 20) ** 2 + (rows - 25) ** 2 < 100).astype(np.uint8)
    two = one + 2 * ((columns - 50) ** 2 + (rows - 12) ** 2 < 50).astype(np.uint8)
    for name, mask in {"a": two, "b": np.zeros((30, 30), np.uint8), "c": one[5:, :37]}.items():
        Image.fromarray(mask * 80).save(tmp_path / "images" / f"{name}.png")
        Image.fromarray(mask).save(tmp_path / "masks" / f"{name}.png")
    (tmp_path / "labels.json").write_text(json.dumps({"0": "background", "1": "organ", "2": "lesion"}))
    (tmp_path / "splits.json").write_text(json.dumps({"test": ["a", "b", "c"]}))
    return load_examples(str(tmp_path), "test")


@pytest.mark.parametrize("resize_mode", ["stretch", "longest_side"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_field_that_fills_the_box_scores_as_the_filled_box(label_maps, resize_mode, batch_size):
    processor = IMedSamProcessor(IMedSamImageProcessor(size=96, resize_mode=resize_mode))
    model = BoxModel().train()
    table = evaluate_masks(model, processor, label_maps, batch_size=batch_size, progress=False)
    assert model.training
    floor = floor_metrics(label_maps)["filled box"]
    assert [row["name"] for row in table.rows] == ["a/organ", "a/lesion", "c/organ"]
    for row, expected in zip(table.rows, floor.rows, strict=True):
        assert all(row[key] == expected[key] for key in ("name", *OVERLAP_METRICS, *SURFACE_METRICS))
        # Probabilities of 0.73 and 0.27 instead of 1 and 0, where the floor is wrong about a share of the pixels.
        assert row["brier"] == pytest.approx((1 - expected["brier"]) * 0.0723 + expected["brier"] * 0.5344, rel=1e-3)
        assert math.isnan(expected["uncertainty_auroc"]) and row["uncertainty_auroc"] > 0.5
    assert class_means(table, label_maps)["lesion"]["dice"] == table.rows[1]["dice"]


def test_evaluation_at_another_size_and_with_jittered_boxes(label_maps):
    processor = IMedSamProcessor(IMedSamImageProcessor(size=96))
    exact = evaluate_masks(BoxModel(), processor, label_maps, progress=False).mean()
    large = evaluate_masks(BoxModel(), processor, label_maps, output_size=200, progress=False).mean()
    assert large["dice"] == pytest.approx(exact["dice"], abs=0.02) and large["dice"] != exact["dice"]
    jittered = [
        evaluate_masks(BoxModel(), processor, label_maps, box_jitter=0.3, seed=seed, batch_size=size, progress=False)
        for seed, size in ((0, 1), (0, 3), (1, 3))
    ]
    assert jittered[0].rows == jittered[1].rows != jittered[2].rows
    assert jittered[0].mean()["dice"] < exact["dice"]
    part = evaluate_masks(BoxModel(), processor, label_maps, box_jitter=0.3, indices=[2], progress=False)
    assert part.rows == jittered[0].rows[2:]
    floor = floor_metrics(label_maps, box_jitter=0.3, output_size=100, metrics=("overlap",))["filled box"]
    model = evaluate_masks(
        BoxModel(), processor, label_maps, box_jitter=0.3, output_size=100, metrics=("overlap",), progress=False
    )
    assert [row["dice"] for row in floor.rows] == pytest.approx([row["dice"] for row in model.rows], abs=0.02)
    assert set(floor.mean()) == set(model.mean()) == set(OVERLAP_METRICS)


class DiskModel(BoxModel):
    """A disk of a tenth of the square's side around each click."""

    def get_mask_field(self, embeddings, input_points, input_labels, class_labels, reshaped_input_sizes=None):
        assert (input_labels == 1).all()
        side, points = embeddings.shape[-1], input_points[:, :, 0]
        return BoxField(torch.cat([points - side / 10, points + side / 10], dim=-1), side)


@pytest.mark.parametrize("output_size", [None, 100])
def test_evaluation_with_clicks(label_maps, output_size):
    processor = IMedSamProcessor(IMedSamImageProcessor(size=96))
    options = {"output_size": output_size, "prompt": "click", "progress": False}
    _, (organ, lesion) = get_objects(label_maps, 0, output_size, prompt="click")
    scale = 1 if output_size is None else np.array([100 / 70, 100 / 50])
    assert organ.prompt is organ.click and lesion.click.tolist() == pytest.approx(np.array([50.5, 12.5]) * scale)
    boxes = [prompted.box.tolist() for prompted in get_objects(label_maps, 0, output_size)[1]]
    assert [organ.box.tolist(), lesion.box.tolist()] == boxes
    tables = [evaluate_masks(DiskModel(), processor, label_maps, batch_size=size, **options) for size in (1, 3)]
    assert tables[0].rows == tables[1].rows and len(tables[0].rows) == 3
    jittered = evaluate_masks(DiskModel(), processor, label_maps, box_jitter=0.3, seed=1, **options)
    assert jittered.rows == tables[0].rows
    found = list(predict_objects(DiskModel(), processor, label_maps, **options))
    for prompted, prediction in found:
        assert prediction.mask[tuple(prompted.click.astype(int)[::-1])]
    with pytest.raises(ValueError, match='Expected prompt "box" or "click", got \'scribble\''):
        get_objects(label_maps, 0, prompt="scribble")


def test_distances_in_millimetres(label_maps):
    _, (organ, lesion) = get_objects(label_maps, 0, output_size=100, spacing=(2.0, 0.5))  # of 50 x 70 pixels
    assert organ.pixel == lesion.pixel == pytest.approx((2.0 * 50 / 100, 0.5 * 70 / 100))
    assert organ.target.shape == (100, 100) and organ.name == "a/organ"
    assert organ.box == pytest.approx((11 * 100 / 70, 16 * 100 / 50, 30 * 100 / 70, 35 * 100 / 50))
    assert get_objects(label_maps, 1)[1] == []  # nothing to see
    options = {"indices": [0], "spacing": (2.0, 2.0), "tolerance": 6.0}
    native, large = (floor_metrics(label_maps, **options, output_size=size)["filled box"] for size in (None, 500))
    pixels = floor_metrics(label_maps, [0], tolerance=3.0)["filled box"]
    for row, fine, coarse in zip(native.rows, large.rows, pixels.rows, strict=True):
        assert row["hd"] == pytest.approx(2 * coarse["hd"]) and row["nsd"] == pytest.approx(coarse["nsd"])
        assert fine["hd"] == pytest.approx(row["hd"], abs=3) and fine["asd"] == pytest.approx(row["asd"], abs=1)


def test_a_consumer_keeps_its_gradients(label_maps):
    processor = IMedSamProcessor(IMedSamImageProcessor(size=96))
    model = BoxModel().train()
    objects = predict_objects(model, processor, label_maps, progress=False)
    next(objects)
    assert torch.is_grad_enabled()
    objects.close()
    assert model.training


def test_unknown_metrics_are_refused(label_maps):
    with pytest.raises(ValueError, match="Expected metrics of overlap, surface, calibration, got dice"):
        floor_metrics(label_maps, metrics=("dice",))


def test_masks_are_sampled_at_pixel_centres():
    mask = np.arange(12).reshape(3, 4) % 5 == 0
    assert sample_mask(mask, (3, 4)) is mask
    np.testing.assert_array_equal(sample_mask(mask, (6, 8)), mask.repeat(2, 0).repeat(2, 1))
    np.testing.assert_array_equal(sample_mask(mask, (1, 2)), mask[[1]][:, [1, 3]])


def test_the_floors_of_an_ellipse():
    examples = load_examples("phantoms", "test", num_images=2, image_size=64)
    floors = floor_metrics(examples)
    assert floors["filled box"].mean()["dice"] < floors["inscribed ellipse"].mean()["dice"] < 1
    assert len(floors["filled box"].rows) == 2


def test_nothing_slow_happens_at_import():
    code = "import sys, imedsam.training.train as t; print({'monai', 'datasets', 'matplotlib'} & set(sys.modules))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "set()"
    assert Path(train.__file__).name == "train.py"

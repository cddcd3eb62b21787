"""The training of SAM-I2I on drawn slices."""

import json
import math
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import set_seed
from PIL import Image
from processes import TWO_PROCESSES
from safetensors.torch import load_file
from test_training import Interrupted, assert_equal_files, environment
from torch.testing import assert_close
from transformers import CLIPVisionModelWithProjection
from translation_folders import HIERA, draw_slice, save_clip, save_sam2, write_pictures, write_volumes

from imedsam.configuration.configuration_sam_i2i import SamI2IConfig
from imedsam.modeling_sam_i2i import SamI2IModel
from imedsam.processing.image_processing_sam_i2i import SamI2IImageProcessor
from imedsam.processing.volumes import read_nifti
from imedsam.training import checkpoints, discriminator, train_sam_i2i
from imedsam.training.train_sam_i2i import Player, backward, get_adversary
from imedsam.training.translate import load_translator, translate
from imedsam.training.translation_arguments import parse_args
from imedsam.training.translation_metrics import slice_metrics
from imedsam.training.translators import TranslationUNet, TranslationUNetConfig

# Both networks change visibly in few steps.
FAST = ["--learning_rate", "3e-3", "--discriminator_learning_rate", "1e-3"]


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """Accelerate's state is the process's; a run that was stopped by an exception leaves its own."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(scope="module", autouse=True)
def narrow_heads():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(discriminator, "HEAD_WIDTH", 16)
        yield


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Checkpoints of a tiny SAM 2 and a tiny CLIP, and slices of four patients."""
    folder = tmp_path_factory.mktemp("translation")
    save_sam2(folder / "sam2")
    save_clip(folder / "clip")
    return write_pictures(folder, {"p1": 3, "p2": 3, "p3": 2, "p4": 2})


def arguments(places, output, flags=()):
    args = f"--source {places}/source --target {places}/target --output_dir {output} --model_name_or_path"
    args += f" {places}/sam2 --clip_name_or_path {places}/clip --validation_patients p3 --test_patients p4"
    return [*args.split(), *FAST, *map(str, flags)]


@pytest.fixture
def run(places, tmp_path):
    """Runs the training script; returns the output folder."""

    def run(*flags, name="run"):
        train_sam_i2i.main(arguments(places, tmp_path / name, flags))
        return tmp_path / name

    return run


def read(folder, file="metrics.json"):
    return json.loads((folder / file).read_text())


# What is trained


@pytest.fixture(scope="module")
def trained(places, tmp_path_factory):
    output = tmp_path_factory.mktemp("trained")
    train_sam_i2i.main(arguments(places, output, ["--num_train_epochs", 3, "--do_test"]))
    return output


def test_the_backbone_stays_while_the_decoder_changes(places, trained):
    start = SamI2IModel.from_backbone_pretrained(places / "sam2").state_dict()
    end = load_file(trained / "step_9" / "model.safetensors")
    assert start.keys() == end.keys()
    for name, value in start.items():
        if name.startswith("backbone."):
            assert_close(end[name], value, rtol=0, atol=0)
    first, last = (load_file(trained / f"step_{step}" / "model.safetensors") for step in (6, 9))
    moved = {name for name in first if not torch.equal(first[name], last[name])}
    assert moved == {name for name in first if not name.startswith("backbone.")}


def test_the_heads_are_trained_and_clip_is_in_no_checkpoint(trained):
    first, last = (load_file(trained / f"step_{step}" / "model_1.safetensors") for step in (6, 9))
    weights = [name for name in first if name.endswith(("original", "bias"))]
    assert len(weights) == 16 and all(not torch.equal(first[name], last[name]) for name in weights)
    assert sum(name.endswith("original") for name in last) == 8 and not any("clip" in name for name in last)
    assert sorted(path.name for path in (trained / "step_9").glob("*.safetensors")) == [
        "model.safetensors",
        "model_1.safetensors",
    ]


def test_the_saved_model_holds_no_discriminator(places, trained):
    for folder in (trained, trained / "best"):
        saved = load_file(folder / "model.safetensors")
        assert saved.keys() == SamI2IModel.from_backbone_pretrained(places / "sam2").state_dict().keys()
        assert [path.name for path in folder.glob("*.safetensors")] == ["model.safetensors"]


def test_the_final_folder_is_the_best_model_with_its_scores(places, trained):
    report = read(trained)
    assert_equal_files(trained / "model.safetensors", trained / "best" / "model.safetensors")
    scores = {row["epoch"]: row["validation"]["psnr"] for row in report["history"]}
    assert report["best_epoch"] == max(scores, key=scores.get)
    assert report["validation"] == pytest.approx(report["history"][report["best_epoch"]]["validation"])

    model, processor = SamI2IModel.from_pretrained(trained), SamI2IImageProcessor.from_pretrained(trained)
    assert processor.size_divisor == model.config.size_divisor == 8
    names = {"p4": "test", "p3": "validation"}
    for patient, split in names.items():
        slices = [[Image.open(places / side / f"{patient}_{i}.png") for i in (0, 1)] for side in ("source", "target")]
        inputs = processor.preprocess(*slices)
        with torch.no_grad():
            made = model(inputs["pixel_values"]).reconstruction
        for index, row in enumerate(report[f"{split}_slices"]):
            assert (row["name"], row["patient"]) == (f"{patient}_{index}", patient)
            values = slice_metrics(made[index, 0], inputs["labels"][index, 0])
            assert {name: row[name] for name in values} == pytest.approx(values, rel=1e-4)
        assert report[split]["psnr"] == pytest.approx(sum(row["psnr"] for row in report[f"{split}_slices"]) / 2)


def test_the_report(trained):
    report = read(trained)
    assert report["patients"] == {"train": ["p1", "p2"], "validation": ["p3"], "test": ["p4"]}
    assert report["num_slices"] == {"train": 6, "validation": 2, "test": 2}
    assert report["arguments"]["l1_weight"] == 50 and report["arguments"]["max_train_steps"] == 9
    for row in report["history"]:
        assert row["loss"] == pytest.approx(50 * row["l1"] + row["gan"], rel=1e-5) and row["discriminator"] > 0
    assert 0 < report["trainable_parameters"] < report["parameters"]
    assert report["versions"]["torch"] and report["machine"]["processor"] and report["seconds"] > 0
    with Image.open(trained / "curves.png") as curves:
        assert curves.size[0] > 500


def test_one_pair_is_overfitted(places, tmp_path):
    pair = write_pictures(tmp_path / "pair", {"a": 1})
    flags = f"--source {pair}/source --target {pair}/target --max_train_steps 40 --checkpointing_steps 40"
    flags += " --validation_patients --test_patients --learning_rate 1e-2"
    train_sam_i2i.main(arguments(places, tmp_path / "run", flags.split()))
    losses = [row["l1"] for row in read(tmp_path / "run")["history"]]
    assert len(losses) == 40 and max(losses[-5:]) < 0.5 * losses[0]


def test_volumes_without_validation_keep_the_last_weights(run, tmp_path):
    for patient, depth in (("a", 2), ("b", 1)):
        slices = np.stack([draw_slice(index, 36) for index in range(depth)])  # which are padded
        slices = np.concatenate([slices, np.zeros_like(slices[:1])])  # one without tissue
        write_volumes(tmp_path, slices, f"{patient}.nii.gz")
    flags = f"--source {tmp_path}/source --target {tmp_path}/target --max_train_steps 2 --checkpointing_steps 1"
    output = run(
        *flags.split(), "--validation_patients", "--test_patients", "b", "--do_test", "--mixed_precision", "bf16"
    )
    assert_equal_files(output / "model.safetensors", output / "step_2" / "model.safetensors")
    report = read(output)
    assert not (output / "best").exists() and "validation" not in report
    assert report["num_slices"] == {"train": 2, "validation": 0, "test": 1}
    (row,) = report["test_slices"]
    assert row["name"] == "b_000" and len(list((output / "volumes").glob("*.npy"))) == 4
    # As everyone else computes it, in float32 and without the padding.
    volumes = [list(read_nifti(tmp_path / name / "b.nii.gz").slices) for name in ("source", "target")]
    made = translate(*load_translator(str(output)), volumes[0])
    labels = SamI2IImageProcessor()(volumes[0], volumes[1])["labels"][:, 0, :36, :36]
    values = slice_metrics(made[0], labels[0])
    assert {name: row[name] for name in values} == pytest.approx(values, rel=1e-4)
    assert report["test_intervals"]["psnr"] == [None, None]  # of one patient there are none


def test_slices_without_a_value_are_left_out_of_means():
    rows = [{"psnr": 20.0, "ssim": math.nan, "nrmse": 0.5}, {"psnr": 30.0, "ssim": math.nan, "nrmse": math.nan}]
    means = train_sam_i2i.get_means(rows)
    assert (means["psnr"], means["nrmse"]) == (25, 0.5) and math.isnan(means["ssim"])


def test_no_gan_never_loads_clip(run, monkeypatch):
    def refuse(*args, **kwargs):
        raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(CLIPVisionModelWithProjection, "from_pretrained", refuse)
        output = run("--max_train_steps", 1, "--no_gan", "--checkpointing_steps", 1, "--l1_weight", 2)
        with pytest.raises(Interrupted):
            run("--max_train_steps", 1, name="other")
    row = read(output)["history"][0]
    assert row["loss"] == pytest.approx(2 * row["l1"]) and "gan" not in row and "discriminator" not in row
    assert not (output / "step_1" / "model_1.safetensors").exists()
    with pytest.raises(ValueError, match="Expected --no_gan True as in .*step_1, got False: a run cannot begin to do"):
        run("--max_train_steps", 2, "--resume_from_checkpoint", "latest")


# A step


@pytest.fixture
def get_gradients(places):
    """`get_gradients(*flags)`: the losses of a batch, and the gradients of two last layers, decoder's and heads'."""

    def get_gradients(*flags):
        args = parse_args(arguments(places, "out", flags))
        accelerator = Accelerator(cpu=True, mixed_precision=args.mixed_precision or "no")
        set_seed(0)
        batch = {"pixel_values": torch.randn(2, 3, 32, 32), "labels": torch.rand(2, 1, 32, 32)}
        model = SamI2IModel.from_backbone_pretrained(args.model_name_or_path).train()
        generator = Player(accelerator.prepare(model), None, None)
        adversary = None if args.no_gan else get_adversary(accelerator, args)
        losses = backward(accelerator, generator, adversary, batch, args)
        AcceleratorState._reset_state(reset_partial_state=True)
        return losses, model.decoder.head.weight.grad, adversary and adversary.heads.model.embedding[2].bias.grad

    args = "--max_train_steps", 1
    return lambda *flags: get_gradients(*args, *flags)


def test_the_adversary_changes_what_the_generator_learns(get_gradients):
    _, alone, nothing = get_gradients("--no_gan")
    assert nothing is None
    _, without_weight, of_heads = get_gradients("--gan_weight", 0)
    assert_close(without_weight, alone)
    losses, both, of_the_same_heads = get_gradients("--gan_weight", 3)
    assert not torch.allclose(both, alone)
    assert_close(losses["loss"], 50 * losses["l1"] + 3 * losses["gan"])
    # The generator's loss leaves nothing in the heads.
    assert_close(of_heads, of_the_same_heads)
    _, adversarial, _ = get_gradients("--gan_weight", 1, "--l1_weight", 0)
    assert_close(both, alone + 3 * adversarial)


def test_the_heads_learn_which_slices_are_real(places):
    args = parse_args(arguments(places, "out", ["--max_train_steps", 10, "--discriminator_learning_rate", 1e-2]))
    accelerator = Accelerator(cpu=True)
    set_seed(0)
    generator = Player(SamI2IModel.from_backbone_pretrained(args.model_name_or_path).train(), None, None)
    adversary = get_adversary(accelerator, args)
    batch = {"pixel_values": torch.randn(2, 3, 32, 32), "labels": torch.rand(2, 1, 32, 32).round()}
    losses = []
    for _ in range(10):
        losses.append(backward(accelerator, generator, adversary, batch, args))
        adversary.heads.step(accelerator, None)
    heads, features = adversary.heads.model.eval(), adversary.features
    with torch.no_grad():
        real, fake = heads(features(batch["labels"])), heads(features(generator.model(batch["pixel_values"])[0]))
    assert all(a.mean() > b.mean() for a, b in zip(real, fake, strict=True))
    assert losses[-1]["discriminator"] < losses[0]["discriminator"] and losses[-1]["gan"] > losses[0]["gan"]


def test_mixed_precision(get_gradients):
    (plain, *_), (mixed, gradient, _) = get_gradients(), get_gradients("--mixed_precision", "bf16")
    for name in ("l1", "gan", "discriminator"):
        assert mixed[name] != plain[name] and mixed[name].item() == pytest.approx(plain[name].item(), rel=0.05)
    assert gradient.dtype == torch.float32


# Interruptions


def interrupt_at(monkeypatch, batch_number):
    """Stops the run at its n-th batch."""
    seen, seed_step = [], train_sam_i2i.seed_step

    def stop(*args):
        seen.append(args)
        if len(seen) == batch_number:
            raise Interrupted
        seed_step(*args)

    monkeypatch.setattr(train_sam_i2i, "seed_step", stop)


def assert_equal_runs(one, other, step):
    for name in ("model", "model_1"):
        assert_equal_files(
            one / f"step_{step}" / f"{name}.safetensors", other / f"step_{step}" / f"{name}.safetensors"
        )
    for name in ("optimizer", "optimizer_1", "scheduler", "scheduler_1"):
        a, b = (torch.load(folder / f"step_{step}" / f"{name}.bin", weights_only=True) for folder in (one, other))
        assert_close(a, b, rtol=0, atol=0)
    assert_equal_files(one / "model.safetensors", other / "model.safetensors")
    assert read(one)["history"] == read(other)["history"]
    assert read(one)["validation_slices"] == read(other)["validation_slices"]


def test_an_interrupted_run_ends_with_the_same_weights(run, monkeypatch):
    # 6 slices, one at a time, 2 per optimisation step: 3 steps per epoch.
    flags = "--max_train_steps 5 --per_device_train_batch_size 1 --gradient_accumulation_steps 2 --num_warmup_steps 2"
    flags = [*flags.split(), "--checkpointing_steps", 1, "--max_grad_norm", 1, "--lr_scheduler_type", "cosine"]
    straight = run(*flags, name="straight")
    # Within the second epoch, and after the last batch of the first, when only the validation is left to do.
    for batch_number in (9, 7):
        name = f"stopped_at_{batch_number}"
        with monkeypatch.context() as patch:
            interrupt_at(patch, batch_number)
            with pytest.raises(Interrupted):
                run(*flags, name=name)
        resumed, done = straight.with_name(name), (batch_number - 1) // 2
        assert checkpoints.find_checkpoints(resumed)[-1].name == f"step_{done}"
        for file in ("model.safetensors", "model_1.safetensors"):
            before, after = (load_file(folder / file) for folder in (resumed / f"step_{done}", straight / "step_5"))
            assert any(not torch.equal(before[key], after[key]) for key in before)
        run(*flags, "--resume_from_checkpoint", "latest", name=name)
        assert_equal_runs(straight, resumed, step=5)


@pytest.mark.slow
def test_two_processes_are_one_with_the_double_batch(places, tmp_path):
    flags = ["--num_train_epochs", 2, "--do_test", "--with_tracking", "--report_to", "tensorboard"]
    one, two = tmp_path / "one", tmp_path / "two"
    for start, output, batch_size in (([sys.executable, "-m"], one, 2), (TWO_PROCESSES, two, 1)):
        command = [*start, "imedsam.training.train_sam_i2i"]
        command += arguments(places, output, [*flags, "--per_device_train_batch_size", batch_size])
        subprocess.run(command, check=True, env=environment() | {"ACCELERATE_USE_CPU": "true"})
    for name in ("model", "model_1"):
        a, b = (load_file(folder / "step_6" / f"{name}.safetensors") for folder in (one, two))
        assert_close(a, b, atol=1e-3, rtol=1e-3)
    assert list((two / "sam_i2i").rglob("events.out.tfevents.*"))
    one, two = read(one), read(two)
    assert (one["num_processes"], two["num_processes"]) == (1, 2)
    for a, b in zip(one["history"], two["history"], strict=True):
        assert a["step"] == b["step"] and a["loss"] == pytest.approx(b["loss"], abs=1e-3)
    assert [row["name"] for row in one["test_slices"]] == [row["name"] for row in two["test_slices"]]
    assert one["test"] == pytest.approx(two["test"], rel=1e-3)


# What it starts from


def test_a_backbone_that_starts_from_nothing_is_trained(places, tmp_path, capsys):
    flags = [flag for flag in arguments(places, tmp_path / "run", ["--max_train_steps", 1, "--no_gan"])]
    index = flags.index("--model_name_or_path")
    del flags[index : index + 2]
    with pytest.raises(SystemExit):
        parse_args(flags)
    assert "Expected a checkpoint for a backbone that is not trained, got none" in capsys.readouterr().err
    backbone = json.dumps({"model_type": "sam2_hiera_det_model", **HIERA})
    config = ["--config", "train_backbone=true", "upsampling=2", f"backbone_config={backbone}"]
    train_sam_i2i.main([*flags, *config])
    report = read(tmp_path / "run")
    assert report["parameters"] == report["trainable_parameters"]
    assert SamI2IModel.from_pretrained(tmp_path / "run").config.upsampling == 2
    assert SamI2IImageProcessor.from_pretrained(tmp_path / "run").size_divisor == 16


def test_training_goes_on_from_its_own_checkpoint(places, trained, tmp_path):
    flags = ["--model_name_or_path", trained, "--max_train_steps", 1, "--learning_rate", 0, "--no_gan"]
    train_sam_i2i.main(arguments(places, tmp_path / "more", flags))
    assert_equal_files(trained / "model.safetensors", tmp_path / "more" / "model.safetensors")
    with pytest.raises(ValueError, match="Expected the configuration of .*, got another upsampling: it is"):
        train_sam_i2i.main(arguments(places, tmp_path / "more", [*flags, "--config", "upsampling=2"]))
    for path, named in ((trained, "sam_i2i"), (places / "sam2", "sam2")):
        flags[1] = path
        with pytest.raises(
            ValueError, match=f"Expected a checkpoint of --model unet in .*, got {named}: name another"
        ):
            train_sam_i2i.main(arguments(places, tmp_path / "more", [*flags, "--model", "unet"]))


def test_the_unet_is_trained_alike(places, tmp_path):
    flags = arguments(places, tmp_path / "run", ["--num_train_epochs", 4, "--model", "unet", "--no_gan"])
    index = flags.index("--model_name_or_path")
    del flags[index : index + 2]
    train_sam_i2i.main([*flags, "--config", "channels=[4,8,16]", "--learning_rate", "2e-2"])
    losses = [row["l1"] for row in read(tmp_path / "run")["history"]]
    assert losses[-1] < 0.9 * losses[0]
    model = TranslationUNet.from_pretrained(tmp_path / "run")
    assert SamI2IImageProcessor.from_pretrained(tmp_path / "run").size_divisor == model.config.size_divisor == 4
    assert read(tmp_path / "run")["parameters"] == sum(p.numel() for p in model.parameters())


def test_the_unet():
    model = TranslationUNet(TranslationUNetConfig())
    trained = sum(p.numel() for p in SamI2IModel(SamI2IConfig()).parameters() if p.requires_grad)
    assert 0.9 < sum(p.numel() for p in model.parameters()) / trained < 1.1
    pixel_values, labels = torch.randn(2, 3, 48, 32), torch.rand(2, 1, 48, 32)
    output = model(pixel_values, labels)
    assert output.reconstruction.shape == (2, 1, 48, 32)
    assert 0 < output.reconstruction.min() and output.reconstruction.max() < 1
    assert_close(output.loss, (output.reconstruction - labels).abs().mean())
    with pytest.raises(ValueError, match=r"multiples of 16, got \(1, 3, 40, 32\): SamI2IImageProcessor"):
        model(torch.randn(1, 3, 40, 32))
    with pytest.raises(TypeError, match="'image_size': TranslationUNetConfig takes channels, num_res_units"):
        TranslationUNetConfig(image_size=3)
    with pytest.raises(ValueError, match="Expected at least 2 positive numbers of channels"):
        TranslationUNetConfig(channels=[4])


# Flags


def test_the_defaults_are_the_papers():
    args = parse_args("--model_name_or_path m --source a --target b --output_dir c".split())
    assert (args.learning_rate, args.discriminator_learning_rate) == (2e-5, 2e-5)
    assert (args.per_device_train_batch_size, args.num_train_epochs) == (2, 20)
    assert (args.l1_weight, args.gan_weight, args.test_patients, args.validation_patients) == (50, 1, 0.2, [])
    assert (args.weight_decay, args.max_grad_norm, args.lr_scheduler_type) == (0, None, "constant")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--config upsamplin=2", "argument --config: Unknown configuration key 'upsamplin'"),
        ("--config upsampling=3", "argument --config: Expected upsampling 1, 2 or 4"),
        ("--config backbone_config={}", "backbone_config is the checkpoint's: leave it out"),
        ("--tissue_share 2", r"argument --tissue_share: Expected a number in \[0, 1\], got '2'"),
    ],
)
def test_wrong_flags_are_refused(places, capsys, flags, message):
    with pytest.raises(SystemExit):
        parse_args(arguments(places, "out", flags.split()))
    assert re.search(message, capsys.readouterr().err)


def test_fp16_has_one_scale_for_two_losses(run, monkeypatch):
    monkeypatch.setattr(Accelerator, "mixed_precision", property(lambda self: "fp16"))  # needs a GPU
    with pytest.raises(ValueError, match="Expected --mixed_precision bf16 or no with a discriminator, got fp16"):
        run()


def test_patients_are_names_or_a_share(places):
    def parse(*values):
        return parse_args(arguments(places, "out", ["--test_patients", *values])).test_patients

    assert parse("0.3") == 0.3 and parse("p4") == ["p4"] and parse("0.3", "p4") == ["0.3", "p4"]
    assert parse("1") == ["1"] and parse() == [] and parse("nan") == ["nan"]


def test_a_loss_that_is_not_finite_stops_the_run(run):
    with pytest.raises(FloatingPointError, match="Expected a finite loss, got nan at step"):
        run("--learning_rate", 1e30, "--max_train_steps", 20)

"""The baselines: what each is made of, trains, sees of the box, and leaves in its folder."""

import copy
import json
import subprocess

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from PIL import Image
from processes import TWO_PROCESSES
from safetensors.torch import load_file
from test_training import Interrupted, arguments, environment, interrupt_at
from torch.testing import assert_close
from typer.testing import CliRunner

from imedsam.configuration.configuration_imedsam import IMedSamConfig
from imedsam.false_corrector import default_samples, sample_masks
from imedsam.mask_field import InterpolatedMaskField
from imedsam.modeling_imedsam import IMedSamModel
from imedsam.modeling_sf_recsam import SFRecSamModel
from imedsam.processing.processing_imedsam import IMedSamProcessor
from imedsam.training import train
from imedsam.training.arguments import parse_args
from imedsam.training.averaging import WeightAverage
from imedsam.training.baselines import METHODS, load_model, load_pipeline
from imedsam.training.box_mask import BOX_LOGIT, BoxMaskModel, box_coverage
from imedsam.training.cli import app
from imedsam.training.convolutional import ConvolutionalConfig, ConvolutionalModel
from imedsam.training.evaluation import evaluate_masks, floor_metrics
from imedsam.training.examples import load_examples
from imedsam.training.unet import UNetConfig, UNetModel

BASELINES = [name for name in METHODS if not name.startswith("imedsam")]
SMALL = {"coarse_widths": [48, 24], "coarse_features": 8, "fine_widths": [24, 16], "fine_head_width": 8}


@pytest.fixture
def make(sam_folder, randomised):
    """`make(method, image_size=64, seed=0, **values)`: a small model, its trained parts as after a training."""

    def make(method, image_size=64, seed=0, **values):
        method = METHODS[method]
        small = {UNetModel: {"channels": [4, 8, 16]}, SFRecSamModel: {}}.get(method.model_class, SMALL)
        torch.manual_seed(seed)
        model = method.model_class.from_sam_pretrained(
            sam_folder, image_size, **method.get_values({**small, **values})
        )
        return randomised(model, seed)

    return make


@pytest.fixture(autouse=True)
def fresh_accelerator():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def run(sam_folder, tmp_path):
    """`run(method, *flags, name="run")`: trains on phantoms; returns the output folder."""

    def run(method, *flags, name="run"):
        train.main(method_arguments(sam_folder, tmp_path / name, method, flags))
        return tmp_path / name

    return run


def method_arguments(sam, output, method, flags):
    args = arguments(sam, output, ["--model", method, *flags])
    config = {UNetModel: "channels=[8,16,32]", SFRecSamModel: "train_mask_decoder=true"}
    if (model_class := METHODS[method].model_class) not in config:
        return args
    at = args.index("--config")  # of I-MedSAM
    after = next(i for i, flag in enumerate(args) if i > at and flag.startswith("--"))
    return [*args[:at], "--config", config[model_class], *args[after:]]


def read(folder):
    return json.loads((folder / "metrics.json").read_text())


# Models


@torch.no_grad()
@pytest.mark.parametrize("method", BASELINES)
def test_a_baseline_is_an_imedsam_model_to_its_callers(make, inputs, method):
    model = make(method).eval()
    assert METHODS[method].made(model) and isinstance(model, IMedSamModel)
    output = model(**inputs, output_size=(20, 30))
    assert output.pred_masks.shape == output.uncertainty.shape == (2, 2, 1, 20, 30)
    assert output.iou_scores.shape == (2, 2, 1) and output.pred_masks.std() > 0.01
    field = model.get_mask_field(model.get_image_embeddings(inputs["pixel_values"]), inputs["input_boxes"])
    side = {"sam_decoder": 16, "sam_decoder_box_mask": 16, "sf_recsam": 32}.get(method, 64)
    assert isinstance(field, InterpolatedMaskField) and field.logits.shape == (2, 2, 1, side, side)
    assert_close(field.render((20, 30)).logits, output.pred_masks)
    with pytest.raises(ValueError, match=r"Expected pixel_values of shape \(B, 3, 64, 64\)"):
        model(torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match=r"Expected input_boxes of shape \(B, P, 4\)"):
        model(inputs["pixel_values"], input_boxes=torch.zeros(2, 1, 3))


@torch.no_grad()
@pytest.mark.parametrize("method", ["convolutional", "unet", "unet_without_prompt"])
def test_class_labels_pick_masks(make, inputs, method):
    model = make(method, num_labels=3) if method == "convolutional" else make(method, id2label=dict(enumerate("abc")))
    embeddings, boxes = model.eval().get_image_embeddings(inputs["pixel_values"]), inputs["input_boxes"]
    every = model.get_mask_field(embeddings, boxes).logits
    assert every.shape == (2, 2, 3, 64, 64) and not torch.allclose(every[:, :, 0], every[:, :, 2], atol=0.01)
    labels = torch.tensor([[0, 2], [1, 1]])
    picked = model.get_mask_field(embeddings, boxes, class_labels=labels).logits
    assert_close(picked, every.take_along_dim(labels[:, :, None, None, None], dim=2))
    with pytest.raises(ValueError, match=r"Expected class_labels in \[0, 2\]"):
        model(**inputs, class_labels=labels + 1)


@pytest.mark.parametrize("method", BASELINES)
def test_one_step_trains_what_the_method_names(make, inputs, method):
    model = make(method).train()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)  # a frozen parameter given by mistake would move as well
    points = torch.rand(2, 2, 50, 2, generator=torch.Generator().manual_seed(0)) * 2 - 1
    labels = (points.norm(dim=-1) < 0.7).float()
    zeros = torch.zeros(2, 2, dtype=torch.long)
    model(**inputs, coordinates=points, labels=labels, class_labels=zeros, num_points=40).loss.backward()
    optimizer.step()
    changed = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    names = {id(p): name for name, p in model.named_parameters()}
    parts = {part: {names[id(p)] for p in parameters} for part, parameters in model.parameter_parts().items()}
    sam = {"LoRA", "frequency adapters", "frequency gates", "prompt encoder", "upscaling"}
    assert set(parts) == {
        "sam_decoder": {*sam, "mask decoder", "mask head"},
        "sam_decoder_box_mask": {*sam, "mask decoder", "mask head"},
        "convolutional": {*sam, "ellipse prior", "convolutional head"},
        "sf_recsam": {"positions", "convolutional branch", "cross attention", "adapters"},
        "unet": {"U-Net"},
        "unet_without_prompt": {"U-Net"},
    }.get(method)
    assert changed <= set().union(*parts.values())
    # A prompt is a box here; a bias before a norm and one of the keys do nothing.
    idle = {"sam_decoder": "mask_embed", "convolutional": "mask_embed", "sam_decoder_box_mask": "no_mask_embed"}
    idle = (idle.get(method, "conv.bias"), "point_embed", "k_proj.bias")
    for part, expected in parts.items():
        assert not {name for name in expected - changed if not any(key in name for key in idle)}, part
    masks = {name for name in changed if ".mask_embed." in name}
    assert bool(masks) == (method == "sam_decoder_box_mask")
    assert set(parts) <= set(train.LEARNING_RATES)


def test_the_heads_of_the_baselines_have_the_fields_learning_rate():
    heads = ("mask head", "convolutional head", "U-Net")
    assert (
        {train.LEARNING_RATES[name] for name in heads} == {train.LEARNING_RATES["coarse field"]} == {"learning_rate"}
    )


@pytest.mark.parametrize("method", METHODS)
def test_saved_it_comes_back(make, inputs, tmp_path, method):
    model = make(method).eval()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    loaded = load_model(tmp_path)
    assert type(loaded) is type(model) and not loaded.training and METHODS[method].made(loaded)
    assert {**loaded.config.to_dict(), "_name_or_path": ""} == {**model.config.to_dict(), "_name_or_path": ""}
    state = loaded.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    with torch.no_grad():
        expected = model(**inputs).pred_masks
        assert_close(loaded(**inputs).pred_masks, expected, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(make(method, seed=1).eval()(**inputs).pred_masks, expected, atol=0.01)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name, p in loaded.named_parameters() if p.requires_grad} == trainable
    if METHODS[method].model_class is not IMedSamModel:
        with pytest.raises(ValueError, match="'(imedsam_|sf_).*: imedsam.training.baselines.load_model takes any of"):
            IMedSamModel.from_pretrained(tmp_path)


@torch.no_grad()
@pytest.mark.parametrize("method", ["sam_decoder_box_mask", "convolutional"])
def test_an_adapter_alone_comes_back(make, inputs, tmp_path, method):
    model = make(method).eval()
    model.save_adapter(tmp_path)
    loaded = load_model(tmp_path)
    assert type(loaded) is type(model)
    expected = model(**inputs).pred_masks
    assert_close(loaded(**inputs).pred_masks, expected, atol=1e-5, rtol=1e-5)
    assert_close(loaded.merge_and_unload()(**inputs).pred_masks, expected, atol=1e-4, rtol=1e-4)
    model.disable_adapters()
    assert not torch.allclose(model(**inputs).pred_masks, expected, atol=0.01)


def test_of_what_goes_wrong_the_configuration_alone_is_called_one(make, tmp_path):
    """What `from_pretrained` does not know is no key of config.json."""
    make("imedsam").save_pretrained(tmp_path)
    for load in (load_model, load_pipeline):
        with pytest.raises(TypeError, match="unexpected keyword argument 'rank'"):
            load(tmp_path, rank=4)
    config = json.loads((tmp_path / "config.json").read_text())
    for wrong in ({"rank": 4}, {"lora_rank": "4"}):
        (tmp_path / "config.json").write_text(json.dumps({**config, **wrong}))
        for load in (load_model, load_pipeline):
            with pytest.raises(ValueError, match="Expected a configuration of this version in .*config.json, got"):
                load(tmp_path)


def test_another_checkpoint_is_refused(sam_folder, tmp_path):
    with pytest.raises(ValueError, match="got one of type 'sam': start from a SAM"):
        load_model(sam_folder)
    for model_class in (SFRecSamModel, BoxMaskModel):
        name = model_class.__name__
        with pytest.raises(ValueError, match=f"got one of type 'sam': start from a SAM with {name}.from_sam_pretra"):
            model_class.from_pretrained(sam_folder)
        with pytest.raises(ValueError, match=f"Expected a checkpoint of {name} at .*, got no config.json"):
            model_class.from_pretrained(tmp_path)
    IMedSamConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Expected a checkpoint of type 'imedsam_unet' .*, got one of type 'imedsam'"):
        UNetModel.from_pretrained(tmp_path)


# Boxes


def test_the_coverage_of_pixels_by_hand():
    coverage = box_coverage(torch.tensor([[1.0, 2.0, 5.0, 6.5]]), image_size=8, side=4)
    assert_close(coverage[0], torch.outer(torch.tensor([0, 1, 1, 0.25]), torch.tensor([0.5, 1, 0.5, 0])))
    assert_close(box_coverage(torch.tensor([[0.0, 0.0, 8.0, 8.0]]), 8, 4), torch.ones(1, 4, 4))
    assert box_coverage(torch.rand(2, 3, 4), 8, 4).shape == (2, 3, 4, 4)


@torch.no_grad()
@pytest.mark.parametrize("decoder", ["imedsam", "sam_decoder"])
def test_the_box_mask_is_a_mask_prompt_of_sam(make, inputs, decoder):
    model, plain = make(f"{decoder}_box_mask").eval(), make(decoder).eval()
    plain.load_state_dict(model.state_dict())
    masks = torch.full((2, 2, 16, 16), -BOX_LOGIT)
    for image, prompt, (x0, y0, x1, y1) in ((0, 0, (2, 3, 10, 12)), (0, 1, (5, 1, 15, 7)), (1, 0, (0, 0, 16, 16))):
        masks[image, prompt, y0:y1, x0:x1] = BOX_LOGIT  # a quarter of the pixels of `pixel_values`
    # Of 30, 33, 50, 41 two edges cross pixels: 12.5 is half inside, 8.25 to 10.25 three quarters and a quarter.
    rows, columns = torch.zeros(16), torch.zeros(16)
    rows[8:11], columns[7:13] = torch.tensor([0.75, 1, 0.25]), torch.tensor([0.5, 1, 1, 1, 1, 0.5])
    masks[1, 1] = BOX_LOGIT * (2 * torch.outer(rows, columns) - 1)
    inputs["input_boxes"][0, 0] = torch.tensor([8.0, 12.0, 40.0, 48.0])
    inputs["input_boxes"][0, 1, 3] = 28.0
    output = model(**inputs).pred_masks
    assert_close(output, plain(**inputs, input_masks=masks).pred_masks)
    assert not torch.allclose(output, plain(**inputs).pred_masks, atol=0.01)
    given = torch.randn(2, 2, 16, 16)
    assert_close(model(**inputs, input_masks=given).pred_masks, plain(**inputs, input_masks=given).pred_masks)
    points = {"pixel_values": inputs["pixel_values"], "input_points": torch.full((2, 1, 1, 2), 30.0)}
    assert_close(model(**points).pred_masks, plain(**points).pred_masks)


@torch.no_grad()
def test_the_u_net_sees_the_box_in_its_channel_or_not_at_all(make, inputs):
    model, blind = make("unet").eval(), make("unet_without_prompt").eval()
    output, seen = model(**inputs).pred_masks, []
    assert not torch.allclose(output[:, 0], output[:, 1], atol=0.01)
    with_hook = model.network.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    field = model.get_mask_field(inputs["pixel_values"])
    with_hook.remove()
    assert seen[0].shape == (2, 4, 64, 64) and (seen[0][:, 3] == 1).all()
    assert_close(seen[0][:, :3], inputs["pixel_values"])
    whole = torch.tensor([0.0, 0, 64, 64]).expand(2, 1, 4)
    assert_close(model.get_mask_field(inputs["pixel_values"], whole).logits, field.logits)
    with pytest.raises(ValueError, match="Expected a model on a SAM, got a U-Net"):
        model.to_sam()
    with pytest.raises(ValueError, match="Expected boxes for a U-Net, got points or masks"):
        model(**inputs, input_points=torch.zeros(2, 2, 1, 2))
    output = blind(**inputs).pred_masks
    assert_close(output[:, 0], output[:, 1])
    assert not torch.allclose(output[0], output[1], atol=0.01)
    assert_close(output[:, :1], blind(inputs["pixel_values"]).pred_masks)


@torch.no_grad()
def test_the_convolutions_are_given_the_prompts_frame_and_embedding(make):
    features, prompt = torch.zeros(2, 4, 16, 16), torch.zeros(2, 32)
    frames = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.2, 0.3, 0.2, 0.5]])
    with_frame, without = (
        make("convolutional", prompt_frame=value, ellipse_prior=False).implicit_decoder for value in (True, False)
    )
    one, other = with_frame(features, prompt, frames)
    assert not torch.allclose(one, other, atol=0.01)
    one, other = without(features, prompt, frames)
    assert_close(one, other)
    prompt[1] = 1
    one, other = without(features, prompt, frames)
    assert not torch.allclose(one, other, atol=0.01)


# Sizes


@torch.no_grad()
def test_the_convolutions_start_from_the_ellipse(make, inputs):
    """1 in the middle of a box, 0 on the ellipse in it, linear between; times each class's slope."""
    model = make("convolutional", num_labels=2).eval()
    slope = model.implicit_decoder.ellipse.slope
    slope.zero_()
    without = model(**inputs).pred_masks
    slope.copy_(torch.tensor([3.0, -2.0]))
    left, top, right, bottom = inputs["input_boxes"][..., None, None].unbind(2)
    x, y = torch.arange(64) + 0.5, torch.arange(64)[:, None] + 0.5
    q = (2 * x - left - right) / (right - left), (2 * y - top - bottom) / (bottom - top)
    inside = 1 - torch.hypot(q[0].clamp(-3, 3), q[1].clamp(-3, 3))
    assert_close(
        model(**inputs).pred_masks, without + torch.stack([3 * inside, -2 * inside], dim=2), atol=1e-4, rtol=1e-4
    )
    assert ConvolutionalModel(ConvolutionalConfig(**SMALL)).implicit_decoder.ellipse.slope.tolist() == [4.0]
    assert make("convolutional", ellipse_prior=False).implicit_decoder.ellipse is None


@pytest.mark.parametrize("values", [{}, {"num_labels": 13}, {"prompt_frame": False}], ids=str)
def test_the_convolutions_have_as_many_parameters_as_the_fields(values):
    with torch.device("meta"):
        convolutional, model = ConvolutionalModel(ConvolutionalConfig(**values)), IMedSamModel(IMedSamConfig(**values))
        for one in (convolutional, model):
            one.add_adapter()
            one.set_trainable()
    counts, expected = (
        {name: sum(p.numel() for p in part) for name, part in one.parameter_parts().items()}
        for one in (convolutional, model)
    )
    decoder = [expected.pop(name) for name in ("coarse field", "fine field")]
    ratio = counts.pop("convolutional head") / sum(decoder)
    assert 0.97 < ratio < 1.03
    assert counts == expected


@pytest.mark.parametrize("patch_size, image_size", [(4, 32), (8, 64), (16, 96), (32, 128)])
def test_the_convolutions_reach_the_images_size(tiny_config, patch_size, image_size):
    values = tiny_config(image_size).to_dict()
    sam = copy.deepcopy(values["sam_config"])
    for part in ("vision_config", "prompt_encoder_config"):
        sam[part]["patch_size"] = patch_size
        sam[part].pop("image_embedding_size", None)
    model = ConvolutionalModel(ConvolutionalConfig(sam_config=sam, **SMALL))
    logits = model(torch.zeros(1, 3, image_size, image_size)).pred_masks
    assert logits.shape == (1, 1, 1, image_size, image_size)


def test_the_u_net_is_as_large_as_what_imedsam_trains():
    with torch.device("meta"):
        models = [UNetModel(UNetConfig(box_channel=value)) for value in (True, False)]
    counts = [sum(p.numel() for p in model.parameters()) for model in models]
    assert counts[0] == pytest.approx(1_588_062, rel=0.03)
    # The fourth channel's weights in the first convolution and its residual connection.
    assert counts[0] - counts[1] == 16 * 9 + 16 * 9


def test_wrong_configurations_are_refused():
    with pytest.raises(
        TypeError, match="Unknown configuration key 'lora_rank': UNetConfig takes box_channel, channels"
    ):
        UNetConfig(lora_rank=4)
    with pytest.raises(ValueError, match="Expected an image_size of 32 or another multiple of 16 .*, got 40"):
        UNetConfig(image_size=40)
    with pytest.raises(ValueError, match="Expected at least 2 positive numbers of channels"):
        UNetConfig(channels=[8])
    with pytest.raises(
        ValueError, match="Expected implicit_decoder=True, whose place the convolutions take, got False"
    ):
        ConvolutionalModel(ConvolutionalConfig(implicit_decoder=False))
    names = {0: "LABEL_0", 1: "LABEL_1"}
    assert UNetConfig.from_dict(UNetConfig(id2label=names).to_diff_dict()).id2label == names
    assert UNetConfig(id2label=names).label2id == {"LABEL_0": 0, "LABEL_1": 1}


# Training


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_an_image_by_heart(run, method):
    flags = (
        "--num_train_images 1 --num_eval_images 1 --num_train_epochs 150 --eval_every 150 --checkpointing_steps 150"
    )
    flags += (
        " --augmentation none --box_jitter 0 --num_points 500 --uniform_share 0.3 --point_weighting none --do_test"
    )
    flags += " --learning_rate 1e-2 --adapter_learning_rate 3e-3 --encoder_learning_rate 1e-3 --ema_decay 0.5"
    flags += " --lr_scheduler_type constant --coarse_ramp_epochs 10"
    folder = run(method, *flags.split())
    examples = load_examples("phantoms", "train", num_images=1, image_size=64)
    model, processor = load_model(folder), IMedSamProcessor.from_pretrained(folder)
    assert METHODS[method].made(model)
    dice = evaluate_masks(model, processor, examples, progress=False).mean()["dice"]
    assert dice > 0.93 > max(floor.mean()["dice"] for floor in floor_metrics(examples).values())
    report = read(folder)
    assert report["arguments"]["method"] == method and {"dice", "hd"} <= set(report["test"])
    assert sum(report["trainable_parameters"].values()) == sum(
        p.numel() for p in model.parameters() if p.requires_grad
    )
    card = (folder / "README.md").read_text()
    assert METHODS[method].description in card and ("trained from nothing" in card) == method.startswith("unet")
    image = folder / "image.png"
    Image.new("RGB", (50, 40)).save(image)
    code = card.split("```python\n")[1].split("```")[0]
    code = code.replace(f'"path/to/{folder.name}"', f'r"{folder}"').replace("image.png", str(image))
    names = {"x0": 5, "y0": 5, "x1": 30, "y1": 20}
    exec(code, names)
    assert names["mask"].shape == (40, 50)


@pytest.mark.parametrize("flag", ["--spectral_weight", "--uncertainty_weight"])
@pytest.mark.parametrize("method", ["unet", pytest.param("convolutional", marks=pytest.mark.slow)])
def test_further_objectives_train_any_model(run, method, flag):
    """The loss is higher by what an objective adds, and other weights come out."""
    flags = "--num_train_epochs 1 --num_train_images 2 --supervision dense --label_size 32".split()
    plain, further = (run(method, *flags, flag, weight, name=f"weight{weight}") for weight in ("0", "0.5"))
    losses = [read(folder)["history"][0]["loss"] for folder in (plain, further)]
    assert losses[0] < losses[1] <= losses[0] + 1
    weights = [load_model(folder).state_dict() for folder in (plain, further)]
    assert any((weights[0][key] != weights[1][key]).any() for key in weights[0])


@pytest.mark.parametrize("method", ["unet", pytest.param("convolutional", marks=pytest.mark.slow)])
def test_an_interrupted_run_ends_with_the_same_weights(run, monkeypatch, method):
    flags = "--num_train_epochs 2 --num_train_images 2 --per_device_train_batch_size 1 --learning_rate 3e-3".split()
    flags += ["--ema_decay", "0.5"]
    straight = run(method, *flags, name="straight")
    with monkeypatch.context() as patch:
        interrupt_at(patch, 4)
        with pytest.raises(Interrupted):
            run(method, *flags, name="resumed")
    resumed = run(method, *flags, "--resume_from_checkpoint", "latest", name="resumed")
    one, other = (load_file(folder / "step_4" / "model.safetensors") for folder in (straight, resumed))
    first = load_file(straight / "step_2" / "model.safetensors")
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    assert any(not torch.equal(one[key], first[key]) for key in one)
    assert read(straight)["history"] == read(resumed)["history"]


def test_a_second_stage_trains_sf_recsams_corrector_alone(run, sam_folder, tmp_path):
    steps = ("--max_train_steps", 2, "--prompt", "click")
    first = run("sf_recsam", *steps)
    flags = ["--model_name_or_path", str(first), "--train_corrector"]
    second = run("sf_recsam", *steps, *flags, name="second")
    before, after = (load_file(folder / "model.safetensors") for folder in (first, second))
    assert {key.partition(".")[0] for key in after.keys() - before.keys()} == {"learned_corrector"}
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert set(read(second)["trainable_parameters"]) == {"learned corrector"}
    third = run("sf_recsam", *steps, "--model_name_or_path", str(second), "--train_corrector", name="third")
    assert (
        load_model(third).learned_corrector is not None
        and load_file(third / "model.safetensors").keys() == after.keys()
    )
    with pytest.raises(ValueError, match="Expected an SF-RecSAM checkpoint for --train_corrector, got a SAM at"):
        run("sf_recsam", *steps, "--train_corrector", name="none")
    unet = run("unet", "--max_train_steps", 1)
    with pytest.raises(ValueError, match="got one of type 'imedsam_unet' at"):
        run("unet", "--max_train_steps", 1, "--train_corrector", "--model_name_or_path", str(unet), name="none")


def test_batch_statistics_are_averaged_with_the_weights(make, inputs):
    model = make("sf_recsam").train()
    statistics = train.batch_statistics(model)
    assert [tuple(statistic.shape) for statistic in statistics] == [(64,)] * 4
    average, expected = WeightAverage(statistics, decay=0.75), None
    for step in range(4):
        model.get_image_embeddings(inputs["pixel_values"] + step)
        average.update()
        now = [statistic.clone() for statistic in statistics]
        expected = now if expected is None else [0.75 * e + 0.25 * n for e, n in zip(expected, now, strict=True)]
    with average.applied():
        assert all(torch.allclose(s, e) for s, e in zip(statistics, expected, strict=True))
    assert all(torch.equal(s, n) for s, n in zip(statistics, now, strict=True))
    for other in (make("unet"), make("sf_recsam", learned_corrector=True)):
        assert train.batch_statistics(other) == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--model sf_recsam --config learned_corrector=true", "comes in a second stage, by --train_corrector"),
        ("--model unet --prompt click", "Expected box for a U-Net, got click"),
    ],
)
def test_flags_that_do_not_go_together(flags, message, capsys):
    with pytest.raises(SystemExit):
        parse_args(["--model_name_or_path", "a", "--dataset_name", "b", "--output_dir", "c", *flags.split()])
    assert message in capsys.readouterr().err


def test_training_goes_on_from_a_baseline(run, sam_folder, tmp_path):
    flags = ["--max_train_steps", 1, "--num_train_images", 1, "--num_eval_images", 1]
    folder = run("unet", *flags)
    args = f"--model_name_or_path {folder} --dataset_name phantoms --phantom_size 64 --output_dir {tmp_path / 'more'}"
    args = [*args.split(), *map(str, flags), "--num_points", "200", "--evaluation_size", "32"]
    train.main([*args, "--method", "unet"])  # the flag's other name
    assert type(load_model(tmp_path / "more")) is UNetModel
    with pytest.raises(ValueError, match="Expected --model unet, which .* was trained with, got imedsam"):
        train.main(args)
    with pytest.raises(ValueError, match="Expected --model unet, which .* was trained with, got unet_without_prompt"):
        train.main([*args, "--model", "unet_without_prompt"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--model nnunet", "argument --model/--method: invalid choice: 'nnunet'"),
        ("--model unet --config lora_rank=4", "Unknown configuration key 'lora_rank'"),
        ("--model unet --config image_size=64", "image_size has a flag of its own"),
        ("--model unet --config box_channel=false", "Expected box_channel True for this method, got False"),
        ("--model sam_decoder --config implicit_decoder=true", "Expected implicit_decoder False for this method"),
    ],
)
def test_wrong_flags_are_refused(capsys, flags, message):
    with pytest.raises(SystemExit):
        parse_args(["--model_name_or_path", "sam", "--dataset_name", "d", "--output_dir", "o", *flags.split()])
    assert message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sam_decoder_box_mask", "unet"])
def test_two_processes_are_one_with_the_double_batch(sam_folder, tmp_path, method):
    flags = "--num_train_epochs 2 --learning_rate 3e-3 --per_device_train_batch_size".split()
    one, two = tmp_path / "one", tmp_path / "two"
    train.main(method_arguments(sam_folder, one, method, [*flags, 4]))
    command = [*TWO_PROCESSES, "imedsam.training.train"]
    command += method_arguments(sam_folder, two, method, [*flags, 2])
    subprocess.run(command, check=True, env=environment() | {"ACCELERATE_USE_CPU": "true"})
    one, two = read(one), read(two)
    for a, b in zip(one["history"], two["history"], strict=True):
        assert a["step"] == b["step"] and a["loss"] == pytest.approx(b["loss"], abs=1e-5)
    assert one["validation"] == pytest.approx(two["validation"], abs=1e-5)


# Prediction


@pytest.mark.parametrize("method", ["sam_decoder_box_mask", "convolutional", "unet"])
def test_files_are_segmented_with_a_baseline(make, processor, inputs, tmp_path, method):
    model = make(method).eval()
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    image = tmp_path / "image.png"
    Image.effect_noise((50, 40), 60).convert("RGB").save(image)
    args = f"predict --model {tmp_path / 'model'} --image {image} --box 5 5 30 20 -o {tmp_path / 'out'}"
    result = CliRunner().invoke(app, args.split())
    assert result.exit_code == 0, result.output
    with Image.open(tmp_path / "out" / "image_mask.png") as mask:
        assert mask.size == (50, 40)
    pipeline = load_pipeline(tmp_path / "model")
    with Image.open(image) as picture:
        logits = pipeline(picture, input_boxes=[[5, 5, 30, 20]]).logits
        encoded = processor(picture, input_boxes=[[[5, 5, 30, 20]]])
    assert type(pipeline.model) is type(model) and logits.shape == (1, 1, 40, 50)
    with torch.no_grad():
        embeddings = model.get_image_embeddings(encoded["pixel_values"], encoded["reshaped_input_sizes"])
        field = model.get_mask_field(embeddings, encoded["input_boxes"])
    region = processor.get_image_regions(encoded["original_sizes"], encoded["reshaped_input_sizes"])
    assert_close(torch.from_numpy(logits), field.render((40, 50), region).logits[0], atol=1e-3, rtol=1e-3)


def test_box_mask_models_are_not_taken_for_plain_ones(make, tmp_path):
    model = make("sam_decoder_box_mask")
    model.save_adapter(tmp_path)
    with pytest.raises(ValueError, match="Expected a checkpoint of type 'imedsam' at .*'imedsam_box_mask'"):
        IMedSamModel.from_pretrained(tmp_path)
    assert type(load_model(tmp_path)) is BoxMaskModel


@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_samples_of_its_masks(make, inputs, method):
    """Dropout's where there are implicit fields, else jittered boxes', which a U-Net without a prompt ignores."""
    model, sizes = make(method).eval(), torch.tensor([[64, 64]] * 2)
    kind = default_samples(model)
    assert kind == ("dropout" if method.startswith("imedsam") else "prompts")
    with torch.no_grad():
        embeddings = model.get_image_embeddings(inputs["pixel_values"])
    samples = sample_masks(model, embeddings, {"input_boxes": inputs["input_boxes"]}, sizes, (16, 16), kind=kind)
    assert samples.shape == (5, 2, 2, 1, 16, 16)
    assert (samples.var(dim=0).amax(dim=(-3, -2, -1)) > 1e-9).all() == (method != "unet_without_prompt")

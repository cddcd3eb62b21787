"""What is published: complete, loadable by others, and without a word of the machine and the people it came from."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState, GradientState
from clean_site import make_site, run_in_site
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from imedsam import IMedSamModel, IMedSamPipeline
from imedsam.training import train
from imedsam.training.baselines import load_pipeline
from imedsam.training.cli import app
from imedsam.training.evaluation_report import evaluate_to_folder
from imedsam.training.examples import load_examples
from imedsam.training.model_card import Publication, shown_name
from imedsam.training.publish import prepare_folder
from imedsam.training.remote_code import collect_modules, flatten_imports
from imedsam.training.report import weights_hash

SMALL = "--config coarse_widths=[32,32] fine_widths=[32,32] coarse_features=16 fine_head_width=16 selection_lattice=8"
BOX = [8.0, 12.0, 50.0, 44.0]


@pytest.fixture(scope="module")
def trained(sam_folder, tmp_path_factory):
    """A training's folder, and the report of an evaluation of it."""
    folder = tmp_path_factory.mktemp("somebody") / "lesions"
    flags = f"--model_name_or_path {sam_folder} --dataset_name phantoms --output_dir {folder} --image_size 64 "
    flags += "--phantom_size 64 --num_train_images 4 --num_eval_images 2 --num_points 100 --evaluation_size 32 "
    train.main([*flags.split(), *"--num_train_epochs 1 --per_device_train_batch_size 2".split(), *SMALL.split()])
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    evaluate_to_folder(
        str(folder), "phantoms", folder.parent / "report", num_images=3, sizes=(None, 64), box_jitters=(0, 0.1)
    )
    AcceleratorState._reset_state(reset_partial_state=True)
    return folder


def publish(*arguments, model, license="cc-by-nc-4.0"):
    command = ["publish", "--model", model, "--repo", "somebody/lesions", "--license", license, *arguments]
    return CliRunner().invoke(app, list(map(str, command)))


def prepare(trained, output, *arguments):
    """A dry run's folder."""
    result = publish("--dry-run", "-o", output, *arguments, model=trained)
    assert result.exit_code == 0, result.output
    assert f"What would be is in {output}" in " ".join(result.output.split())
    return output


def words(result):
    return " ".join(result.output.replace("│", " ").split())


def image():
    return load_examples("phantoms", "test", num_images=1, image_size=64)[0]["image"]


def masks(pipeline):
    return pipeline(image(), input_boxes=[BOX]).logits


def test_a_whole_model_needs_nothing_else(trained, tmp_path):
    folder = prepare(trained, tmp_path / "out")
    names = {path.name for path in folder.iterdir()}
    assert names == {"README.md", "config.json", "metrics.json", "model.safetensors", "processor_config.json"}
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in folder.iterdir())
    expected = masks(load_pipeline(trained))
    np.testing.assert_allclose(masks(IMedSamPipeline.from_pretrained(folder)), expected, atol=1e-4)


def test_lora_is_merged_in_float32(trained, tmp_path):
    """In bfloat16 its update would drown in the rounding of the weights."""
    half = IMedSamModel.from_pretrained(trained, dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "lesions")
    for name in ("processor_config.json", "metrics.json"):
        shutil.copy(trained / name, tmp_path / "lesions")
    metrics = json.loads((trained / "metrics.json").read_text())
    metrics["weights"] = weights_hash(str(tmp_path / "lesions"))
    (tmp_path / "lesions" / "metrics.json").write_text(json.dumps(metrics))
    published = load_file(prepare(tmp_path / "lesions", tmp_path / "out") / "model.safetensors")
    query = half.vision_encoder.layers[0].attn.qkv.q_proj
    lora_a, lora_b = query.lora_A["default"].weight, query.lora_B["default"].weight
    expected = query.base_layer.weight.double() + query.scaling["default"] * (lora_b.double() @ lora_a.double())
    merged = published["vision_encoder.layers.0.attn.qkv.q_proj.weight"]
    assert merged.dtype == torch.float32
    torch.testing.assert_close(merged.double(), expected, atol=1e-7, rtol=1e-6)
    assert not torch.equal(expected, expected.bfloat16().double())


def test_an_adapter_is_what_was_trained(trained, sam_folder, tmp_path):
    result = publish("--adapter", "--dry-run", "-o", tmp_path / "local", model=trained)
    assert result.exit_code == 2 and not (tmp_path / "local").exists()
    assert f"an adapter whose SAM others find on the Hub, got one on {sam_folder}".replace(" ", "") in words(
        result
    ).replace(" ", "")
    folder = prepare(trained, tmp_path / "out", "--adapter", "--base-model", "somebody/sam")
    names = {path.name for path in folder.iterdir()}
    assert names >= {"adapter_config.json", "adapter_model.safetensors", "config.json", "processor_config.json"}
    assert "model.safetensors" not in names
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "somebody/sam"
    assert "base_model: somebody/sam" in (folder / "README.md").read_text()
    loaded = IMedSamModel.from_pretrained(folder, base_model_name_or_path=sam_folder)
    expected = IMedSamModel.from_pretrained(trained)
    values = loaded.state_dict()
    for key, value in expected.state_dict().items():
        if "original_module." not in key or "prompt_encoder" in key:  # which is SAM's, where others idle
            assert torch.equal(values[key], value), key


def test_nothing_tells_whose_images_and_which_machine(trained, tmp_path):
    """No path, and of the objects their means alone: a file's name may be a patient's."""
    report = trained.parent / "report"
    folder = prepare(trained, tmp_path / "out", "--report", report, "--with-code")
    objects = [row["name"] for row in json.loads((trained / "metrics.json").read_text())["validation_objects"]]
    assert len(objects) == 2
    for path in folder.iterdir():
        if path.suffix in (".json", ".md"):
            text = path.read_text()
            assert str(trained.parent) not in text and "/tmp" not in text, path
            assert not any(name in text for name in objects), path


def test_two_models_of_one_name_and_no_path(trained, tmp_path):
    """They are told apart by their folders in a report, which nobody else is to know."""
    other = tmp_path / "elsewhere" / "lesions"
    shutil.copytree(trained, other)
    evaluate_to_folder(str(trained), "phantoms", tmp_path / "report", num_images=1, compare=str(other))
    AcceleratorState._reset_state(reset_partial_state=True)
    folder = prepare(trained, tmp_path / "out", "--report", tmp_path / "report")
    text = "".join(path.read_text() for path in folder.iterdir() if path.suffix in (".json", ".md"))
    assert str(tmp_path) not in text and str(trained.parent) not in text
    evaluation = json.loads((folder / "evaluation_1.json").read_text())
    names = list(evaluation["settings"][0]["methods"])
    assert names == ["this model", "the other model", "filled box", "inscribed ellipse"]
    assert {row["against"] for row in evaluation["settings"][0]["comparisons"]} == set(names[1:])


def test_a_local_folder_is_no_name_on_the_hub(trained, tmp_path, monkeypatch):
    """Whatever folder the command is given in."""
    moved = tmp_path / "moved"
    shutil.copytree(trained, moved)
    report = json.loads((moved / "metrics.json").read_text())
    report["arguments"] |= {"model_name_or_path": "checkpoints/sam", "dataset_name": "data/hospital_patients"}
    (moved / "metrics.json").write_text(json.dumps(report))
    path = moved / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": "checkpoints/sam"}))
    monkeypatch.chdir(tmp_path)
    result = publish("--adapter", "--dry-run", "-o", tmp_path / "out", model=moved)
    assert result.exit_code == 2 and "got one on checkpoints/sam" in words(result)
    card = (prepare(moved, tmp_path / "out") / "README.md").read_text()
    assert "checkpoints/sam" not in card and "data/hospital" not in card and "`hospital_patients`" in card
    assert "base_model" not in card and "datasets:" not in card
    (moved / "metrics.json").write_text(
        json.dumps({**report, "on_hub": ["checkpoints/sam", "data/hospital_patients"]})
    )
    head = yaml.safe_load((prepare(moved, tmp_path / "again") / "README.md").read_text().split("---\n")[1])
    assert head["base_model"] == "checkpoints/sam" and head["datasets"] == ["data/hospital_patients"]
    assert shown_name(r"C:\Users\jane\data\busi") == "busi"


def test_a_folder_of_the_name_of_the_sam_is_not_taken_for_it(trained, sam_folder, tmp_path, monkeypatch):
    """It has no commit for the adapter to note."""
    shutil.copytree(sam_folder, tmp_path / "somebody" / "sam")
    monkeypatch.chdir(tmp_path)
    publication = Publication("somebody/lesions", "mit", base_model="somebody/sam")
    with pytest.raises(ValueError, match="Expected somebody/sam to be the SAM's name on the Hub alone, got"):
        prepare_folder(str(trained), tmp_path / "out", publication, adapter=True)
    assert not (tmp_path / "out").exists()


def test_the_card(trained, tmp_path):
    report, picture = trained.parent / "report", tmp_path / "shown.png"
    exif = Image.Exif()
    exif[0x010E] = "a patient's name"
    Image.new("RGB", (20, 10)).save(picture, exif=exif)
    said = ["--task", "lesions in drawings", "--data-terms", "drawn, free for all", "--picture", picture]
    folder = prepare(trained, tmp_path / "out", "--report", report, *said)
    card = (folder / "README.md").read_text()
    head = yaml.safe_load(card.split("---\n")[1])
    assert head["license"] == "cc-by-nc-4.0" and head["library_name"] == "imedsam"
    evaluation = json.loads((report / "metrics.json").read_text())
    means = evaluation["settings"][0]["methods"]["lesions"]["mean"]
    (results,) = (entry["results"] for entry in head["model-index"])
    values = {metric["type"]: metric["value"] for metric in results[0]["metrics"]}
    assert values["dice"] == round(100 * means["dice"], 2) and values["hd95"] == round(means["hd95"], 2)
    assert results[0]["dataset"]["split"] == "test"
    assert len(results) == 2 and results[1]["dataset"]["config"] == "native size, boxes jittered by 10 %"
    jittered = evaluation["settings"][1]["methods"]["lesions"]["mean"]
    assert {metric["type"]: metric["value"] for metric in results[1]["metrics"]}["dice"] == round(
        100 * jittered["dice"], 2
    )
    assert jittered["dice"] != means["dice"]
    for text in (
        "lesions in drawings",
        "drawn, free for all",
        "![What it gives](picture.png)",
        "intended use",
        "Limits",
    ):
        assert text in card
    for setting in evaluation["settings"]:
        assert f"| phantoms, test (3 images), {setting['title']} |" in card
        for name, method in setting["methods"].items():
            values = [100 * value for value in (method["mean"]["dice"], *method["interval"]["dice"])]
            row = "| {} | {:.1f} [{:.1f}, {:.1f}] |".format("this model" if name == "lesions" else name, *values)
            assert row in card
    with Image.open(folder / "picture.png") as sent:
        assert sent.size == (20, 10) and not sent.getexif()
    usage = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    assert len([line for line in usage.splitlines() if line]) == 5
    image().save(tmp_path / "image.png")
    usage = usage.replace("somebody/lesions", str(folder)).replace("image.png", str(tmp_path / "image.png"))
    names = {}
    exec(usage, names)
    assert names["mask"].shape == (64, 64)


def test_the_card_of_a_corrected_evaluation(trained, tmp_path):
    """It says so, in `model-index` too, and how to get such masks."""
    report = json.loads((trained.parent / "report" / "metrics.json").read_text())
    titles = [f"{setting['title']}, corrected" for setting in report["settings"]]
    settings = [{**setting, "title": title} for setting, title in zip(report["settings"], titles, strict=True)]
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "metrics.json").write_text(json.dumps({**report, "correct": True, "settings": settings}))
    reports = ["--report", trained.parent / "report", "--report", tmp_path / "report"]
    card = (prepare(trained, tmp_path / "out", *reports) / "README.md").read_text()
    (results,) = (entry["results"] for entry in yaml.safe_load(card.split("---\n")[1])["model-index"])
    configs = [result["dataset"].get("config") for result in results]
    assert configs == [None, report["settings"][1]["title"], *titles[:2]]  # of the first size
    assert all(f"| phantoms, test (3 images), {title} |" in card for title in titles)
    assert "as `correct=` does above" in card
    usage = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    assert 'class_labels=[0], correct="dropout")' in usage
    image().save(tmp_path / "image.png")
    names = {}
    exec(usage.replace("somebody/lesions", str(trained)).replace("image.png", str(tmp_path / "image.png")), names)
    expected = load_pipeline(trained)
    expected.set_image(image())
    np.testing.assert_array_equal(
        names["mask"], expected.predict([BOX], class_labels=[0], correct="dropout").masks[0, 0]
    )
    plain = (prepare(trained, tmp_path / "plain", *reports[:2]) / "README.md").read_text()
    assert "correct=" not in plain


def test_the_card_names_the_installation_that_the_readme_does(trained, tmp_path):
    card = (prepare(trained, tmp_path / "out") / "README.md").read_text()
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    assert all("`pip install` the path of" in text and "pip install imedsam" not in text for text in (card, readme))


def test_the_card_of_a_click_model(trained, tmp_path):
    """A click is worth no box."""
    shutil.copytree(trained, tmp_path / "clicks")
    path = tmp_path / "clicks" / "metrics.json"
    report = json.loads(path.read_text())
    path.write_text(json.dumps({**report, "arguments": {**report["arguments"], "prompt": "click"}}))
    card = " ".join((prepare(tmp_path / "clicks", tmp_path / "out") / "README.md").read_text().split())
    assert "the ellipse inscribed in it are what the object's box is worth" in card
    assert "the prompt alone is worth" not in card
    card = " ".join((prepare(trained, tmp_path / "boxes") / "README.md").read_text().split())
    assert "the ellipse inscribed in it are what the prompt alone is worth" in card


def test_the_code_comes_with_it(trained, tmp_path):
    """Loaded in a process that has transformers, peft, torch, numpy and pillow alone, and saved again."""
    folder = prepare(trained, tmp_path / "out", "--with-code")
    pixels = np.asarray(image().convert("RGB"))
    Image.fromarray(pixels).save(tmp_path / "image.png")
    site = make_site(tmp_path / "site", "transformers", "peft", "torch", "numpy", "pillow")
    card = (folder / "README.md").read_text()
    usage = re.findall(r"```python\n(.*?)```", card, re.DOTALL)[1].replace("somebody/lesions", str(folder))
    usage = usage.replace("image.png", str(tmp_path / "image.png"))
    code = f"""
import importlib.util, numpy, torch
assert importlib.util.find_spec("imedsam") is None and importlib.util.find_spec("monai") is None
{usage}
numpy.save({str(tmp_path / "masks.npy")!r}, outputs.pred_masks.detach().numpy())
print(tuple(masks[0].shape), type(model).__module__.split(".")[0])
model.save_pretrained({str(tmp_path / "again")!r})
processor.save_pretrained({str(tmp_path / "again")!r})
again = AutoModel.from_pretrained({str(tmp_path / "again")!r}, trust_remote_code=True)
assert torch.equal(again(**inputs).pred_masks, outputs.pred_masks)
"""
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    assert run_in_site(site, code, **environment).strip() == "(1, 1, 64, 64) transformers_modules"
    pipeline = IMedSamPipeline.from_pretrained(folder)
    inputs = pipeline.processor(pixels, input_boxes=[[BOX]], return_tensors="pt")
    with torch.no_grad():
        expected = pipeline.model(**inputs).pred_masks.numpy()
    np.testing.assert_allclose(np.load(tmp_path / "masks.npy"), expected, atol=1e-4)


def test_without_its_code_nothing_says_that_it_comes_along(trained, tmp_path):
    """Also where it did, for the model that is published anew."""
    shutil.copytree(trained, tmp_path / "lesions")
    code = prepare(trained, tmp_path / "code", "--with-code")
    for name in ("config.json", "processor_config.json"):
        assert "auto_map" in (code / name).read_text()
        merged = {
            **json.loads((trained / name).read_text()),
            "auto_map": json.loads((code / name).read_text())["auto_map"],
        }
        if "image_processor" in merged:  # which transformers reads by itself
            merged["image_processor"] = json.loads((code / name).read_text())["image_processor"]
            assert "auto_map" in merged["image_processor"]
        (tmp_path / "lesions" / name).write_text(json.dumps(merged))
    folder = prepare(tmp_path / "lesions", tmp_path / "out")
    assert not any("auto_map" in path.read_text() for path in folder.glob("*.json"))


def test_the_card_of_an_adapter(trained, tmp_path):
    folder = prepare(trained, tmp_path / "out", "--adapter", "--base-model", "somebody/sam")
    head, body = (folder / "README.md").read_text().removeprefix("---\n").split("\n---\n", 1)
    head = yaml.safe_load(head)
    assert head["base_model"] == "somebody/sam" and head["base_model_relation"] == "adapter" and "peft" in head["tags"]
    sha256 = json.loads((folder / "config.json").read_text())["base_model_sha256"]
    assert f"`{sha256}`" in body and 'model.load_adapter("somebody/lesions", "name")' in body
    whole = (prepare(trained, tmp_path / "whole", "--base-model", "somebody/sam") / "README.md").read_text()
    assert "base_model_relation: finetune" in whole and sha256 not in whole


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("metrics.json", "{", "Expected JSON in"),
        ("metrics.json", "[]", "Expected an object in"),
        ("metrics.json", "{}", "Expected the metrics.json of a training in"),
        ("config.json", {"from_the_future": 1}, "Expected a configuration of this version in"),
        ("config.json", {"lora_rank": "many"}, "Expected a configuration of this version in"),
        ("model.safetensors", None, "Expected the weights in"),
    ],
)
def test_a_folder_that_was_changed_is_refused(trained, tmp_path, name, content, message):
    folder = tmp_path / "lesions"
    shutil.copytree(trained, folder)
    if content is None:  # of another training
        tensors = load_file(folder / name)
        save_file({key: value + 1 for key, value in tensors.items()}, folder / name, {"format": "pt"})
    elif isinstance(content, dict):
        (folder / name).write_text(json.dumps({**json.loads((folder / name).read_text()), **content}))
    else:
        (folder / name).write_text(content)
    result = publish("--dry-run", "-o", tmp_path / "out", model=folder)
    assert result.exit_code == 2 and message in words(result)
    assert not (tmp_path / "out").exists()


def test_imports_are_flattened():
    source = "from imedsam.a.b import (\n    c,\n)\nimport torch\n\ndef f():\n    from imedsam.d import e\n"
    expected = "from .b import (\n    c,\n)\nimport torch\n\ndef f():\n    from .d import e\n"
    assert flatten_imports(source) == expected
    with pytest.raises(ValueError, match="Expected a module of its own file, got imedsam.training"):
        collect_modules({"imedsam.training"})


def test_an_adapter_and_a_baseline_have_no_code_of_their_own(trained, tmp_path):
    arguments = ["--adapter", "--base-model", "somebody/sam", "--with-code", "--dry-run", "-o", tmp_path / "out"]
    result = publish(*arguments, model=trained)
    assert result.exit_code == 2 and "Expected a whole I-MedSAM to publish with its code" in words(result)
    assert not (tmp_path / "out").exists()


def test_what_is_no_training_and_no_report_is_refused(trained, sam_folder, tmp_path):
    result = publish("--dry-run", "-o", tmp_path / "out", model=sam_folder)
    assert result.exit_code == 2 and "Expected the metrics.json of a finished training" in words(result)
    result = publish("--dry-run", "-o", tmp_path / "out", "--report", trained, model=trained)
    assert result.exit_code == 2 and "Expected the report of an evaluation in" in words(result)
    other = tmp_path / "other"
    other.mkdir()
    report = json.loads((trained.parent / "report" / "metrics.json").read_text())
    (other / "metrics.json").write_text(json.dumps({**report, "weights": "0" * 64}))
    result = publish("--dry-run", "-o", tmp_path / "out", "--report", other, model=trained)
    assert result.exit_code == 2 and "Expected a report on the weights in" in words(result)
    for arguments, message in (
        ([], "add -o FOLDER"),
        (["-o", trained], "Expected a new folder"),
        (["-o", tmp_path / "out", "--repo", "somebody/my lesions"], "Expected --repo as user/name"),
        (["-o", tmp_path / "out", "--repo", "lesions"], "Expected --repo as user/name"),
        (["-o", tmp_path / "out", "--repo", "a--b/.."], "Expected --repo as user/name"),
        (["-o", tmp_path / "out", "--base-model", "/home/jane/sam"], "Expected --base-model as user/name"),
        (["-o", tmp_path / "out", "--license", "My own: none"], "Expected --license as the Hub names it"),
        (["-o", tmp_path / "out", "--license", "Apache-2.0"], "in lower case, such as"),
        (["-o", tmp_path / "out", "--license", "."], "Expected --license as the Hub names it"),
        (["-o", tmp_path / "out", "--revision", "bad rev"], "Expected --revision as the name of a branch"),
        (["-o", tmp_path / "out", "--revision", "-x"], "Expected --revision as the name of a branch"),
        (["-o", tmp_path / "out", "--revision", "refs/pr/1"], "Expected --revision as the name of a branch"),
        (["-o", tmp_path / "out", "--revision", "a..b"], "Expected --revision as the name of a branch"),
        (["-o", tmp_path / "out", "--revision", "a/"], "Expected --revision as the name of a branch"),
        (["-o", trained / "out"], "Expected --output outside of the model's folder"),
        (["-o", tmp_path / "out", "--picture", tmp_path / "nowhere.png"], "Expected an image at"),
    ):
        result = publish("--dry-run", *arguments, model=trained)
        assert result.exit_code == 2 and message in words(result), words(result)
    assert not (tmp_path / "out").exists()

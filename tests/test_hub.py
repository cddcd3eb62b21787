"""Publishing and loading with the real client, against a Hub on this machine; every command in a fresh process."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from accelerate.state import AcceleratorState, GradientState
from drawn_folders import make_processor
from hub_server import Blob, HubServer, Repo
from PIL import Image
from transformers import SamModel
from typer.testing import CliRunner

from imedsam.training import train
from imedsam.training.baselines import load_pipeline
from imedsam.training.cli import app

pytestmark = pytest.mark.slow

REPO = "tester/lesions"
LIVER = Blob(b"weights", lfs=True)
BOX = [8.0, 12.0, 50.0, 44.0]
IMEDSAM = [sys.executable, "-m", "imedsam.training.cli"]


@pytest.fixture(scope="module")
def trained(sam_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "lesions"
    flags = f"--model_name_or_path {sam_folder} --dataset_name phantoms --output_dir {folder} --image_size 64 "
    flags += "--phantom_size 64 --num_train_images 4 --num_eval_images 2 --num_points 100 --evaluation_size 32 "
    flags += "--num_train_epochs 1 --config coarse_widths=[32,32] fine_widths=[32,32] selection_lattice=8"
    train.main(flags.split())
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return folder


@pytest.fixture
def hub():
    with HubServer() as server:
        yield server


def run(hub, home, command, token="hf_test", endpoint=None, **environment):
    """A command in a process that knows this Hub alone; its exit status and what it says, in one line."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    kept |= {"HF_ENDPOINT": endpoint or hub.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    kept |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1"}
    kept |= {"COLUMNS": "500", **({"HF_TOKEN": token} if token else {}), **environment}
    done = subprocess.run(command, env=kept, capture_output=True, text=True)
    return done.returncode, " ".join((done.stdout + done.stderr).replace("│", " ").split())


def publish(hub, home, trained, *arguments, repo=REPO, **options):
    command = [*IMEDSAM, "publish", "--model", trained, "--repo", repo, "--license", "mit", *arguments]
    return run(hub, home, list(map(str, command)), **options)


def masks_of(hub, home, name, path, **options):
    """Logits of the model of that name on the Hub, loaded in a fresh process."""
    image = "Image.fromarray((np.arange(64 * 64 * 3) % 251).astype(np.uint8).reshape(64, 64, 3))"
    code = f"""
import numpy as np
from PIL import Image
from imedsam import IMedSamPipeline
pipeline = IMedSamPipeline.from_pretrained({name!r}, **{options.pop("arguments", {})})
np.save({str(path)!r}, pipeline({image}, input_boxes=[{BOX}]).logits)
"""
    status, said = run(hub, home, [sys.executable, "-c", code], **options)
    assert status == 0, said
    return np.load(path)


def expected_masks(trained):
    from PIL import Image

    image = Image.fromarray((np.arange(64 * 64 * 3) % 251).astype(np.uint8).reshape(64, 64, 3))
    return load_pipeline(trained)(image, input_boxes=[BOX]).logits


def read_folder(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def test_a_model_is_sent_and_loaded(hub, trained, sam_folder, tmp_path):
    status, said = publish(hub, tmp_path / "home", trained, "--private", "-o", tmp_path / "sent")
    assert status == 0 and f"Sent to {hub.endpoint}/{REPO}/commit/" in said, said
    sent = hub.files(REPO)
    sent.pop(".gitattributes")
    assert sent == read_folder(tmp_path / "sent") and len(sent) == 5
    assert hub.repos[REPO].private and len(hub.repos[REPO].commits) == 2  # the first is the Hub's own
    expected = expected_masks(trained)
    found = masks_of(hub, tmp_path / "other", REPO, tmp_path / "masks.npy")
    np.testing.assert_allclose(found, expected, atol=1e-4)

    status, said = publish(hub, tmp_path / "home", trained)
    assert status == 2 and f"Expected a new repository, got {REPO}, which exists: add --update" in said
    assert len(hub.repos[REPO].commits) == 2
    status, said = publish(hub, tmp_path / "home", tmp_path / "no training")  # which is asked before
    assert status == 2 and f"Expected a new repository, got {REPO}, which exists: add --update" in said
    hub.repos["tester/open"] = replace(hub.repos[REPO], id="tester/open", private=False)
    status, said = publish(hub, tmp_path / "home", trained, "--private", "--update", repo="tester/open")
    assert status == 2 and "Expected a private repository, got tester/open, which all can see" in said
    # An adapter on top of the whole model: weights that stayed would be loaded in its place.
    push_sam(hub, tmp_path / "home", sam_folder)
    status, said = publish(
        hub, tmp_path / "home", trained, "--update", "--adapter", "--base-model", "tester/sam", "--revision", "adapter"
    )
    assert status == 0, said
    assert "model.safetensors" in hub.files(REPO) and "model.safetensors" not in hub.files(REPO, "adapter")
    assert "adapter_model.safetensors" in hub.files(REPO, "adapter")
    status, said = publish(hub, tmp_path / "home", trained, "--revision", "adapter")
    assert status == 2 and "add --update" in said and "adapter_model.safetensors" in hub.files(REPO, "adapter")


def push_sam(hub, home, folder):
    code = f"from transformers import SamModel; SamModel.from_pretrained({str(folder)!r}).push_to_hub('tester/sam')"
    status, said = run(hub, home, [sys.executable, "-c", code])
    assert status == 0, said


def test_an_adapter_finds_its_sam_on_the_hub_and_no_other(hub, trained, sam_folder, tmp_path):
    other = SamModel.from_pretrained(sam_folder)
    other.vision_encoder.pos_embed.data += 0.1
    other.save_pretrained(tmp_path / "other sam")
    push_sam(hub, tmp_path / "home", tmp_path / "other sam")
    adapter = ["--adapter", "--base-model", "tester/sam"]
    status, said = publish(hub, tmp_path / "home", trained, *adapter)
    assert status == 2 and "Expected tester/sam to be the SAM of the adapter" in said and REPO not in hub.repos
    status, said = publish(hub, tmp_path / "home", trained, "--adapter", "--base-model", "tester/nothing")
    assert status == 2 and "Expected tester/nothing, the SAM of the adapter, on the Hub" in said
    push_sam(hub, tmp_path / "home", sam_folder)
    commit = hub.repos["tester/sam"].branches["main"]
    status, said = publish(hub, tmp_path / "home", trained, *adapter)
    assert status == 0, said
    assert json.loads(hub.files(REPO)["adapter_config.json"])["revision"] == commit

    expected = expected_masks(trained)
    found = masks_of(hub, tmp_path / "other", REPO, tmp_path / "masks.npy")
    np.testing.assert_allclose(found, expected, atol=1e-6)
    requests = len(hub.requests)
    again = masks_of(hub, tmp_path / "other", REPO, tmp_path / "masks.npy", HF_HUB_OFFLINE="1")
    assert np.array_equal(again, found) and len(hub.requests) == requests
    push_sam(hub, tmp_path / "home", tmp_path / "other sam")  # a later commit changes nothing for the adapter
    np.testing.assert_allclose(masks_of(hub, tmp_path / "third", REPO, tmp_path / "masks.npy"), expected, atol=1e-6)


def test_a_pipeline_is_of_one_revision(hub, trained, tmp_path):
    """The processor too, and where a token is needed."""
    shutil.copytree(trained, tmp_path / "padded")
    path = tmp_path / "padded" / "processor_config.json"
    path.write_text(path.read_text().replace('"stretch"', '"longest_side"'))
    for folder, flags in ((trained, ["--private"]), (tmp_path / "padded", ["--revision", "v2", "--update"])):
        status, said = publish(hub, tmp_path / "home", folder, *flags)
        assert status == 0, said
    code = f"""
from imedsam import IMedSamPipeline
for revision in ("main", "v2"):
    pipeline = IMedSamPipeline.from_pretrained({REPO!r}, revision=revision, token="hf_test")
    print(pipeline.processor.image_processor.resize_mode)
"""
    status, said = run(hub, tmp_path / "other", [sys.executable, "-c", code], token=None)
    assert status == 0 and "stretch longest_side" in said, said


def test_transformers_own_words(hub, trained, tmp_path):
    code = f"""
import torch
from imedsam import IMedSamModel, IMedSamProcessor
from transformers import AutoModel, AutoProcessor
model = IMedSamModel.from_pretrained({str(trained)!r}).merge_and_unload()
print(model.push_to_hub({REPO!r}, private=True))
IMedSamProcessor.from_pretrained({str(trained)!r}).push_to_hub({REPO!r})
loaded = AutoModel.from_pretrained({REPO!r})
assert type(loaded) is IMedSamModel and type(AutoProcessor.from_pretrained({REPO!r})) is IMedSamProcessor
for key, value in model.state_dict().items():
    assert torch.equal(loaded.state_dict()[key], value), key
"""
    status, said = run(hub, tmp_path / "home", [sys.executable, "-c", code])
    assert status == 0, said
    assert {"config.json", "model.safetensors", "processor_config.json", "README.md"} <= hub.files(REPO).keys()


def test_an_adapter_is_pushed(hub, sam_folder, tmp_path):
    push_sam(hub, tmp_path / "home", sam_folder)
    code = """
import copy
import torch
from imedsam import IMedSamModel
small = {"coarse_widths": [32, 32], "fine_widths": [32, 32], "image_size": 64}
model = IMedSamModel.from_sam_pretrained("tester/sam", **small)
for parameters in model.parameter_parts().values():
    for parameter in parameters:
        torch.nn.init.normal_(parameter, std=0.1)
whole = copy.deepcopy(model).merge_and_unload()
whole.push_to_hub("tester/adapter", private=True, max_shard_size="50KB")  # is no longer there afterwards
print(model.push_adapter_to_hub("tester/adapter"))
loaded = IMedSamModel.from_pretrained("tester/adapter")
for key, value in model.get_adapter_state_dict().items():
    assert torch.equal(loaded.get_adapter_state_dict()[key], value), key
"""
    status, said = run(hub, tmp_path / "home", [sys.executable, "-c", code])
    assert status == 0 and f"{hub.endpoint}/tester/adapter/commit/" in said, said
    files = hub.files("tester/adapter")
    assert {"adapter_config.json", "adapter_model.safetensors", "config.json"} <= files.keys()
    assert not [name for name in files if name.startswith("model")] and hub.repos["tester/adapter"].private
    code = (
        f"from imedsam import IMedSamModel; m = IMedSamModel.from_sam_pretrained({str(sam_folder)!r}, image_size=64)"
    )
    status, said = run(hub, tmp_path / "home", [sys.executable, "-c", f"{code}; m.push_adapter_to_hub('tester/x')"])
    assert status == 1 and "Expected an adapter on a SAM from the Hub, got one on" in said
    assert "tester/x" not in hub.repos


def test_what_is_beside_an_adapter_stays(hub, trained, sam_folder, tmp_path):
    """As `push_to_hub` leaves it: the card, and adapters in folders of their own."""
    status, said = publish(hub, tmp_path / "home", trained)
    assert status == 0, said
    before = hub.files(REPO)
    hub.repos[REPO].commit("main", "another", {**hub.repos[REPO].find("main").files, "liver/model.safetensors": LIVER})
    status, said = push_adapter(hub, tmp_path / "home", sam_folder)
    assert status == 0, said
    files = hub.files(REPO)
    assert "model.safetensors" not in files and files["liver/model.safetensors"] == LIVER.data
    assert files.keys() > {"adapter_model.safetensors"} and files["config.json"] != before["config.json"]
    for name in ("README.md", "metrics.json", "processor_config.json"):
        assert files[name] == before[name]


def test_a_whole_model_takes_the_place_of_an_adapter(hub, from_sam, tmp_path):
    """And of weights in several files; adapters in folders of their own, and the card, stay."""
    model = from_sam()
    model.save_adapter(tmp_path / "adapter")
    files = {path.name: Blob(path.read_bytes()) for path in (tmp_path / "adapter").iterdir()}
    beside = {"liver/adapter_config.json": Blob(b"{}"), "README.md": Blob(b"# A card\n")}
    hub.repos[REPO] = repo = Repo(REPO, private=False)
    repo.commit("main", "adapter", {**files, **beside, "model-00001-of-00002.safetensors": LIVER})
    model.save_pretrained(tmp_path / "whole")
    merge = f"""
import torch
from imedsam import IMedSamModel
from transformers import AutoModel
model = IMedSamModel.from_pretrained({str(tmp_path / "whole")!r})
"""
    status, said = run(hub, tmp_path / "home", [sys.executable, "-c", f"{merge}\nmodel.push_to_hub({REPO!r})"])
    assert status == 1 and "got one with: merge_and_unload() first" in said and len(repo.commits) == 1
    merge += f"""
model.merge_and_unload().push_to_hub({REPO!r}, commit_message="Merged")
for auto in (AutoModel, IMedSamModel):
    loaded = auto.from_pretrained({REPO!r})
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
"""
    status, said = run(hub, tmp_path / "home", [sys.executable, "-c", merge])
    assert status == 0 and len(hub.repos[REPO].commits) == 2, said
    sent = hub.files(REPO)
    assert set(sent) - {".gitattributes"} == {"config.json", "model.safetensors", *beside}
    assert sent["README.md"].endswith(b"# A card\n") and sent["liver/adapter_config.json"] == b"{}"


def test_an_adapter_is_of_one_place(hub, from_sam, tmp_path):
    """Configuration and weights: of one revision, and of one folder in the repository."""
    one, two = from_sam(seed=1, id2label={0: "liver"}), from_sam(seed=2, id2label={0: "lung", 1: "heart"})
    hub.repos[REPO] = repo = Repo(REPO, private=False)
    for name, model in {"one": one, "two": two}.items():
        model.save_adapter(tmp_path / name)
    for branch, root, under in (("main", "one", "two"), ("v2", "two", "one")):
        files = {f"organs/{path.name}": Blob(path.read_bytes()) for path in (tmp_path / under).iterdir()}
        files |= {path.name: Blob(path.read_bytes()) for path in (tmp_path / root).iterdir()}
        repo.commit(branch, "adapters", files)
    code = f"""
import torch
from imedsam import IMedSamModel
from imedsam.training.baselines import load_model

def check(model, expected):
    assert model.config.id2label == expected.config.id2label, model.config.id2label
    for key, value in expected.get_adapter_state_dict().items():
        assert torch.equal(model.get_adapter_state_dict()[key], value), key

one, two = (IMedSamModel.from_pretrained({str(tmp_path)!r}, subfolder=name) for name in ("one", "two"))
assert one.config.id2label != two.config.id2label
for place, expected in (
    ({{}}, one),
    ({{"subfolder": "organs"}}, two),
    ({{"revision": "v2"}}, two),
    ({{"revision": "v2", "subfolder": "organs"}}, one),
):
    check(IMedSamModel.from_pretrained({REPO!r}, **place), expected)
    check(load_model({REPO!r}, **place), expected)
    for arguments in (place, {{"adapter_kwargs": place}}):
        model = IMedSamModel.from_pretrained({REPO!r})
        model.load_adapter({REPO!r}, "other", **arguments)
        model.set_adapter("other")
        check(model, expected)
model.load_adapter({str(tmp_path)!r}, "here", subfolder="two")
model.set_adapter("here")
check(model, two)
"""
    status, said = run(hub, tmp_path / "home", [sys.executable, "-c", code])
    assert status == 0, said


def test_commands_take_the_revision_that_they_are_told(hub, from_sam, tmp_path):
    """On the main branch there is no model."""
    model = from_sam(frequency_view=None)
    model.merge_and_unload().save_pretrained(tmp_path / "model")
    make_processor().save_pretrained(tmp_path / "model")
    hub.repos[REPO] = repo = Repo(REPO, private=False)
    repo.commit("main", "nothing", {})
    repo.commit("v2", "model", {path.name: Blob(path.read_bytes()) for path in (tmp_path / "model").iterdir()})
    Image.effect_noise((50, 40), 60).save(tmp_path / "image.png")
    commands = {
        "predict": ["--image", tmp_path / "image.png", "--box", 5, 5, 30, 20],
        "evaluate": ["--data", "phantoms", "--num-images", 1],
        "export": ["--format", "torch"],
        "convert": [],
    }
    for name, flags in commands.items():
        command = [*IMEDSAM, name, "-o", tmp_path / name, *flags, "--revision"]
        status, said = run(hub, tmp_path / "home", [*map(str, command), "main", "--model", REPO])
        assert status == 2 and f"at {REPO}, got" in said, said
        status, said = run(hub, tmp_path / "home", [*map(str, command), "v2", "--model", REPO])
        assert status == 0 and (tmp_path / name).is_dir(), said
        result = CliRunner().invoke(
            app, [*map(str, command[len(IMEDSAM) :]), "v2", "--model", str(tmp_path / "model")]
        )
        assert result.exit_code == 2 and "no --revision of what is here" in " ".join(result.output.split())


def push_adapter(hub, home, sam_folder, **options):
    """Of a model on a SAM that is said to be the Hub's."""
    code = f"""
from imedsam import IMedSamModel
model = IMedSamModel.from_sam_pretrained({str(sam_folder)!r}, image_size=64)
model.peft_config["default"].revision = 40 * "0"
model.push_adapter_to_hub({REPO!r})
"""
    return run(hub, home, [sys.executable, "-c", code], **options)


UNREACHED = pytest.mark.parametrize(
    "options, message",
    [
        ({"token": None}, "Expected a token to write to the Hub with, got none: `hf auth login`"),
        ({"token": "hf_wrong"}, "got status 401: the token is not known"),
        ({"endpoint": "http://127.0.0.1:9"}, "Expected to reach the Hub, got"),
        ({"HF_HUB_OFFLINE": "1"}, "got HF_HUB_OFFLINE=1: unset it to publish"),
    ],
    ids=["no token", "wrong token", "no network", "offline"],
)


@UNREACHED
def test_what_keeps_it_from_the_hub_is_named(hub, trained, tmp_path, options, message):
    status, said = publish(hub, tmp_path / "home", trained, **options)
    assert status == 2 and message in said
    assert REPO not in hub.repos


@UNREACHED
def test_what_keeps_an_adapter_from_the_hub_is_named(hub, sam_folder, tmp_path, options, message):
    status, said = push_adapter(hub, tmp_path / "home", sam_folder, **options)
    assert status == 1 and message in said.rpartition("Error: ")[2], said
    assert REPO not in hub.repos


def test_an_adapter_that_may_not_be_written_is_named(hub, sam_folder, tmp_path):
    hub.fail("POST", "/commit/", status=403)
    status, said = push_adapter(hub, tmp_path / "home", sam_folder)
    assert status == 1 and f"OSError: Expected the Hub to take {REPO}, got status 403: the token may not write" in said


@pytest.mark.parametrize("part", ["/lfs/", "/commit/"])
def test_a_failed_upload_leaves_nothing_half_made(hub, trained, tmp_path, part):
    hub.fail("PUT" if part == "/lfs/" else "POST", part, status=507)  # which the client does not try again
    command = [hub, tmp_path / "home", trained, "-o", tmp_path / "sent"]
    status, said = publish(*command)
    assert status == 2 and "try again" in said
    assert set(hub.files(REPO)) == {".gitattributes"} and not (tmp_path / "sent").exists()
    hub.heal()
    status, said = publish(*command)
    assert status == 0 and (tmp_path / "sent").is_dir(), said
    assert json.loads(hub.files(REPO)["config.json"])["model_type"] == "imedsam"
    assert len(hub.files(REPO)["model.safetensors"]) > 1e5


def test_a_failed_upload_leaves_no_branch(hub, trained, tmp_path):
    status, said = publish(hub, tmp_path / "home", trained)
    assert status == 0, said
    hub.fail("POST", "/commit/", status=507)
    other = ["--revision", "v2", "--task", "other lesions"]
    status, said = publish(hub, tmp_path / "home", trained, *other)
    assert status == 2 and set(hub.repos[REPO].branches) == {"main"}
    hub.heal()
    status, said = publish(hub, tmp_path / "home", trained, *other)
    assert status == 0 and set(hub.repos[REPO].branches) == {"main", "v2"}, said


@pytest.mark.parametrize("lost", ["cut", "fail"])
def test_an_upload_whose_answer_was_lost_is_one(hub, trained, tmp_path, lost):
    getattr(hub, lost)("POST", "/commit/", late=True, **({"status": 507} if lost == "fail" else {}))
    status, said = publish(hub, tmp_path / "home", trained)
    commit = hub.repos[REPO].branches["main"]
    assert status == 0 and f"Sent to {hub.endpoint}/{REPO}/commit/{commit}" in said, said
    assert len(hub.files(REPO)["model.safetensors"]) > 1e5


def test_what_another_one_commits_meanwhile_stays(hub, trained, tmp_path):
    """Between the look at the repository and the commit."""
    assert publish(hub, tmp_path / "home", trained)[0] == 0
    repo = hub.repos[REPO]
    others = {"README.md": Blob(b"another's")}
    hub.before("POST", "/commit/", lambda: repo.commit("main", "theirs", others))
    status, said = publish(hub, tmp_path / "home", trained, "--update", "--task", "other lesions")
    assert status == 2 and "something else was committed there meanwhile" in said
    assert hub.files(REPO) == {"README.md": b"another's"} and not hub.events


def test_an_upload_that_another_one_came_before_is_none(hub, trained, tmp_path):
    """With files of the same names."""
    hub.fail("POST", "/commit/", late=True, status=412)
    status, said = publish(hub, tmp_path / "home", trained)
    assert status == 2 and "got status 412: something else was committed there meanwhile" in said

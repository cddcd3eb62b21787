"""A trained model on the Hub: weights or adapter, processor, model card, metrics and a picture, in one commit."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, HTTPError, RevisionNotFoundError
from transformers.utils import ADAPTER_CONFIG_NAME

from imedsam.false_corrector import default_samples
from imedsam.hub_errors import check_token, explain_hub_errors
from imedsam.modeling_imedsam import IMedSamModel
from imedsam.processing.image_processing_sam_i2i import SamI2IImageProcessor
from imedsam.processing.processing_imedsam import IMedSamProcessor
from imedsam.sam_checkpoints import load_sam
from imedsam.training.baselines import load_model
from imedsam.training.examples import read_object
from imedsam.training.model_card import Publication, is_corrected, model_card, shown_name
from imedsam.training.predict import read_image
from imedsam.training.remote_code import forget_code, write_code
from imedsam.training.report import new_folder, weights_hash, write_json
from imedsam.training.translation_card import translation_card
from imedsam.training.translators import TRANSLATORS

# Of the arguments of a training and of an evaluation.
PATHS = {
    "model_name_or_path",
    "dataset_name",
    "output_dir",
    "resume_from_checkpoint",
    "labels",
    "model",
    "compare",
    "data",
    "source",
    "target",
    "cache_dir",
    "clip_name_or_path",
}
PICTURE = "picture.png"
# Rows of single objects and slices, whose names may say whose they are.
OBJECTS = {
    "objects",
    "validation_objects",
    "test_objects",
    "validation_slices",
    "test_slices",
    "patients",
    "validation_patients",
    "test_patients",
}


def prepare_folder(
    model: str,
    output: Path,
    publication: Publication,
    *,
    reports: Sequence[Path] = (),
    picture: Path | None = None,
    adapter: bool = False,
    offline: bool = False,
) -> list[Path]:
    """
    Writes what is to be published into a new folder, all of it or nothing.

    Args:
        model: the folder that a training left.
        output: the new folder.
        publication: what there is to say beside it; its evaluations and its picture come from here.
        reports: folders that `imedsam evaluate` left, of this model. Their means are published, nothing of an object.
        picture: for the card, of images that may be shown.
        adapter: publish what was trained alone, a few MB that need their SAM; else the whole model, LoRA merged.
        offline: do not look on the Hub for the SAM that the publication names, whose commit an adapter then lacks.

    Returns:
        The files.

    Raises:
        ValueError: no training's folder, or one with other weights; a report of another model; an adapter whose SAM
            nobody else can find, or of another SAM than the one named; or code for a model that is no I-MedSAM by
            itself.
    """
    training = read_training(Path(model))
    shown = None if picture is None else read_image(picture).convert("RGB")
    with new_folder(output) as folder:
        if shown is not None:
            shown.save(folder / PICTURE)  # anew, without what a camera or a scanner notes beside the pixels
            publication = replace(publication, picture=PICTURE)
        if is_translator(training):
            card = write_translator(model, folder, training, publication, reports=reports, adapter=adapter)
        else:
            card = write_segmenter(
                model, folder, training, publication, reports=reports, adapter=adapter, offline=offline
            )
        (folder / "README.md").write_text(card, encoding="utf-8")
        write_json(folder / "metrics.json", summary_of(training))
        for path in folder.rglob("*"):
            if path.is_file():
                path.chmod(0o644)  # safetensors writes for the owner alone
    return sorted(path for path in output.rglob("*") if path.is_file())


def write_segmenter(
    model: str,
    folder: Path,
    training: dict[str, Any],
    publication: Publication,
    *,
    reports: Sequence[Path],
    adapter: bool,
    offline: bool,
) -> str:
    """Writes a model that segments, and its evaluations; returns its card."""
    evaluations = [read_evaluation(report, Path(model)) for report in reports]
    trained = load_model(model)
    if publication.with_code and (adapter or type(trained) is not IMedSamModel):
        raise ValueError("Expected a whole I-MedSAM to publish with its code, got an adapter or a baseline.")
    if adapter:
        save_adapter(trained, folder, publication.base_model, offline)
    else:
        trained.float()  # a small update of LoRA's would drown in half precision
        trained.merge_and_unload().save_pretrained(folder)
    IMedSamProcessor.from_pretrained(model).save_pretrained(folder)
    if publication.with_code:
        write_code(folder)
    else:
        forget_code(folder)
    for number, evaluation in enumerate(evaluations, 1):
        write_json(folder / f"evaluation_{number}.json", summary_of(evaluation))
    said = replace(
        publication,
        evaluations=evaluations,
        base_sha256=trained.config.base_model_sha256 if adapter else None,
        correct=default_samples(trained) if any(map(is_corrected, evaluations)) else None,
    )
    return model_card(training, said)


def is_translator(training: dict[str, Any]) -> bool:
    """Whether a training was one of imedsam.training.train_sam_i2i."""
    return "source" in training["arguments"]


def write_translator(
    model: str,
    folder: Path,
    training: dict[str, Any],
    publication: Publication,
    *,
    reports: Sequence[Path],
    adapter: bool,
) -> str:
    """Writes a model that translates; returns its card."""
    if adapter or reports or publication.with_code:
        raise ValueError(
            "Expected a model that segments for an adapter, for reports of `imedsam evaluate` and for code, got one "
            f"that translates at {model}: its card has what its training scored (--do_test). Leave them out."
        )
    TRANSLATORS[training["arguments"]["model"]].from_pretrained(model).save_pretrained(folder)
    SamI2IImageProcessor.from_pretrained(model).save_pretrained(folder)
    return translation_card(training, publication)


def save_adapter(model: IMedSamModel, folder: Path, base_model: str | None, offline: bool) -> None:
    sha256 = getattr(model.config, "base_model_sha256", None)
    if sha256 is None:
        raise ValueError(
            "Expected an adapter that knows its SAM's weights, got a model that has no SAM or does not know it: "
            "publish the whole model."
        )
    model.save_adapter(folder)
    path = folder / ADAPTER_CONFIG_NAME
    config = json.loads(path.read_text())
    if base_model is not None:
        revision = None if offline else find_commit(base_model, sha256)
        write_json(path, {**config, "base_model_name_or_path": base_model, "revision": revision})
    elif config["revision"] is None:  # which a base from the Hub has
        raise ValueError(
            f"Expected an adapter whose SAM others find on the Hub, got one on {config['base_model_name_or_path']}: "
            "say where it is there with --base-model user/name (its weights' hash is held to), or publish the whole "
            "model."
        )


def find_commit(base_model: str, sha256: str) -> str | None:
    """The commit of a SAM on the Hub that has the weights of this hash."""
    if Path(base_model).exists():  # which would be looked at instead, and has no commit
        raise ValueError(
            f"Expected {base_model} to be the SAM's name on the Hub alone, got a folder of that name too: give the "
            "command in another folder."
        )
    try:
        sam = load_sam(base_model)
    except OSError as error:
        raise OSError(f"Expected {base_model}, the SAM of the adapter, on the Hub, got none: {error}") from error
    if sam.sha256() != sha256:
        raise ValueError(
            f"Expected {base_model} to be the SAM of the adapter, whose weights have the SHA-256 {sha256}, got one "
            f"with {sam.sha256()}: name the right one."
        )
    return sam.revision


def upload(
    folder: Path, repo_id: str, *, private: bool = False, revision: str | None = None, update: bool = False
) -> str:
    """
    Sends a folder that `prepare_folder` wrote, in one commit: whatever fails, a repository holds what it held, or is
    new and empty. A branch that was made for it stays only where the Hub can no longer be reached.

    Args:
        private: whether a new repository is private.
        revision: a branch, made if it is not there; the main one by default.
        update: commit on top of a repository that exists; files of it that are not in the folder are removed.

    Returns:
        The address of the commit.
    """
    api = HfApi()
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    with explain_hub_errors(repo_id):
        if not find_repository(repo_id, private=private, revision=revision, update=update):
            api.create_repo(repo_id, private=private or None)  # as the organisation has it, unless it is asked for
        new_branch = revision is not None and not api.revision_exists(repo_id, revision)
        if new_branch:
            api.create_branch(repo_id, branch=str(revision))
        head, there = api.repo_info(repo_id, revision=revision).sha, files_of(api, repo_id, revision)
        try:
            # `upload_folder` may make several commits of many files.
            commit = api.create_commit(
                repo_id,
                [
                    *(CommitOperationAdd(name, path) for name, path in files.items()),
                    *(CommitOperationDelete(name) for name in there - files.keys()),
                ],
                commit_message="Upload model with imedsam",
                revision=revision,
                parent_commit=head,
            )
        except (HfHubHTTPError, HTTPError, RuntimeError) as error:
            refused = isinstance(error, HfHubHTTPError) and error.response.status_code < 500
            found = api.repo_info(repo_id, revision=revision).sha
            if found == head and new_branch:
                api.delete_branch(repo_id, branch=str(revision))
            if found != head and not refused and files_of(api, repo_id, revision) == files.keys():
                return f"{api.endpoint}/{repo_id}/commit/{found}"  # the answer alone was lost
            raise
    return commit.commit_url


def find_repository(repo_id: str, *, private: bool = False, revision: str | None = None, update: bool = False) -> bool:
    """
    Args:
        private, revision, update: as for `upload`.

    Returns:
        Whether there is one.

    Raises:
        ValueError: one that all can see, if it is to be private, or one that holds something, without `update`.
    """
    api = HfApi()
    with explain_hub_errors(repo_id):
        check_token()
        if not api.repo_exists(repo_id):
            return False
        if private and not api.repo_info(repo_id).private:
            raise ValueError(
                f"Expected a private repository, got {repo_id}, which all can see: make it private first, or choose "
                "another name."
            )
        if not update and files_of(api, repo_id, revision):
            raise ValueError(
                f"Expected a new repository, got {repo_id}, which exists: add --update to replace what it holds by a "
                "commit on top, or choose another name."
            )
    return True


def files_of(api: HfApi, repo_id: str, revision: str | None) -> set[str]:
    """What a branch holds of ours; nothing, if it is not there."""
    try:
        return set(api.list_repo_files(repo_id, revision=revision)) - {".gitattributes"}
    except RevisionNotFoundError:
        return set()


def read_training(folder: Path) -> dict[str, Any]:
    """What a training noted of the model that it left there."""
    training = read_metrics(folder, "of a finished training: publish the folder that it left")
    if not {"arguments", "history", "trainable_parameters"} <= training.keys():
        raise ValueError(f"Expected the metrics.json of a training in {folder}, got another one.")
    if training.get("weights", None) not in (None, weights_hash(str(folder))):
        raise ValueError(
            f"Expected the weights in {folder} that its metrics.json was written of, got others: publish the folder "
            "that a training left as it is."
        )
    return training


def read_metrics(folder: Path, what: str) -> dict[str, Any]:
    path = folder / "metrics.json"
    if not path.is_file():
        raise ValueError(f"Expected the metrics.json {what}, got none in {folder}.")
    return read_object(path, "copy it again")


def read_evaluation(report: Path, model: Path) -> dict[str, Any]:
    evaluation = read_metrics(report, "of a finished `imedsam evaluate`")
    if "settings" not in evaluation:
        raise ValueError(f"Expected the report of an evaluation in {report}, got another metrics.json.")
    if evaluation.get("weights") != weights_hash(str(model)):
        raise ValueError(
            f"Expected a report on the weights in {model}, got one on others, of {evaluation['model']}, in {report}: "
            "evaluate it anew."
        )
    return with_shown_names(evaluation)


def with_shown_names(evaluation: dict[str, Any]) -> dict[str, Any]:
    """The models are called by folders there: the one published becomes "this model"."""
    own, *others = evaluation["settings"][0]["methods"]
    names = {own: "this model"}
    for other in others:
        short = shown_name(other)
        names[other] = "the other model" if short in (shown_name(own), *names.values()) else short
    settings = [
        {
            **setting,
            "methods": {names[name]: values for name, values in setting["methods"].items()},
            "comparisons": [
                {**row, "method": names[row["method"]], "against": names[row["against"]]}
                for row in setting["comparisons"]
            ],
        }
        for setting in evaluation["settings"]
    ]
    return {**evaluation, "settings": settings}


def summary_of(content: Any) -> Any:
    """A report without the folders of the machine that it was made on, and without the rows of single objects."""
    if isinstance(content, list):
        return [summary_of(value) for value in content]
    if not isinstance(content, dict):
        return content
    return {
        key: shown_name(value) if key in PATHS and isinstance(value, str) else summary_of(value)
        for key, value in content.items()
        if key not in OBJECTS
    }

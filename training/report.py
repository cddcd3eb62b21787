"""What a training run leaves beside its weights: metrics.json, curves.png and a model card."""

import hashlib
import json
import math
import platform
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

from imedsam.training.model_card import model_card

LIBRARIES = ("imedsam", "torch", "transformers", "peft", "accelerate", "monai", "numpy")
AXES = {"dice": "Dice", "psnr": "PSNR (dB)"}


def write_report(
    folder: Path, report: dict, make_card: Callable[[dict], str] = model_card, score: str = "dice"
) -> None:
    """
    Writes the files into the folder of the trained model; metrics.json is the last, and so the sign of a
    finished run.

    Args:
        report: what goes to metrics.json: `arguments`, `history`, `validation`, `floors`, ...; versions and the date
            are added.
        make_card: what README.md is made by.
        score: of validation, to plot.
    """
    plot_curves(report["history"], folder / "curves.png", score)
    (folder / "README.md").write_text(make_card(report), encoding="utf-8")
    write_json(folder / "metrics.json", {**report, **provenance()})


def weights_hash(model: str) -> str | None:
    """SHA-256 of the weights in a model's folder; None for a name on the Hub."""
    digest = hashlib.sha256()
    files = sorted(Path(model).glob("*.safetensors"))
    for path in files:
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest() if files else None


def provenance() -> dict:
    """With what and when a result was made."""
    return {
        "versions": {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}},
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def write_json(path: Path, content: dict) -> None:
    """Writes a file that is either the old or the new one, whenever the process is stopped; nan and inf are null."""
    write_atomically(path, json.dumps(_finite(content), indent=2, allow_nan=False) + "\n")


def write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """
    A folder to write into that is at `path` once all of it is written: whatever stops the process, there is none or a
    whole one.

    Raises:
        ValueError: something is there.
    """
    path = path.resolve()
    if path.is_file() or path.is_dir() and any(path.iterdir()):
        raise ValueError(f"Expected a new folder, got {path}, which holds something: move it away or choose another.")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as temporary:
        folder = Path(temporary, path.name)
        folder.mkdir()
        yield folder
        if path.is_dir():
            path.rmdir()
        folder.replace(path)


def plot_curves(history: list[dict], path: Path, score: str = "dice") -> None:
    """The training loss and a validation score over the epochs."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    left.plot([row["epoch"] + 1 for row in history], [row["loss"] for row in history])
    left.set(xlabel="epoch", ylabel="training loss")
    scored = [row for row in history if "validation" in row]
    right.plot([row["epoch"] + 1 for row in scored], [row["validation"][score] for row in scored], marker=".")
    right.set(xlabel="epoch", ylabel=f"validation {AXES[score]}")
    figure.savefig(path, dpi=120)


def _finite(content):
    if isinstance(content, Mapping):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content

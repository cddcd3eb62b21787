"""
Carries out one run: trains, unless that is done, and adds the scores that are missing. Started by runner.py, in a
process of its own, which makes its peak memory the run's.
"""

import json
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

from runs import DERIVED, MACHINE_DEPENDENT, PLACES, WITHOUT_SAM, Run, Scoring
from scoring import load_trained, open_examples, score, score_floors
from splits import Splits, make_splits, write_folder

from imedsam.training.arguments import parse_args
from imedsam.training.checkpoints import STATE_FILE, find_checkpoints
from imedsam.training.machine import describe_machine, peak_memory
from imedsam.training.report import write_atomically, write_json
from imedsam.training.train import main as train

RESUMABLE = "move it away, or choose another --output_dir"


@dataclass
class Task:
    """
    Args:
        run: None for the floors.
        scorings: what is to be scored.
        data: the folder of the data sets; `starts`: that of the start points, or a start point's folder or Hub name by
            its name.
        output_dir: for weights and checkpoints; `results`: for JSON.
        flags: of the training script, after all others.
        side_by_side: how many runs share the machine.
    """

    run: Run | None
    scorings: list[Scoring]
    data: Path
    starts: dict[str, str]
    output_dir: Path
    results: Path
    flags: list[str] = field(default_factory=list)
    side_by_side: int = 1

    def to_json(self) -> str:
        return json.dumps(asdict(self), default=str)

    @classmethod
    def from_json(cls, text: str) -> "Task":
        values = json.loads(text)
        run = None if values["run"] is None else Run(**values.pop("run"))
        scorings = [
            Scoring(**{**scoring, "config": tuple(map(tuple, scoring["config"]))})
            for scoring in values.pop("scorings")
        ]
        paths = {key: Path(values.pop(key)) for key in ("data", "output_dir", "results")}
        return cls(**{**values, "run": run, "scorings": scorings, **paths})


def carry_out(task: Task) -> None:
    if task.run is None:
        score_all_floors(task)
    else:
        train_and_score(task, task.run)


def score_all_floors(task: Task) -> None:
    for scoring in missing_scores(task.scorings, task.results / "floors"):
        _, folder = prepare(task, Run(data=scoring.data), scoring.data)
        floors = score_floors(open_examples(folder, scoring.data, scoring.split), scoring)
        write_scores(task.results / "floors" / f"{scoring.name}.json", floors)


def train_and_score(task: Task, run: Run) -> None:
    output_dir, results = task.output_dir / run.name, task.results / run.name
    splits, folder = prepare(task, run, run.data)
    flags = training_flags(task, run, run.data if folder is None else str(folder))
    refuse_other_results(task)
    missing = missing_scores(task.scorings, results)
    if (results / "run.json").exists() and not missing:
        return
    if (results / "run.json").exists() and not (output_dir / "metrics.json").exists():
        raise SystemExit(
            f"Expected the weights of {run.name} in {output_dir}, whose results are in {results}, got none: score it "
            "where it was trained, or move the results away to train it anew."
        )
    trained_here = train_once(output_dir, flags)
    memory = peak_memory() if trained_here else None
    model, processor = load_trained(output_dir, run.method)
    if not (results / "run.json").exists():
        facts = gather_facts(run, json.loads((output_dir / "metrics.json").read_text()))
        facts["start"] = "from nothing" if run.method in WITHOUT_SAM else Path(task.starts[run.start]).name
        facts |= {"dropped": {} if splits is None else splits.dropped}
        facts |= {"machine": describe_machine(), "side_by_side": task.side_by_side, "peak_memory": memory}
        results.mkdir(parents=True, exist_ok=True)
        write_json(results / "run.json", facts)
    for scoring in missing:
        own = scoring.data == run.data
        examples = open_examples(
            folder if own else prepare(task, Run(data=scoring.data), scoring.data)[1], scoring.data, scoring.split
        )
        write_scores(results / f"{scoring.name}.json", score(model, processor, examples, scoring))


def missing_scores(scorings: list[Scoring], results: Path) -> list[Scoring]:
    return [scoring for scoring in dict.fromkeys(scorings) if not (results / f"{scoring.name}.json").exists()]


def prepare(task: Task, run: Run, data: str) -> tuple[Splits | None, Path | None]:
    """The images that a run may see and be scored on, as a folder of the run's own; nothing for phantoms."""
    if data.startswith("phantoms"):
        return None, None
    owner = "floors" if task.run is None else task.run.name
    splits, folder = make_splits(task.data, data, run.fold), task.output_dir / owner / "data" / data
    if (folder / "splits.json").exists() and json.loads((folder / "splits.json").read_text()) != splits.names:
        raise SystemExit(f"Expected a run with these images in {folder.parent}, got one with others: {RESUMABLE}.")
    write_folder(task.data, data, splits, folder)
    return splits, folder


def train_once(output_dir: Path, flags: list[str]) -> bool:
    """Trains, or goes on, unless that is done; whether anything was to do."""
    if (output_dir / "metrics.json").exists():
        refuse_another_recipe(output_dir / "metrics.json", flags)
        return False
    for checkpoint in find_checkpoints(output_dir)[-1:]:
        refuse_another_recipe(checkpoint / STATE_FILE, flags)
    train(flags)
    return True


def training_flags(task: Task, run: Run, dataset: str) -> list[str]:
    start = task.starts[run.start] if run.first_stage is None else str(task.output_dir / run.first_stage.name)
    places = ["--model_name_or_path", start, "--output_dir", str(task.output_dir / run.name)]
    return [*run.arguments(task.flags), *places, "--dataset_name", dataset]


def refuse_other_results(task: Task) -> None:
    """Results that are there must be those of the task's flags."""
    if task.run is not None and (path := task.results / task.run.name / "run.json").exists():
        refuse_another_recipe(path, training_flags(task, task.run, task.run.data))


def refuse_another_recipe(path: Path, flags: list[str]) -> None:
    """A run from before, finished or not, counts if it was made with the flags that are given now."""
    made_with, asked_for = json.loads(path.read_text())["arguments"], vars(parse_args(flags))
    asked_for = json.loads(json.dumps(asked_for))
    if made_with["config"] and "ellipse_prior" in asked_for["config"]:
        made_with["config"].setdefault("ellipse_prior", False)  # where it is not named, the model has none
    made_with = {**vars(parse_args(PLACES)), **made_with}  # a flag that came after it changes nothing by default
    ignored = {*MACHINE_DEPENDENT, *(DERIVED if asked_for["max_train_steps"] else ())}
    if different := [
        k for k, value in asked_for.items() if k not in ignored and value not in (None, made_with.get(k))
    ]:
        raise SystemExit(
            f"Expected a run of this recipe in {path.parent}, got another {', '.join(different)}: {RESUMABLE} and "
            "--results."
        )


def gather_facts(run: Run, report: dict) -> dict:
    """What is to be known of a run beside its scores, from the report of its training."""
    keys = ("best_epoch", "seconds", "trainable_parameters", "num_images", "image_size", "versions", "date")
    scored = [row for row in report["history"] if "validation" in row]
    best = next(row for row in scored if row["epoch"] == report["best_epoch"])
    return {
        "run": run.name,
        "commit": describe_commit(),
        **{key: report[key] for key in keys},
        "arguments": {key: v for key, v in report["arguments"].items() if key not in MACHINE_DEPENDENT},
        "validation_dice": {row["epoch"] + 1: round(row["validation"]["dice"], 4) for row in scored},
        "frequency_ratio": [round(ratio, 5) for ratio in best["frequency_ratio"]],
    }


def describe_commit() -> str | None:
    """Of this repository, "-dirty" where something was changed since; None outside of one."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    except OSError:
        return None


def write_scores(path: Path, content: dict) -> None:
    """A line per column."""
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in content.items())
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, f"{{\n{lines}\n}}\n")


if __name__ == "__main__":
    carry_out(Task.from_json(sys.argv[1]))

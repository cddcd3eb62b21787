"""
All experiments, or some: trains what is not trained, scores what is not scored, goes on with what was cut.

    python experiments/runner.py --dry_run                  # the runs of each table, what they share, what is done
    python experiments/runner.py                            # trains, and scores validation splits
    python experiments/runner.py --tables spectrum octaves  # only these; so does python experiments/spectrum.py
    python experiments/runner.py --test                     # scores test splits too: once, when all is decided
    python experiments/report.py                            # writes the tables and plots of docs/results.md

Needs IMEDSAM_DATA (see README.md beside this file). Cost: at most 25 minutes a run on two cores. On a GPU, `--jobs 6`
carries out six runs side by side, each in a process of its own; Accelerate chooses the device, and
`ACCELERATE_USE_CPU=true` keeps it off the GPU. Weights stay in --output_dir; everything else that a run leaves is
small JSON in --results, the scores of every object among it, and can be taken to another machine: what is there is
done. Scores are of exact rendering, which costs a core about 4 seconds an image; `--adaptive` takes a fraction of it.

With SAM's own weights and the paper's schedule only the start and the number of epochs change:
`--medical facebook/sam-vit-base --flags="--max_train_steps 59000" --results sam_results --output_dir outputs/sam`.
"""

import argparse
import importlib
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from one_run import Task, missing_scores, refuse_other_results
from runs import STARTS, Run, Scoring, Table, start_folder

HERE = Path(__file__).parent
FLOORS = "floors"  # what they are called beside the runs
FILES = (
    "main_table",
    "pooled_folds",
    "cross_domain",
    "components",
    "spectrum",
    "selection",
    "octaves",
    "training_share",
    "uncertainty",
    "box_jitter",
    "resolution",
    "far_spots",
    "improvements",
    "spectral",
    "sf_recsam",
)


def main(argv: Sequence[str] | None = None, tables: Sequence[str] = FILES) -> None:
    """
    Args:
        argv: the command line by default.
        tables: the files beside this one to take them from, unless `--tables` says so.
    """
    args = parse_args(argv, tables)
    chosen = load_tables(args.tables)
    tasks = make_tasks(args, chosen)
    if args.dry_run:
        print_plan(chosen, tasks)
        return
    for task in tasks:
        refuse_other_results(task)
    with ThreadPoolExecutor(args.jobs) as pool:
        results = list(pool.map(lambda task: start(task, args.jobs), tasks))
    if failed := [name_of(task) for task, result in zip(tasks, results, strict=True) if result != 0]:
        raise SystemExit(
            f"Expected every run to finish, got errors in {', '.join(failed)}: see above, or log.txt of each."
        )


def parse_args(argv: Sequence[str] | None, tables: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    root = Path(os.environ.get("IMEDSAM_DATA", "."))
    parser.add_argument("--tables", nargs="+", choices=FILES, default=list(tables))
    parser.add_argument(
        "--runs", nargs="+", metavar="RUN", help="Only these of them, by the names of --dry_run; floors: those."
    )
    parser.add_argument("--test", action="store_true", help="Score test splits too.")
    parser.add_argument("--adaptive", action="store_true", help="Score masks that are rendered adaptively.")
    parser.add_argument("--jobs", type=int, default=1, help="Runs side by side.")
    parser.add_argument("--dry_run", action="store_true", help="Say what would be done.")
    parser.add_argument("--data", type=Path, default=root / "data", help="Folder of the data sets.")
    for name in STARTS:
        parser.add_argument(f"--{name}", default=start_folder(root, name), help="Folder or Hub name of this start.")
    parser.add_argument("--flags", default="", help="Of the training script, for all runs: after theirs.")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/experiments"))
    parser.add_argument("--results", type=Path, default=HERE / "results")
    return parser.parse_args(argv)


def load_tables(names: Sequence[str]) -> list[Table]:
    return [table for name in names for table in importlib.import_module(name).TABLES]


def make_tasks(args: argparse.Namespace, tables: Sequence[Table]) -> list[Task]:
    """One per distinct run, with what every table wants it scored on; the floors first."""
    wanted: dict[Run | None, list[Scoring]] = {}
    by_name: dict[str, Run] = {}
    for table in tables:
        for row in table.rows:
            if row.floor:
                wanted.setdefault(None, []).extend(table.scoring(row, *part) for part in table.parts(args.test))
        for run, scorings in table.scorings(args.test).items():
            wanted.setdefault(by_name.setdefault(run.name, run), []).extend(scorings)
    if args.runs:
        if unknown := sorted(set(args.runs) - {FLOORS, *by_name}):
            raise SystemExit(f"Expected --runs out of {', '.join([FLOORS, *by_name])}, got {unknown[0]}.")
        wanted = {
            run: scorings for run, scorings in wanted.items() if (FLOORS if run is None else run.name) in args.runs
        }
    starts = {name: getattr(args, name) for name in STARTS}
    if args.adaptive:
        wanted = {
            run: [replace(one, mode=None) if run else one for one in scorings] for run, scorings in wanted.items()
        }
    places = (args.data, starts, args.output_dir, args.results, args.flags.split(), args.jobs)
    return [Task(run, list(dict.fromkeys(scorings)), *places) for run, scorings in wanted.items()]


def start(task: Task, jobs: int) -> int:
    """Carries out a task in a process of its own, unless nothing is to do; the exit status."""
    if is_done(task):
        return 0
    folder = task.output_dir / name_of(task)
    folder.mkdir(parents=True, exist_ok=True)
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))} if jobs > 1 else {}
    command = [sys.executable, str(HERE / "one_run.py"), task.to_json()]
    print(f"{name_of(task)}: started", flush=True)
    with (folder / "log.txt").open("a") as log:
        out = None if jobs == 1 else log  # one run shows its progress
        status = subprocess.run(command, env={**threads, **os.environ}, stdout=out, stderr=out).returncode
    print(f"{name_of(task)}: {'done' if status == 0 else 'failed'}", flush=True)
    return status


def is_done(task: Task) -> bool:
    folder = task.results / name_of(task)
    trained = task.run is None or (folder / "run.json").exists()
    return trained and not missing_scores(task.scorings, folder)


def name_of(task: Task) -> str:
    return FLOORS if task.run is None else task.run.name


def print_plan(tables: Sequence[Table], tasks: Sequence[Task]) -> None:
    """The runs of each table, those that an earlier one has too in brackets, and what is left to do of each run."""
    known: set[str] = set()
    for table in tables:
        names = list(dict.fromkeys(run.name for row in table.rows for run in row.runs))
        print(f"\n{table.name}, {len(table.rows)} rows of {len(names)} runs, {len(set(names) - known)} of its own:")
        for name in names:
            print(f"  ({name})" if name in known else f"  {name}")
        known |= set(names)
    print()
    for task in tasks:
        missing = missing_scores(task.scorings, task.results / name_of(task))
        trained = task.run is None or (task.results / name_of(task) / "run.json").exists()
        left = ([] if trained else ["train"]) + ([f"{len(missing)} scorings"] if missing else [])
        print(f"{name_of(task)}: {' and '.join(left) or 'done'}")
    print(f"{sum(task.run is not None for task in tasks)} distinct runs")


if __name__ == "__main__":
    main()

"""The benchmarks' scripts still run: their figures are another matter."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.slow
def test_a_quick_benchmark_ends_with_its_goals(tmp_path):
    script = [sys.executable, FOLDER / "scaling.py", "--quick", "--check", "--output_dir", "."]
    done = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "scaling.json").read_text())
    assert report["quick"] and {"machine", "versions", "seed", "date"} <= report.keys()
    lines = [line for line in done.stdout.splitlines() if line.startswith("goal ")]
    assert len(lines) == len(report["goals"]) == 2
    assert all(re.fullmatch(r"goal .+: \S+ \(at most 1\.8\) met", line) for line in lines)
    assert (tmp_path / "scaling.png").stat().st_size > 10_000


@pytest.mark.slow
def test_every_benchmark_finds_what_it_imports():
    names = ", ".join(path.stem for path in FOLDER.glob("*.py"))
    subprocess.run([sys.executable, "-c", f"import {names}"], cwd=FOLDER, check=True)

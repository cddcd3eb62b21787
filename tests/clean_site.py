"""A Python in which only some distributions are installed, with what they require."""

import re
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement


def make_site(folder, *names):
    """Links the distributions and all that they require into a folder, whatever else is installed beside them."""
    folder.mkdir()
    waiting, seen = list(names), set()
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in seen:
            continue
        seen.add(name)
        found = distribution(name)
        waiting += [r.name for r in map(Requirement, found.requires or ()) if r.marker is None or r.marker.evaluate()]
        for entry in {file.parts[0] for file in found.files or () if file.parts[0] not in ("..", "__pycache__")}:
            target = Path(found.locate_file(entry))
            if target.exists() and not (folder / entry).exists():
                (folder / entry).symlink_to(target)
    return folder


def run_in_site(site, code, **environment):
    """Runs code in a process that sees the standard library and this site alone; what it prints."""
    lines = f"import sys; sys.path.append({str(site)!r})\n{code}"
    command = [sys.executable, "-I", "-S", "-c", lines]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=site.parent)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout

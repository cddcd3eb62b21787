"""The site's first page is the README, and links to files that are not of the site go to the repository."""

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"\[([^\]]*)\]\((?!https?:|#|mailto:)([^)\s]+)\)")


def on_files(files, config):
    """mkdocs calls it once: pictures that pages show from beside docs/ are of the site."""
    for picture in sorted(ROOT.glob("benchmarks/*.png")):
        files.append(File.generated(config, picture.relative_to(ROOT).as_posix(), abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, page, config, **kwargs) -> str:
    """mkdocs calls it for each page."""
    if page.file.src_uri == "index.md":
        markdown, folder = (ROOT / "README.md").read_text(), ROOT
    else:
        folder = ROOT / "docs"
    return LINK.sub(lambda match: _link(*match.groups(), folder, config.repo_url), markdown)


def _link(text: str, target: str, folder: Path, repository: str | None) -> str:
    path, hash_, anchor = target.partition("#")
    file = (folder / path).resolve()
    if not file.exists():
        return f"[{text}]({target})"  # mkdocs says that it is missing
    if file.is_relative_to(ROOT / "docs"):
        return f"[{text}]({file.relative_to(ROOT / 'docs').as_posix()}{hash_}{anchor})"
    place = f"{file.relative_to(ROOT).as_posix()}{hash_}{anchor}"
    if file.suffix == ".png":
        return f"[{text}]({place})"
    return f"[{text}]({repository}/blob/main/{place})" if repository else text

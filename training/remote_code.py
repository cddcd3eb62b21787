"""The model's code beside its weights, so that transformers loads them where this package is not installed."""

import ast
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

from transformers.utils import CONFIG_NAME, PROCESSOR_NAME

from imedsam.training.report import write_json

PACKAGE = "imedsam"
# What the Auto classes load.
MODEL_CLASSES = {
    "AutoConfig": "imedsam.configuration.configuration_imedsam.IMedSamConfig",
    "AutoModel": "imedsam.modeling_imedsam.IMedSamModel",
    "AutoModelForMaskGeneration": "imedsam.modeling_imedsam.IMedSamModel",
}
PROCESSOR_CLASSES = {
    "AutoProcessor": "imedsam.processing.processing_imedsam.IMedSamProcessor",
    "AutoImageProcessor": "imedsam.processing.image_processing_imedsam.IMedSamImageProcessor",
}


def write_code(folder: Path) -> list[Path]:
    """
    Puts the modules that the Auto classes need into the folder of a model and its processor, flat, as transformers
    wants them, and says in the folder's configurations what is where.
    """
    classes = [*MODEL_CLASSES.values(), *PROCESSOR_CLASSES.values()]
    written = []
    for module, source in collect_modules({path.rpartition(".")[0] for path in classes}).items():
        path = folder / f"{module.rpartition('.')[2]}.py"
        path.write_text(flatten_imports(source), encoding="utf-8")
        written.append(path)
    config, processor_config = (json.loads((folder / name).read_text()) for name in (CONFIG_NAME, PROCESSOR_NAME))
    write_json(folder / CONFIG_NAME, {**config, "auto_map": auto_map(MODEL_CLASSES)})
    # The image processor's part is read by itself, too.
    image_processor = {**processor_config["image_processor"], "auto_map": auto_map(PROCESSOR_CLASSES)}
    processor_config |= {"image_processor": image_processor, "auto_map": auto_map(PROCESSOR_CLASSES)}
    write_json(folder / PROCESSOR_NAME, processor_config)
    return written


def forget_code(folder: Path) -> None:
    """Takes out of a folder's configurations where code was that does not come along."""
    for path in (folder / CONFIG_NAME, folder / PROCESSOR_NAME):
        content = json.loads(path.read_text())
        for part in (content, content.get("image_processor", {})):
            part.pop("auto_map", None)
        write_json(path, content)


def collect_modules(modules: set[str]) -> dict[str, str]:
    """The sources of these modules and of all others of the package that they import, by their names."""
    sources: dict[str, str] = {}
    waiting = sorted(modules)
    while waiting:
        module = waiting.pop()
        if module in sources:
            continue
        spec = importlib.util.find_spec(module)
        if spec is None or spec.origin is None or spec.submodule_search_locations is not None:
            raise ValueError(
                f"Expected a module of its own file, got {module}: import from the module, not a package."
            )
        sources[module] = Path(spec.origin).read_text(encoding="utf-8")
        waiting += [node.module for node in _own_imports(sources[module]) if node.module]
    names = [module.rpartition(".")[2] for module in sources]
    if len(set(names)) < len(names):
        raise ValueError(f"Expected modules of different names, got {sorted(names)}: they go into one folder.")
    return sources


def flatten_imports(source: str) -> str:
    """`from imedsam.a.b import c` -> `from .b import c`."""
    lines = source.splitlines(keepends=True)
    for node in _own_imports(source):
        line, module = lines[node.lineno - 1], node.module or ""
        lines[node.lineno - 1] = line.replace(f"from {module} ", f"from .{module.rpartition('.')[2]} ", 1)
    return "".join(lines)


def _own_imports(source: str) -> Iterator[ast.ImportFrom]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE:
            yield node


def auto_map(classes: dict[str, str]) -> dict[str, str]:
    return {auto: ".".join(path.split(".")[-2:]) for auto, path in classes.items()}

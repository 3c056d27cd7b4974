"""The layers of s2seg: a module imports only from layers before its own, and only three of them know torch."""

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import s2seg

LAYERS = [
    *("allocator", "client", "errors", "progress", "yamlfile", "legend", "windows", "sources", "models", "outputs"),
    *("inference", "postprocess", "assess", "training", "pipeline", "jobs", "cli", "__main__", "testing"),
]
KNOW_TORCH = {"models", "inference", "training"}
TORCH = {"torch", "torchvision", "segmentation_models_pytorch", "timm", "pytorch_lightning", "lightning"}


def imports_of(path: Path, module: str, known: set[str]) -> set[str]:
    """Every module that `path` names in an import, wherever it stands, as absolute dotted names."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            found |= {full if (full := f"{base}.{alias.name}") in known else base for alias in node.names}
    return found


def read_tree(root: Path) -> dict[str, set[str]]:
    """Dotted name of every module under the package folder `root` -> the modules it imports."""
    paths = {}
    for path in sorted(root.rglob("*.py")):
        parts = (root.name, *path.relative_to(root).with_suffix("").parts)
        paths[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return {module: imports_of(path, module, set(paths)) for module, path in paths.items()}


def complaints(root: Path) -> list[str]:
    """What is wrong with the imports under `root`, one line each."""
    tree, wrong = read_tree(root), []

    def layer(module: str) -> str:
        return module.split(".")[1] if "." in module else ""

    strays = [module for module in tree if layer(module) and layer(module) not in LAYERS]
    wrong += [f"{module}: layer {layer(module)!r} has no place in the order" for module in strays]
    for module, imported in tree.items():
        if layer(module) not in LAYERS:
            continue  # the package's own __init__ only hands out names
        for name in sorted(imported):
            if name.split(".")[0] in TORCH and layer(module) not in KNOW_TORCH:
                wrong.append(f"{module} imports {name}")
            if name.split(".")[0] != root.name:
                continue
            if layer(name) not in LAYERS or LAYERS.index(layer(name)) > LAYERS.index(layer(module)):
                wrong.append(f"{module} imports {name}, which comes later")
    inner = {m: {n for n in names if n in tree and n != m} for m, names in tree.items() if layer(m)}
    try:
        TopologicalSorter(inner).prepare()
    except CycleError as error:
        wrong.append("a circle: " + " -> ".join(error.args[1]))
    return wrong


def test_imports_point_one_way():
    assert complaints(Path(s2seg.__path__[0])) == []


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"legend.py": "from s2seg.errors import X"}, []),
        ({"legend.py": "def f():\n    from s2seg.sources import stack"}, ["s2seg.legend imports s2seg.sources.stack"]),
        (
            {"errors.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import s2seg.legend"},
            ["s2seg.errors imports s2seg.legend, which comes later"],
        ),
        ({"sources/stack.py": "from ..cli import main"}, ["s2seg.sources.stack imports s2seg.cli"]),
        ({"errors.py": "from s2seg import legend"}, ["s2seg.errors imports s2seg.legend"]),
        ({"errors.py": "from s2seg import name_of_the_package"}, ["s2seg.errors imports s2seg, which comes later"]),
        ({"sources/stack.py": "from .reader import a", "sources/reader.py": "from . import stack"}, ["a circle: "]),
        ({"sources/stack.py": "def f():\n    import torch.nn"}, ["s2seg.sources.stack imports torch.nn"]),
        ({"models/unet.py": "import torch", "__init__.py": "from s2seg.models import unet"}, []),
        ({"helpers.py": ""}, ["s2seg.helpers: layer 'helpers' has no place"]),
    ],
)
def test_the_checker_finds(tmp_path, files, expected):
    root = tmp_path / "s2seg"
    layout = {f"{name}.py": "" for name in ("__init__", "cli", "errors", "legend", "sources/__init__", "sources/stack")}
    for name, text in (layout | files).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    found = complaints(root)
    assert len(found) == len(expected)
    assert all(line.startswith(start) for line, start in zip(found, expected, strict=True))


@pytest.mark.parametrize("module", ["s2seg", "s2seg.cli", "s2seg.sources", "s2seg.testing"])
def test_loads_without_torch_and_matplotlib(module):
    code = f"import sys, {module}; print(*{{'torch', 'matplotlib'}} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stdout.strip()) == (0, ""), run.stderr

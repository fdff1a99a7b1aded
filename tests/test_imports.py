"""Who may import whom. The rooms are layered, and heavy frameworks stay where they belong."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "genscale").rglob("*.py"))

# room -> the rooms it may import directly or through them; errors and rng are open to all
MAY_IMPORT = {
    "errors": (),
    "rng": (),
    "dist": (),
    "runs": (),
    "assembly": (),
    "layers": (),
    "conditioning": ("layers",),
    "flops": ("conditioning",),
    "backbones": ("conditioning", "flops"),
    "objectives": ("backbones",),
    "guidance": ("objectives",),
    "samplers": ("guidance",),
    "io": ("backbones", "autoencoders"),  # converters know both sides of a checkpoint
    "autoencoders": ("layers",),
    "metrics": ("layers", "io", "data"),  # the oracle of scenes
    "upscaling": ("layers", "io", "assembly", "run_weights"),  # weights: of runs, other programs
    "resolution": ("samplers",),
    "data": ("io", "assembly"),  # latents build the data they were made of
    "rewards": ("data", "metrics"),
    "search": ("samplers", "rewards"),
    "report": ("io", "runs"),
    "run_weights": ("io", "runs"),
    "weak_models": ("guidance", "run_weights"),
    "text_cache": ("io",),
    "prompts": ("guidance",),
    "loading": ("text_cache", "autoencoders", "backbones", "assembly", "run_weights"),
    "sample_conditions": ("text_cache", "backbones"),
    "generated": ("search",),
    "sizes": ("backbones",),
    "cascade": ("data", "io"),
    "sample_set": ("cascade",),
    "decoding": ("autoencoders", "resolution", "sizes", "upscaling"),
    "trajectories": ("decoding", "samplers"),
    "pipeline_parts": ("trajectories", "weak_models", "loading", "cascade"),
    "pipeline": (
        *("pipeline_parts", "prompts", "sample_conditions", "sample_set", "generated"),
        *("search", "metrics", "dist"),
    ),
    "evaluation": ("pipeline",),
    "training": ("pipeline", "evaluation", "report"),
    "cli": ("training",),
}

# framework -> the only rooms that know it
ONLY_IN = {
    "hydra": {"cli"},
    "omegaconf": {"cli"},
    "lightning": {"training", "data", "cli"},
    "pytorch_lightning": set(),
    # one wheel that does not fit torch breaks the import of lightning and torchmetrics too
    "torchvision": set(),
    "timm": set(),
    "lpips": set(),
    "torch_fidelity": set(),
}


def room_of(file: Path) -> str:
    first = file.relative_to(ROOT / "genscale").parts[0]
    return first.removesuffix(".py")


def imports(tree: ast.Module, *, typing: bool = True) -> Iterator[tuple[str, bool]]:
    """Yield imported modules, and whether they are imported when the file is."""

    def visit(node: ast.AST, immediate: bool) -> Iterator[tuple[str, bool]]:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            if typing:
                for child in node.body:
                    yield from visit(child, False)
            return
        if isinstance(node, ast.Import):
            yield from ((alias.name, immediate) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            if node.module == "genscale":
                yield from ((f"genscale.{alias.name}", immediate) for alias in node.names)
            else:
                yield node.module or "", immediate
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, immediate and not inside)

    yield from visit(tree, True)


def reachable(room: str) -> set[str]:
    """Return all rooms that ``room`` may import, those of its neighbours included."""
    found: set[str] = set()
    waiting = list(MAY_IMPORT[room])
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += MAY_IMPORT[name]
    return found


@pytest.fixture(scope="module")
def trees() -> dict[Path, ast.Module]:
    return {file: ast.parse(file.read_text(encoding="utf-8")) for file in FILES}


def test_the_layers_have_no_cycle():
    for room in MAY_IMPORT:
        assert room not in reachable(room)


def test_rooms_import_downwards_only(trees):
    wrong = []
    for file, tree in trees.items():
        room = room_of(file)
        if room == "__init__":
            continue  # the public names, imported on first use
        assert room in MAY_IMPORT, f"genscale.{room} is a new room: give it a place in MAY_IMPORT"
        allowed = reachable(room) | {room, "errors", "rng", "__version__"}
        for module, _ in imports(tree, typing=False):
            parts = module.split(".")
            if parts[0] == "genscale" and len(parts) > 1 and parts[1] not in allowed:
                wrong.append(f"{file.relative_to(ROOT)} imports {module}")
    assert wrong == []


def test_frameworks_stay_in_their_rooms(trees):
    wrong = [
        f"{file.relative_to(ROOT)} imports {module}"
        for file, tree in trees.items()
        for module, _ in imports(tree)
        if room_of(file) not in ONLY_IN.get(module.split(".")[0], {room_of(file)})
    ]
    assert wrong == []


def test_scripts_and_tests_avoid_torchvision_and_its_kind():
    never = {name for name, rooms in ONLY_IN.items() if not rooms}
    files = [*ROOT.glob("*.py"), *(ROOT / "scripts").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]
    for file in files:
        found = {module.split(".")[0] for module, _ in imports(ast.parse(file.read_text()))}
        assert not found & never, file


def test_optional_packages_are_imported_where_they_are_needed(trees):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = {re.split(r"[><=\[]", line)[0].lower() for line in project["dependencies"]}
    modules = {"pillow": "PIL", "scikit-learn": "sklearn", "hydra-core": "hydra"}
    known = {modules.get(name, name) for name in required} | {"genscale", *sys.stdlib_module_names}
    wrong = [
        f"{file.relative_to(ROOT)} imports {module} at once"
        for file, tree in trees.items()
        for module, immediate in imports(tree)
        if immediate and module.split(".")[0] not in known
    ]
    assert wrong == []


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("genscale", ("torch", "lightning", "transformers", "numpy", "hydra")),
        ("genscale.cli.entry", ("torch", "lightning", "numpy", "hydra", "rich")),
        ("genscale.report", ("torch", "lightning", "numpy", "matplotlib")),
    ],
)
def test_light_modules_stay_light(module, unwanted):
    code = f"import sys, {module}; print(*[m for m in {unwanted!r} if m in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == []

"""Who may import whom, read off the source: the rooms stay apart."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import zsplg_ray

ROOT = Path(zsplg_ray.__file__).parent
MODULES = {
    ".".join(("zsplg_ray", *path.relative_to(ROOT).with_suffix("").parts)): path
    for path in sorted(ROOT.rglob("*.py"))
}
COMMAND_LINE = {"zsplg_ray.cli", "zsplg_ray.verbs"}
ABOVE_CLUSTER = {*COMMAND_LINE, "zsplg_ray.demo", "zsplg_ray.api"}
PLAIN = (
    *("settings", "config", "vocab", "records", "rundir", "exactly_once", "runinfo", "storage"),
    "filesystems",
    "part_index",
    *("sources", "images", "coco", "masks", "labels", "metrics", "signals"),
    *("safe_text", "safe_yaml", "parquet_texts", "part_check", "label_studio"),
    *("summary", "display", "pace"),
)
"""Modules of the lowest layer."""
MEASURES = "zsplg_ray.label.stages"
"""Part of a benchmark, not of the product: it may look at the scenes of the embedded world."""
NO_TORCH = (
    *PLAIN,
    *("label.segments", "label.compose", "label.textbank", "label.naming"),
    *("views.pictures", "views.review.exporting", "views.review.importing", "views.summaries"),
)


def imports(module: str) -> Iterator[str]:
    """Every name that a module imports, at its top or inside functions."""
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def reaches(module: str, *rooms: str) -> list[str]:
    return [n for n in imports(module) if any(f"{n}.".startswith(f"{room}.") for room in rooms)]


def room(module: str) -> str:
    """label for zsplg_ray.label.sam, "" for a module at the top."""
    parts = module.split(".")
    return parts[1] if len(parts) > 2 else ""


def test_the_walk_sees_the_modules_and_their_imports():
    assert {"zsplg_ray.cli", "zsplg_ray.label.sam", "zsplg_ray.cluster.label"} <= MODULES.keys()
    assert "ray" in reaches("zsplg_ray.cluster.pipeline", "ray")
    assert reaches("zsplg_ray.verbs", "zsplg_ray.cluster"), "imports inside functions are seen"
    assert not reaches("zsplg_ray.verbs", "ray"), "a name that only starts alike"


@pytest.mark.parametrize("module", MODULES)
def test_only_cluster_knows_ray_and_mlflow(module):
    if room(module) != "cluster":
        assert not reaches(module, "ray", "mlflow")
        if module not in ABOVE_CLUSTER:
            assert not reaches(module, "zsplg_ray.cluster")


@pytest.mark.parametrize("module", MODULES)
def test_rooms_look_downwards_only(module):
    above = {
        "label": ("student", "views", "shapes.train", "shapes.scenes"),
        "student": ("label", "views", "shapes"),
        "shapes": ("student", "views"),
        "views": (),
        "config": ("label", "student", "views", "shapes", "cluster", "verbs"),
        "cluster": (),
    }
    if module == MEASURES:
        above["label"] = ("student", "views", "shapes.train")
    if room(module):
        forbidden = (*above[room(module)], "cli", "verbs", "demo")
    elif module in (*ABOVE_CLUSTER, "zsplg_ray.__init__"):
        return
    else:
        forbidden = ("label", "student", "views", "shapes", "cli", "verbs", "demo")
    assert not reaches(module, *(f"zsplg_ray.{name}" for name in forbidden))


@pytest.mark.parametrize("module", MODULES)
def test_only_the_command_line_prints(module):
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    prints = [f.lineno for f in calls if isinstance(f, ast.Name) and f.id == "print"]
    assert not prints or module in COMMAND_LINE


def test_the_lowest_layer_runs_without_torch_and_ray():
    names = [f"zsplg_ray.{name}" for name in NO_TORCH]
    look = f"import sys, {', '.join(names)}; print({{'torch', 'ray', 'mlflow'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


@pytest.mark.parametrize("package", ["zsplg_ray", "zsplg_ray.label", "zsplg_ray.views"])
def test_packages_import_nothing_by_themselves(package):
    assert not list(imports(f"{package}.__init__"))

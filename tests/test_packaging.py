"""What is built and shipped, and which way imports point."""

import ast
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {"eqx_dynloss": ROOT / "eqx_dynloss", "eqx_dynloss_kernels": ROOT / "kernels" / "eqx_dynloss_kernels"}
SOURCES = sorted(path for folder in ("eqx_dynloss", "kernels", "experiments") for path in (ROOT / folder).rglob("*.py"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel's path, built by the backend itself: no isolated environment, no network."""
    target = tmp_path_factory.mktemp("wheel")
    program = f"import hatchling.build; print(hatchling.build.build_wheel({str(target)!r}))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target / done.stdout.split()[-1]


def test_the_wheel_holds_exactly_the_two_packages(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == set(PACKAGES)
    assert len(top) == 3
    modules = {name for name in names if name.endswith(".py")}
    expected = {
        f"{package}/{path.relative_to(folder).as_posix()}"
        for package, folder in PACKAGES.items()
        for path in folder.rglob("*.py")
    }
    assert modules == expected
    assert {f"{package}/py.typed" for package in PACKAGES} <= set(names)
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_the_unpacked_wheel_imports_without_the_source_tree(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "unpacked")
    (tmp_path / "elsewhere").mkdir()
    program = """
import eqx_dynloss.ensemble, eqx_dynloss.loss, eqx_dynloss.models, eqx_dynloss.schedule, eqx_dynloss.train
import eqx_dynloss_kernels, importlib.util, sys
print(eqx_dynloss.loss.__file__)
print(eqx_dynloss_kernels.__file__)
print(*(name for name in ("tyro", "rich", "xarray", "matplotlib", "tensorflow_datasets") if name in sys.modules))
assert importlib.util.find_spec("experiments") is None
"""
    # -S leaves out the .pth file of an editable install; the dependencies are then found by their directories alone.
    sites = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    path = os.pathsep.join([str(tmp_path / "unpacked"), *sites])
    done = subprocess.run(
        [sys.executable, "-S", "-W", "error", "-c", program],
        cwd=tmp_path / "elsewhere",
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    loss, kernels, heavy = done.stdout.split("\n")[:3]
    assert Path(loss) == tmp_path / "unpacked" / "eqx_dynloss" / "loss.py"
    assert Path(kernels) == tmp_path / "unpacked" / "eqx_dynloss_kernels" / "__init__.py"
    assert heavy == ""  # what only the experiments need


def imported(path: Path) -> set[str]:
    """Dotted names of everything that a file imports, at its top or inside a function."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def relative_imports_that_leave(path: Path, package: Path) -> list[str]:
    depth = len(path.relative_to(package).parts)
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom) and node.level > depth]


@pytest.mark.parametrize("package, banned", [
    ("eqx_dynloss", {"experiments", "tests", "benchmarks"}),
    ("eqx_dynloss_kernels", {"eqx_dynloss", "experiments", "tests", "benchmarks"}),
])  # fmt: skip
def test_the_arrows_point_one_way(package, banned):
    files = sorted(PACKAGES[package].rglob("*.py"))
    assert files
    for path in files:
        roots = {name.split(".")[0] for name in imported(path)}
        assert not roots & banned, path
        assert not relative_imports_that_leave(path, PACKAGES[package]), path


# The rooms of experiments/, from the lowest up; commands are on top, side by side, and above them the one that joins
# what they have left.
ROOMS = ("results", "running", "problems")
EXPERIMENTS = ROOT / "experiments"
COMMANDS = sorted(path.parent.name for path in EXPERIMENTS.glob("*/__main__.py"))


def rooms_entered(path: Path) -> set[str]:
    """The rooms of experiments/ that a file in one of them imports from, without its own."""
    own, found = path.parent.name, set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == 2:
            found |= {node.module.split(".")[0]} if node.module else {alias.name for alias in node.names}
        assert not (isinstance(node, ast.ImportFrom) and node.level > 2), path
    return (found | {name.split(".")[1] for name in imported(path) if name.startswith("experiments.")}) - {own}


@pytest.mark.parametrize("path", sorted(EXPERIMENTS.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_of_the_experiments_go_down(path):
    """No command imports another, and no room one above it."""
    room = path.parent.name
    if path.parent == EXPERIMENTS:
        assert path.name == "__init__.py" and not imported(path)
        return
    assert room in (*ROOMS, *COMMANDS)
    commands = [name for name in COMMANDS if name != room] if room == "merge" else []
    below = ROOMS[: ROOMS.index(room)] if room in ROOMS else [*ROOMS, *commands]
    assert rooms_entered(path) <= set(below)
    assert not {name.split(".")[0] for name in imported(path)} & {"tests", "benchmarks", "eqx_dynloss_kernels"}


def test_tests_mirror_the_rooms():
    rooms = {path.name for path in EXPERIMENTS.iterdir() if (path / "__init__.py").exists()}
    assert rooms == {*ROOMS, *COMMANDS}
    assert COMMANDS == ["bifurcation", "cifar", "compare", "landscape", "merge", "phase", "regions", "sizes", "spiral"]
    assert {path.parent.name for path in (ROOT / "tests" / "experiments").glob("*/test_*.py")} == rooms


def test_the_kernels_need_only_jax():
    for path in PACKAGES["eqx_dynloss_kernels"].rglob("*.py"):
        roots = {name.split(".")[0] for name in imported(path)}
        assert roots - set(sys.stdlib_module_names) <= {"jax", "eqx_dynloss_kernels", "jaxtyping", "numpy"}, path


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_private_api_of_jax(path):
    assert not [name for name in imported(path) if f"{name}.".startswith("jax._src.")]
    assert "jax._src" not in path.read_text(encoding="utf-8")


def test_no_package_shadows_the_one_called_kernels():
    assert not (ROOT / "kernels" / "__init__.py").exists()

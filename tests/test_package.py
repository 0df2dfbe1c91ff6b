"""The package as it is laid out, imported, installed and pinned."""

import ast
import importlib
import json
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPO = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((REPO / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
PACKAGES: list[str] = PYPROJECT["tool"]["setuptools"]["packages"]
# Longest name first: "lightning_kd" is the parent of the others.
FOLDERS: dict[str, str] = dict(
    sorted(PYPROJECT["tool"]["setuptools"]["package-dir"].items(), key=lambda item: -len(item[0]))
)
MAPPED = {name: folder for name, folder in FOLDERS.items() if name != folder}
SOURCES = sorted(path for folder in FOLDERS.values() for path in (REPO / folder).rglob("*.py"))

# Installed by an extra, so imported late: by the function that needs it and not with the package.
TASK_LIBRARIES = {
    "anomalib", "matplotlib", "mmcv", "mmdet", "mmengine", "mmpose", "onnx", "onnxruntime", "onnxscript",
    "pandas", "PIL", "scipy", "segmentation_models_pytorch", "sentence_transformers", "sklearn",
    "tensorboard", "timm", "torchvision", "transformers",
}  # fmt: skip
# What importing a base dependency may bring along is no concern of ours; it is measured, not listed.
BASE = "import lightning.pytorch, lightning.pytorch.cli, torchmetrics, jsonargparse"


def module_name(path: Path) -> str:
    """Spell the import name of a source file, through the folder mapping."""
    for name, folder in FOLDERS.items():
        if (REPO / folder) in path.parents:
            parts = path.relative_to(REPO / folder).with_suffix("").parts
            return ".".join([name, *(part for part in parts if part != "__init__")])
    raise AssertionError(f"{path} lies in no package folder")


def imported_names(nodes: Iterator[ast.AST], package: str) -> Iterator[str]:
    """Yield every module that import statements among `nodes` name, relative ones made absolute."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base]).rstrip(".")
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def top_level(node: ast.AST) -> Iterator[ast.AST]:
    """Walk what runs when a module is imported: all but function bodies and `if TYPE_CHECKING:`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            continue
        yield child
        yield from top_level(child)


def package_of(path: Path) -> str:
    name = module_name(path)
    return name if path.name == "__init__.py" else name.rpartition(".")[0]


def is_in(name: str, roots: set[str]) -> bool:
    return any(name == root or name.startswith(root + ".") for root in roots)


def run_python(code: str, *options: str, cwd: Path = REPO) -> str:
    done = subprocess.run(
        [sys.executable, *options, "-c", code],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# --- layout


def test_packages_are_the_folders_that_exist() -> None:
    # An unlisted sub-package works when editable and is missing from the wheel.
    existing = {module_name(path) for path in SOURCES if path.name == "__init__.py"}
    with_code = {package_of(path) for path in SOURCES}
    assert set(PACKAGES) == existing
    assert with_code <= existing, f"no __init__.py in {with_code - existing}"
    assert len(PACKAGES) == len(set(PACKAGES))


@pytest.mark.parametrize("folder", sorted(MAPPED.values()))
def test_mapped_folders_are_flat(folder: str) -> None:
    nested = [path for path in (REPO / folder).glob("*/*") if "__pycache__" not in path.parts]
    assert not nested


@pytest.mark.parametrize("folder", sorted(MAPPED.values()))
def test_type_checkers_see_the_mapping(folder: str) -> None:
    link = REPO / "typings" / "lightning_kd" / folder
    assert link.is_symlink()
    assert not link.readlink().is_absolute()
    assert link.resolve() == REPO / folder
    assert f"lightning_kd.{folder}" in PYPROJECT["tool"]["mypy"]["packages"]


# --- imports


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_imports_point_one_way(path: Path) -> None:
    tree = ast.parse(path.read_text())
    names = set(imported_names(ast.walk(tree), package_of(path)))
    if MAPPED.keys() & {package_of(path)}:
        return  # tasks, callbacks and configs may import the core
    runtime = names
    if module_name(path) == "lightning_kd":  # a type checker may follow the lazy doors
        runtime = set(imported_names(top_level(tree), "lightning_kd"))
    wrong = {name for name in runtime if is_in(name, set(MAPPED))}
    assert not wrong, f"{module_name(path)} imports {wrong}: the core knows no task, callback or config"


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_task_libraries_are_imported_late(path: Path) -> None:
    names = imported_names(top_level(ast.parse(path.read_text())), package_of(path))
    early = {name for name in names if is_in(name, TASK_LIBRARIES)}
    assert not early, f"move {early} into the function that needs it"


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_imports_are_declared_dependencies(path: Path) -> None:
    names = {name.split(".")[0] for name in imported_names(ast.walk(ast.parse(path.read_text())), package_of(path))}
    needed = names - sys.stdlib_module_names - {"lightning_kd"}
    # A user's project may have the other spelling of Lightning; the engine asks for it and never needs it.
    declared = {canonicalize_name(Requirement(line).name) for line in all_requirements()} | {"pytorch-lightning"}
    import_names = {
        "sklearn": "scikit-learn",
        "yaml": "jsonargparse",
        "PIL": "torchvision",
        "mmcv": "mmcv-lite",
        "numpy": "torchmetrics",
        "triton": "torch",
    }
    undeclared = {name for name in needed if canonicalize_name(import_names.get(name, name)) not in declared}
    assert not undeclared, f"name what installs {undeclared} in pyproject.toml"


@pytest.mark.parametrize("statement", ["import lightning_kd", "from lightning_kd import Distillation"])
def test_import_brings_no_task_library(statement: str) -> None:
    code = f"""
import json, sys
{BASE}
before = set(sys.modules)
{statement}
import lightning_kd.tasks, lightning_kd.callbacks, lightning_kd.configs, lightning_kd.cli
new = {{name.split('.')[0] for name in set(sys.modules) - before}}
print(json.dumps(sorted(new & set({sorted(TASK_LIBRARIES)}))))
"""
    assert json.loads(run_python(code)) == []


# --- public names


CONTRACT = {
    "lightning_kd": {
        "Distillation", "DistillationModule", "Distiller", "Term",
        "functional", "losses", "projectors", "schedules", "teachers",
    },
    "lightning_kd.losses": {
        "AT", "CRD", "DIST", "DKD", "FitNet", "KD", "NKD", "OFA", "PKT", "PLD", "RKD", "SP", "VID",
    },
    "lightning_kd.tasks": {"Classification", "TaskAdapter"},
    "lightning_kd.callbacks": {"Distillation", "TemperatureScheduler", "WeightScheduler"},
}  # fmt: skip


@pytest.mark.parametrize(("package", "names"), CONTRACT.items(), ids=CONTRACT)
def test_contract_names_are_public(package: str, names: set[str]) -> None:
    module = importlib.import_module(package)
    assert names <= set(module.__all__)


@pytest.mark.parametrize("package", PACKAGES)
def test_all_is_true(package: str) -> None:
    module = importlib.import_module(package)
    public = list(getattr(module, "__all__", []))
    assert len(public) == len(set(public))
    missing = [name for name in public if not hasattr(module, name)]
    assert not missing


def test_lazy_doors_are_the_same_objects() -> None:
    code = "import lightning_kd, lightning_kd.callbacks as c; assert lightning_kd.Distillation is c.Distillation"
    run_python(code)


def test_unknown_public_name_is_an_attribute_error() -> None:
    module = importlib.import_module("lightning_kd")
    with pytest.raises(AttributeError, match="no_such_door"):
        _ = module.no_such_door


# --- what is built


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Build wheel and sdist of what git tracks, with the build tools that are installed."""
    root = tmp_path_factory.mktemp("dist")
    source = root / "source"
    for name in tracked_files():
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (REPO / name).is_symlink():
            target.symlink_to((REPO / name).readlink())
        else:
            target.write_bytes((REPO / name).read_bytes())
    done = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(root), str(source)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = root.glob("*.whl")
    (sdist,) = root.glob("*.tar.gz")
    return {"wheel": wheel, "sdist": sdist}


def shipped_files() -> set[str]:
    """List every file that a user must receive, as paths below `site-packages`."""
    files = {"lightning_kd/py.typed"}
    for folder in FOLDERS.values():
        for name in tracked_files(folder):
            if name.endswith((".py", ".yaml")):
                files.add(f"lightning_kd/{name}" if folder in MAPPED.values() else name)
    return files


@pytest.mark.slow
def test_wheel_is_complete(built: dict[str, Path]) -> None:
    names = {name for name in zipfile.ZipFile(built["wheel"]).namelist() if ".dist-info/" not in name}
    assert names == shipped_files()


@pytest.mark.slow
def test_sdist_is_complete(built: dict[str, Path]) -> None:
    with tarfile.open(built["sdist"]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    source = {name for folder in FOLDERS.values() for name in tracked_files(folder)}
    assert source | {"pyproject.toml", "README.md", "LICENSE"} <= names


@pytest.mark.slow
def test_wheel_works_when_installed(built: dict[str, Path], tmp_path: Path) -> None:
    with zipfile.ZipFile(built["wheel"]) as wheel:  # what an installer does with a pure wheel
        wheel.extractall(tmp_path / "site")
    code = f"""
import sys
sys.meta_path = [f for f in sys.meta_path if not getattr(f, "__module__", "").startswith("__editable__")]
sys.path.insert(0, {str(tmp_path / "site")!r})
import importlib, importlib.resources
for name in {PACKAGES}:
    module = importlib.import_module(name)
    assert module.__file__.startswith({str(tmp_path / "site")!r}), module.__file__
configs = importlib.resources.files("lightning_kd.configs").iterdir()
print(sum(path.name.endswith(".yaml") for path in configs))
"""
    assert run_python(code, cwd=tmp_path) == str(len(tracked_files("configs", ".yaml")))


@pytest.mark.slow
def test_wheel_metadata(built: dict[str, Path]) -> None:
    with zipfile.ZipFile(built["wheel"]) as wheel:
        (metadata,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        text = wheel.read(metadata).decode()
    assert "\nLicense-Expression: Apache-2.0\n" in text
    assert "\nLicense-File: LICENSE\n" in text
    for extra in PROJECT["optional-dependencies"]:
        assert f"\nProvides-Extra: {extra}\n" in text


# --- what is pinned


def all_requirements() -> list[str]:
    extras = PROJECT["optional-dependencies"].values()
    return [*PROJECT["dependencies"], *(line for lines in extras for line in lines)]


def test_constraints_are_names_and_versions_alone() -> None:
    lines = (REPO / "constraints.txt").read_text().splitlines()
    pattern = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*==[0-9][0-9a-z.]*")
    assert [line for line in lines if not pattern.fullmatch(line)] == []
    names = [line.partition("==")[0] for line in lines]
    assert names == sorted(set(names))


def test_constraints_cover_every_dependency() -> None:
    pinned = dict(line.split("==") for line in (REPO / "constraints.txt").read_text().splitlines())
    for line in all_requirements():
        requirement = Requirement(line)
        name = canonicalize_name(requirement.name)
        if name == PROJECT["name"]:
            assert requirement.extras <= set(PROJECT["optional-dependencies"])
            continue
        assert name in pinned, f"{name} is not in constraints.txt"
        assert pinned[name] in requirement.specifier, f"{line} excludes {name}=={pinned[name]}"


def test_every_dependency_has_a_lower_bound() -> None:
    for line in all_requirements():
        requirement = Requirement(line)
        if canonicalize_name(requirement.name) != PROJECT["name"]:
            assert {part.operator for part in requirement.specifier} & {">=", "=="}, line


def test_all_extra_has_every_user_extra() -> None:
    extras = set(PROJECT["optional-dependencies"]) - {"all", "dev", "docs"}
    (line,) = PROJECT["optional-dependencies"]["all"]
    assert Requirement(line).extras == extras


# --- what is tracked


def tracked_files(folder: str = ".", suffix: str = "") -> list[str]:
    """List what git tracks and what it would track, so that a new file counts before it is added."""
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z", folder],
        cwd=REPO,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    names = [name for name in listing.split("\0") if name.endswith(suffix) and name]
    return [name for name in names if (REPO / name).is_symlink() or (REPO / name).is_file()]


# Put together here, so that this file does not match itself.
FORBIDDEN = re.compile(
    "|".join(
        [r"(?<![\w.~/-])/" + rf"(?:{name})/" for name in ("home", "Users", "root", "work", "tmp", "opt", "mnt")]
        + ["pypi" + r"\.org", "pythonhosted" + r"\.org", "--" + "(?:extra-)?index-url", "find" + "-links"]
        + ["file" + "://", r"(?:127\.0\.0" + r"\.1|local" + "host):"]
    )
)


def test_no_path_or_host_of_a_machine() -> None:
    found = []
    for name in tracked_files():
        path = REPO / name
        if path.is_symlink():
            continue
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue  # an image
        found += [
            f"{name}:{number}: {line.strip()[:120]}"
            for number, line in enumerate(text.splitlines(), start=1)
            if FORBIDDEN.search(line)
        ]
    assert found == []


@pytest.mark.parametrize("line", ["see /" + "home/me/x", "cd /" + "tmp/x", "index https://pypi" + ".org/simple"])
def test_the_search_for_paths_finds_them(line: str) -> None:
    assert FORBIDDEN.search(line)


def test_no_large_file() -> None:
    sizes = {name: (REPO / name).stat().st_size for name in tracked_files()}
    assert {name: size for name, size in sizes.items() if size > 1_000_000} == {}

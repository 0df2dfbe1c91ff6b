"""Every example in the README, in `docs/` and in a docstring runs; every generated table and message is complete."""

import ast
import doctest
import importlib
import importlib.util
import pkgutil
import re
import shlex
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel

import lightning_kd
from lightning_kd import cli

REPO = Path(__file__).parents[1]
PAGES = [REPO / "README.md", REPO / "CONTRIBUTING.md", *sorted((REPO / "docs").rglob("*.md"))]
MODULES = sorted(module.name for module in pkgutil.walk_packages(lightning_kd.__path__, prefix="lightning_kd."))
FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>[^\s`]+)(?P<options>[^\n]*)\n(?P<body>.*?)^(?P=indent)```$", re.M | re.S
)
TITLE = re.compile(r'title="(?P<name>[^"]+)"')
LANGUAGES = {"python", "bash", "yaml", "text"}  # each but the last is run or parsed below


@dataclass(frozen=True)
class Block:
    language: str
    title: str  # of `title="name"` after the language; the name of the file that the block shows
    body: str
    line: int

    def save(self, folder: Path) -> Path:
        path = folder / (self.title or f"line_{self.line}.yaml")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.body)
        return path


def blocks(page: Path, *languages: str) -> list[Block]:
    """Find the fenced blocks of a page."""
    text = page.read_text()
    found = []
    for match in FENCE.finditer(text):
        title = TITLE.search(match["options"])
        line = text.count("\n", 0, match.start("body"))
        body = textwrap.dedent(match["body"])
        found.append(Block(match["language"], title["name"] if title else "", body, line))
    return [block for block in found if not languages or block.language in languages]


def pages_with(*languages: str) -> list[object]:
    found = [page for page in PAGES if blocks(page, *languages)]
    return [pytest.param(page, id=str(page.relative_to(REPO))) for page in found]


def config_blocks(page: Path) -> Iterator[Block]:
    """Yield the YAML blocks that are whole configurations: those with a `model`."""
    for block in blocks(page, "yaml"):
        content = yaml.safe_load(block.body)
        if isinstance(content, dict) and "model" in content:
            yield block


def commands(page: Path) -> Iterator[list[str]]:
    """Yield the arguments of each `lightning-kd` call in a page's bash blocks."""
    for block in blocks(page, "bash"):
        for line in block.body.replace("\\\n", " ").splitlines():
            for command in re.split(r"&&|\|\||;|\|", line):
                words = shlex.split(command, comments=True)
                if words and words[0] == "lightning-kd":
                    yield words[1:]


def call_cli(*args: str) -> None:
    """Call the command in this process; argparse ends `--help` and `--print_config` by `SystemExit`."""
    try:
        code = cli.main(list(args))
    except SystemExit as done:
        code = done.code
    assert code in (0, None), args


@pytest.mark.parametrize("page", [pytest.param(page, id=page.name) for page in PAGES])
def test_no_block_escapes(page: Path) -> None:
    opened = re.findall(r"^ *```(?!$)", page.read_text(), re.M)
    assert len(opened) == len(blocks(page))
    assert {block.language for block in blocks(page)} <= LANGUAGES


@pytest.mark.parametrize("page", pages_with("python"))
def test_python_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a page from top to bottom as the one script that a reader would make of it."""
    script = ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", script)  # classes of the page pickle
    monkeypatch.chdir(tmp_path)
    for block in blocks(page, "python"):
        exec(compile("\n" * block.line + block.body, page, "exec"), vars(script))  # with the page's line numbers


@pytest.mark.parametrize("page", pages_with("yaml"))
def test_yaml_parses(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for block in blocks(page, "yaml"):
        assert yaml.safe_load(block.body) is not None
    for block in config_blocks(page):
        call_cli("fit", "--config", str(block.save(tmp_path)), "--print_config")


def test_the_callback_is_made_of_its_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    (block,) = (each for each in blocks(REPO / "docs" / "doors.md", "yaml") if each.title == "callback.yaml")
    given = ["--config", str(block.save(tmp_path)), "--trainer.logger=false", "--trainer.accelerator=cpu"]
    cli = LightningCLI(BoringModel, BoringDataModule, args=given, run=False, seed_everything_default=0)
    (callback,) = (each for each in cli.trainer.callbacks if isinstance(each, lightning_kd.Distillation))
    assert isinstance(callback.distiller.teacher, lightning_kd.teachers.Frozen)
    assert callback.distiller.terms["kd"].weight == 0.9


@pytest.mark.parametrize("page", [param for param in pages_with("bash") if list(commands(param.values[0]))])  # type: ignore[attr-defined]
def test_commands_parse(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for block in config_blocks(page):
        block.save(tmp_path)
    for subcommand, *args in commands(page):
        if subcommand in {"fit", "validate", "test", "predict"}:
            call_cli(subcommand, *args, "--print_config")
            continue
        settings = [
            i for i, arg in enumerate(args) if re.match(r"--(trainer|model|data)\.", arg)
        ]  # the configuration's
        if settings:
            config = args[args.index("--config") + 1]
            call_cli("fit", "--config", config, *(each for i in settings for each in args[i : i + 2]), "--print_config")
        capsys.readouterr()
        call_cli(subcommand, "--help")
        options = {arg.partition("=")[0] for i, arg in enumerate(args) if arg.startswith("--") and i not in settings}
        assert options <= set(re.findall(r"--[\w.-]+", capsys.readouterr().out)), (subcommand, options)


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    result = doctest.testmod(importlib.import_module(name), optionflags=flags)
    assert result.failed == 0


# --- what docs/hooks.py generates


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_hooks", REPO / "docs" / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_loss_table_is_complete(hooks: ModuleType) -> None:
    losses = importlib.import_module("lightning_kd.losses")
    rows = [re.split(r"\s*(?<!\\)\|\s*", row)[1:-1] for row in hooks.table("losses").splitlines()[2:]]
    assert [row[0] for row in rows] == [f"`{name}`" for name in losses.__all__]
    for name, what, source, test in rows:
        assert len(what) > 10, name
        assert source.startswith("["), f"{name}: the docstring names no paper (arXiv id) and no page"
        assert test, f"{name}: no test mirrors its file"


def test_pages_hold_no_unfilled_table(hooks: ModuleType) -> None:
    asked = {
        match
        for page in PAGES
        for match in re.findall(hooks.MARKER.format("(.*?)"), page.read_text())
    }  # fmt: skip
    assert "losses" in asked
    assert asked <= set(hooks.COLLECTIONS)


def test_every_loss_and_its_paper_is_listed_once(hooks: ModuleType) -> None:
    losses = importlib.import_module("lightning_kd.losses")
    assert list(hooks.exports(losses)) == list(losses.__all__)


def test_every_page_is_in_the_navigation() -> None:
    nav = yaml.safe_load((REPO / "mkdocs.yml").read_text())["nav"]
    listed = [page for entry in nav for page in entry.values()]
    assert sorted(listed) == sorted(page.relative_to(REPO / "docs").as_posix() for page in PAGES[2:])


# --- docs/troubleshooting.md and the code


SOURCES = [path for folder in ("lightning_kd", "callbacks", "tasks") for path in sorted((REPO / folder).rglob("*.py"))]
VARIES = "…"


def message(node: ast.expr) -> str:
    """Return the text of a string in the source, with a mark for what an f-string fills in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    parts = node.values if isinstance(node, ast.JoinedStr) else []
    return "".join(str(part.value) if isinstance(part, ast.Constant) else VARIES for part in parts)


def raised_messages() -> dict[str, str]:
    """Return the first argument of everything named `...Error(...)`, and of `add_note`, with its place."""
    found = {}
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and node.args:
                name = getattr(node.func, "attr", getattr(node.func, "id", ""))
                if name.endswith("Error") or name == "add_note":
                    found[message(node.args[0])] = f"{path.relative_to(REPO)}:{node.lineno}"
    return found


def says(text: str, documented: str) -> bool:
    """Whether the documented pieces stand in a message, in their order."""
    position = 0
    for piece in filter(None, documented.split(VARIES)):
        position = text.find(piece, position)
        if position < 0:
            return False
        position += len(piece)
    return True


def test_troubleshooting_and_the_code_say_the_same() -> None:
    page = (REPO / "docs" / "troubleshooting.md").read_text()
    documented = [row.split("`")[1] for row in page.splitlines() if row.startswith("| `")]
    raised = raised_messages()
    assert len(documented) > 50
    invented = [said for said in documented if not any(says(text, said) for text in raised)]
    assert not invented, "documented, but raised nowhere"
    # What only passes another message on (`Term 'kd': ...`) has no words of its own.
    own_words = {text: place for text, place in raised.items() if len(text.replace(VARIES, "")) > 10}
    missing = {place: text for text, place in own_words.items() if not any(says(text, said) for said in documented)}
    assert not missing, "raised, but not in docs/troubleshooting.md"

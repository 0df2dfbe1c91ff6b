"""What the documentation generates from the code, so that it cannot differ from it."""

import atexit
import importlib
import inspect
import re
import shutil
import tempfile
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority

REPO = Path(__file__).parents[1]
MARKER = "<!-- table of {} -->"
COLLECTIONS = ["losses", "teachers", "tasks", "callbacks", "projectors", "schedules"]
ARXIV = re.compile(r"(?:arXiv[:\s]+|arxiv\.org/abs/)(?P<id>\d{4}\.\d{4,5})", re.IGNORECASE)
SOURCE = re.compile(r"https?://[^\s<>)\]`]+")


def exports(module: ModuleType) -> dict[str, type]:
    """Return the classes that a module offers, in the order of its `__all__`."""
    members = {name: getattr(module, name) for name in module.__all__}
    return {name: member for name, member in members.items() if inspect.isclass(member)}


def summary(member: type) -> str:
    """Return the first paragraph of a docstring as one line, without reST roles."""
    paragraph = inspect.cleandoc(member.__doc__ or "").split("\n\n")[0]
    return re.sub(r":\w+:`([^`]*)`", r"`\1`", " ".join(paragraph.split())).replace("``", "`").replace("|", "\\|")


def source(member: type) -> str:
    """Return links to the papers, or else to the page, that the docstring or its module names."""
    text = (member.__doc__ or "") + "\n" + (inspect.getmodule(member).__doc__ or "")  # type: ignore[union-attr]
    papers = dict.fromkeys(match["id"] for match in ARXIV.finditer(text))
    if papers:
        return ", ".join(f"[arXiv:{paper}](https://arxiv.org/abs/{paper})" for paper in papers)
    page = SOURCE.search(text)
    return f"[source]({page[0].rstrip('.,;')})" if page else ""


def test_file(member: type) -> str:
    """Return the test that mirrors the file of a member, or an empty string when there is none."""
    parts = member.__module__.removeprefix("lightning_kd.").split(".")
    path = Path("tests", *parts[:-1], f"test_{parts[-1]}.py")
    return f"`{path}`" if (REPO / path).exists() else ""


def table(collection: str) -> str:
    """Write the Markdown table of everything that `lightning_kd.<collection>` exports."""
    module = importlib.import_module(f"lightning_kd.{collection}")
    rows = ["| Name | What it does | Source | Test |", "|---|---|---|---|"]
    for name, member in exports(module).items():
        rows.append(f"| `{name}` | {summary(member)} | {source(member)} | {test_file(member)} |")
    return "\n".join(rows)


@event_priority(100)  # before mkdocstrings reads its paths
def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Show mkdocstrings, which reads files, the package as it is installed; called by mkdocs."""
    setuptools = tomllib.loads((REPO / "pyproject.toml").read_text())["tool"]["setuptools"]
    site = Path(tempfile.mkdtemp(prefix="lightning-kd-docs-"))
    atexit.register(shutil.rmtree, site)
    package = site / "lightning_kd"
    package.mkdir()
    mapped = [REPO / folder for name, folder in setuptools["package-dir"].items() if "." in name]
    for entry in [*(REPO / "lightning_kd").iterdir(), *mapped]:
        (package / entry.name).symlink_to(entry, target_is_directory=entry.is_dir())
    config.plugins["mkdocstrings"].config["handlers"]["python"]["paths"] = [str(site)]
    return config


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the tables where a page asks for them; called by mkdocs."""
    for collection in COLLECTIONS:
        marker = MARKER.format(collection)
        if marker in markdown:
            markdown = markdown.replace(marker, table(collection))
    return markdown

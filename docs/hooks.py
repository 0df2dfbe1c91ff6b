"""What the documentation generates from the code, so that it cannot differ from it."""

import importlib
import inspect
import re
from pathlib import Path
from types import ModuleType
from typing import Any

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


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the tables where a page asks for them; called by mkdocs."""
    for collection in COLLECTIONS:
        marker = MARKER.format(collection)
        if marker in markdown:
            markdown = markdown.replace(marker, table(collection))
    return markdown

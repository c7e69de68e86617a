"""What README.md, CONTRIBUTING.md and docs/ point to is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = ["configs", "docs", "qwantize_vllm", "scripts", "serve_examples", "tests"]
FILES = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file()]


def text_of(document: Path) -> str:
    """Without blocks of code, in which `#` begins a comment."""
    return re.sub(r"^```.*?^```", "", document.read_text(), flags=re.S | re.M)


def anchors(document: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", text_of(document), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(document: Path) -> list[str]:
    broken = []
    for link in re.findall(r"\]\(([^)]+)\)", text_of(document)):
        path, _, anchor = link.partition("#")
        target = document.parent / path if path else document
        if link.startswith("https://"):
            continue
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    return broken


def missing_files(document: Path) -> list[str]:
    """Of the names of files, with folders or without, those that no file's path ends with; links aside."""
    text = re.sub(r"\]\([^)]*\)", "]", document.read_text())
    names = re.findall(r"(?<![\w/.-])((?:[\w.-]+/)*[\w-]+\.(?:py|yaml|sh|md))(?!\w)", text)
    return [name for name in names if not any(path.as_posix().endswith(f"/{name}") for path in [*DOCUMENTS, *FILES])]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_files_are_there(document):
    assert broken_links(document) == []
    assert missing_files(document) == []


def test_there_are_documents_in_their_folder():
    assert len(DOCUMENTS) > 2


def test_what_is_not_there_is_found(tmp_path):
    document = tmp_path / "document.md"
    document.write_text(
        "# A title: `code` and more\n[a](#a-title-code-and-more) [b](#b) [c](document.md) [d](other.md)\n"
        "```\n# no heading\n```\n[e](#no-heading) [f](https://example.com/none#g)\n"
        "`scripts/load_time.py` `scripts/no.py` `load_time.py` `no.py` `e2e/load_time.py`"
    )
    assert broken_links(document) == ["#b", "other.md", "#no-heading"]
    assert missing_files(document) == ["scripts/no.py", "no.py", "e2e/load_time.py"]

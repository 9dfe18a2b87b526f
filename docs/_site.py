"""A hook of mkdocs: pages link to files outside docs/, and the links work on the site too."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

import esmm_torchrec

ROOT = Path(__file__).parents[1]
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "CHANGELOG.md": "CHANGELOG.md",
}
FOLDERS = {"datasets": "*.md", "examples": "**/*.*", "benchmarks": "*.py"}


def on_files(files: Files, config: Any) -> Files:
    """Adds the README as the home page, and what pages link to outside docs/."""
    for source, page in PAGES.items():
        text = (ROOT / source).read_text().replace("](docs/", "](").replace("README.md", "index.md")
        files.append(File.generated(config, page, content=text))
    files.append(File.generated(config, "LICENSE", abs_src_path=str(ROOT / "LICENSE")))
    for folder, pattern in FOLDERS.items():
        for path in sorted((ROOT / folder).glob(pattern)):
            if path.suffix in (".md", ".py", ".yaml"):
                name = path.relative_to(ROOT).as_posix()
                files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def public_names() -> str:
    """The part of the API page that follows from `__all__`: a section for each folder."""
    sections: dict[str, list[str]] = {}
    for name in esmm_torchrec.__all__:
        module = getattr(esmm_torchrec, name).__module__.split(".")
        sections.setdefault(module[1].capitalize(), []).append(f"::: esmm_torchrec.{name}\n")
    return "\n".join("\n".join([f"## {title}\n", *names]) for title, names in sections.items())


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Rewrites links from docs/ to the files beside it."""
    if page.file.src_uri == "api.md":
        return f"{markdown}\n{public_names()}"
    if page.file.src_uri.startswith("datasets/"):
        return markdown.replace("](../docs/", "](../")
    markdown = re.sub(r"\[([^]]+)\]\(\.\./[^).#]+\)", r"\1", markdown)  # a folder has no page
    return re.sub(r"\]\(\.\./", "](", markdown).replace("](README.md", "](index.md")

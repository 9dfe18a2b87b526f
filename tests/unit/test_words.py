"""The glossary of CONTRIBUTING.md, checked against every text of the project."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

FOLDERS = ("esmm_torchrec", "docs", "datasets", "examples", "benchmarks")
TEXTS = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    *(
        path
        for folder in FOLDERS
        for path in sorted((ROOT / folder).rglob("*"))
        if path.suffix in (".py", ".md", ".jinja", ".yaml")
    ),
]

UNITS = (
    r"weights|milliseconds|ms|[GM]i?B|Gb/s|bytes|figures|values|updates|impressions|rows|lines?|"
    r"shards?"
)

NOUNS = r"folder|file|ids?|number|integer|method|sample|multiple|terminal|[A-Z]\w+"

AVOIDED = {
    rf"\b({UNITS}) an? (second|minute|step|rank|GPU|host|field|table|user|pass)\b": "per",
    rf"(?<!there )\b(is|are) no ({NOUNS})\b": "is not a",
    r"\bmend(s|ed|ing)?\b": "fix",
    r"\bbut for\b(?! (the|this) (time|moment))": "except",
    r"\b(go|goes|gone|going|went) on (with|from|where)\b": "resume",
    r"\b(None|NaN|null|CUDA|infinite) where (there|it|that|the|a|none|all|not|only)\b": "if",
    r"\b(cut|cuts) at (its|the|a|their) quantile": "clipped",
    r"\b(MOST|LONGEST|FEWEST|SHORTEST)_[A-Z]": "MAX_ or MIN_",
    r"\bstands? (for|between|beside|behind)\b": "means, separates, is beside",
    r"\b(un)?told\b": "given, documented",
    r"\bmake it again\b": "create it again",
    r"\bgive the (same )?command again\b": "rerun the command",
    r"\bholds no\b": "has no, does not contain",
    r"\b(test|training)\s+half\b(?! of)": "test split, training split",
    r'"""(Of|As|That|Those|These|What|Which|How often|How many) ': "a noun phrase or a verb",
}


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_texts_follow_the_glossary(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    found = [
        f"line {text.count(chr(10), 0, match.start()) + 1}: {match.group()!r}; write {instead}"
        for pattern, instead in AVOIDED.items()
        for match in re.finditer(pattern, text)
    ]
    assert not found, "\n".join(found)

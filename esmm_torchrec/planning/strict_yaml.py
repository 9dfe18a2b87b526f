"""YAML that rejects repeated keys and reports errors by file and line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from esmm_torchrec.errors import PlanError


class _UniqueKeyLoader(yaml.SafeLoader):
    """Rejects repeated keys, of which PyYAML's own loader silently keeps the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, list | dict):
                continue
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key!r} occurs twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


def load_yaml(path: Path) -> Any:
    """Reads a YAML file.

    Raises:
        PlanError: the file is not valid YAML or repeats a key; the sentence names the line.
    """
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)
    except yaml.MarkedYAMLError as error:
        where = f" line {error.problem_mark.line + 1}" if error.problem_mark else ""
        problem = " ".join(str(error.problem or error).split())
        raise PlanError(f"{path}{where} is not the YAML it should be: {problem}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise PlanError(f"{path} is not YAML: {' '.join(str(error).split())}") from None

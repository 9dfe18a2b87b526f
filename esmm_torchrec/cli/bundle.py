"""`esmm-torchrec bundle`: packs this package for spark-submit."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

import esmm_torchrec
from esmm_torchrec.errors import OptionError

PROGRAM = "esmm_spark.py"
_CONTENT = '''"""For spark-submit --py-files esmm_torchrec.zip esmm_spark.py prepare table …"""

import sys

from esmm_torchrec.cli.main import main

if __name__ == "__main__":
    main([*sys.argv[1:], "--engine", "spark"])
'''


@dataclass(frozen=True)
class Options:
    """Write this package as a zip file for spark-submit --py-files, and next to it esmm_spark.py,
    the program to submit."""

    out: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="OUT")]]
    """Zip file to write."""


def run(options: Options) -> None:
    """Writes the zip file and the program."""
    if options.out.suffix != ".zip":
        raise OptionError(f"{options.out} must end in .zip; otherwise Python cannot import from it")
    package = Path(esmm_torchrec.__file__).parent
    with zipfile.ZipFile(options.out, "w", zipfile.ZIP_DEFLATED) as bundle:
        for file in sorted(package.rglob("*")):
            if file.is_file() and "__pycache__" not in file.parts:
                bundle.write(file, file.relative_to(package.parent))
    program = options.out.with_name(PROGRAM)
    program.write_text(_CONTENT)
    print(f"{options.out}: this package; {program}: the program. For example:")
    print(f"  spark-submit --py-files {options.out} {program} prepare table OUT --train …")

"""Progress of long operations: a bar on a terminal, an occasional plain line elsewhere."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any

from tqdm import tqdm

PLAIN_INTERVAL_SECONDS = 10.0


class _PlainLines(tqdm):
    """tqdm that ends each message with a newline instead of drawing over the last one."""

    def display(self, msg: str | None = None, pos: int | None = None) -> None:  # noqa: ARG002
        line = (msg or str(self)).strip()
        if line:
            self.fp.write(line + "\n")
            self.fp.flush()

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # An error is reported in one sentence, without a line of progress before it.
        self.disable = self.disable or exc_type is not None
        super().__exit__(exc_type, exc_value, traceback)

    def close(self) -> None:
        if not self.disable:
            self.display()
            self.disable = True


def progress_bar(description: str, total: float | None, unit: str, **options: Any) -> tqdm:
    """Creates a tqdm bar on stderr; use it as a context manager and call `update(amount)`.

    If stderr is not a terminal, it prints a plain line every ten seconds and one at the end, but
    none after an error. Further `options` are passed to tqdm (`disable=True` silences ranks other
    than 0).
    """
    common: dict[str, Any] = {"desc": description, "total": total, "unit": unit, "file": sys.stderr}
    common |= {"dynamic_ncols": True, "unit_scale": True} | options
    if sys.stderr.isatty():
        return tqdm(**common)
    of_total = "" if total is None else "/{total_fmt}"
    left = "" if total is None else "<{remaining}"
    common |= {
        "mininterval": PLAIN_INTERVAL_SECONDS,
        "delay": PLAIN_INTERVAL_SECONDS,
        "bar_format": f"{{desc}}: {{n_fmt}}{of_total} {{unit}} "
        f"[{{elapsed}}{left}, {{rate_fmt}}{{postfix}}]",
    }
    return _PlainLines(**common)

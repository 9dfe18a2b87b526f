"""One progress bar for all long work: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
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

    def close(self) -> None:
        if not self.disable:
            self.display()
            self.disable = True


def progress_bar(description: str, total: float | None, unit: str, **options: Any) -> tqdm:
    """A tqdm bar on stderr; use it as a context manager and call `update(amount)`.

    Where stderr is no terminal it prints a plain line every ten seconds and one at the end.
    Further `options` are tqdm's own (`disable=True` silences it, on ranks other than 0).
    """
    common: dict[str, Any] = {"desc": description, "total": total, "unit": unit, "file": sys.stderr}
    common |= {"dynamic_ncols": True, "unit_scale": True} | options
    if sys.stderr.isatty():
        return tqdm(**common)
    common |= {
        "mininterval": PLAIN_INTERVAL_SECONDS,
        "delay": PLAIN_INTERVAL_SECONDS,
        "bar_format": "{desc}: {n_fmt}/{total_fmt} {unit} "
        "[{elapsed}<{remaining}, {rate_fmt}{postfix}]",
    }
    return _PlainLines(**common)

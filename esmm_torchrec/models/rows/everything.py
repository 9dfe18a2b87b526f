"""Every impression, once."""

from __future__ import annotations

from dataclasses import dataclass

from esmm_torchrec.models.parts import LoggedImpressions, Rows


@dataclass(frozen=True)
class AllRows(Rows):
    """Train on every impression once: the entire space."""

    def select(self, impressions: LoggedImpressions) -> None:  # noqa: ARG002
        """Returns None: every impression once."""
        return

"""Policy for unreadable rows: raise at the first one, or skip and count them."""

from __future__ import annotations

from collections.abc import Sequence

from collab_megatron.errors import UserError
from collab_megatron.text import whole_text

SHOWN = 3


class BadRows:
    """One policy for a whole dataset."""

    def __init__(self, *, skip: bool = False) -> None:
        self.skip = skip
        self.reasons: list[str] = []  # one sentence for each skipped row
        self.read = 0  # readable rows

    def found(self, reason: str) -> None:
        """Record an unreadable row. Raises UserError with `reason` unless such rows are skipped."""
        if not self.skip:
            raise UserError(reason)
        self.reasons.append(reason)

    def found_all(self, reasons: Sequence[str]) -> None:
        """Record one or more unreadable rows. Raises UserError with the first ones and the number of the others, unless
        such rows are skipped."""
        if not self.skip:
            more = f"; and {len(reasons) - SHOWN:,} more" if len(reasons) > SHOWN else ""
            raise UserError(f"{'; '.join(reasons[:SHOWN])}{more}")
        self.reasons += reasons

    def notice(self) -> str:
        """One line about the skipped rows; empty if there are none."""
        if not self.reasons:
            return ""
        total = self.read + len(self.reasons)
        more = f"; and {len(self.reasons) - SHOWN:,} more" if len(self.reasons) > SHOWN else ""
        reasons = whole_text("; ".join(self.reasons[:SHOWN]))  # names of columns can hold what no terminal can show
        return f"skipped {len(self.reasons):,} of {total:,} rows: {reasons}{more}"

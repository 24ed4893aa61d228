"""What to do with rows that cannot be read: stop at the first, or leave them out, count them and name them."""

from __future__ import annotations

from collections.abc import Sequence

from collab_megatron.errors import UserError

SHOWN = 3


class BadRows:
    """One policy for a whole dataset."""

    def __init__(self, *, skip: bool = False) -> None:
        self.skip = skip
        self.reasons: list[str] = []  # one sentence for each row that was left out
        self.read = 0  # rows that could be read

    def found(self, reason: str) -> None:
        """A row cannot be read. Raises UserError with `reason` unless such rows are skipped."""
        if not self.skip:
            raise UserError(reason)
        self.reasons.append(reason)

    def found_all(self, reasons: Sequence[str]) -> None:
        """Rows cannot be read, at least one. Raises UserError with how many, and the first ones, unless such rows are
        skipped."""
        if not self.skip:
            more = f"; and {len(reasons) - SHOWN:,} more" if len(reasons) > SHOWN else ""
            raise UserError(f"{'; '.join(reasons[:SHOWN])}{more}")
        self.reasons += reasons

    def notice(self) -> str:
        """One line on what was left out; empty where nothing was."""
        if not self.reasons:
            return ""
        total = self.read + len(self.reasons)
        more = f"; and {len(self.reasons) - SHOWN:,} more" if len(self.reasons) > SHOWN else ""
        return f"skipped {len(self.reasons):,} of {total:,} rows: {'; '.join(self.reasons[:SHOWN])}{more}"

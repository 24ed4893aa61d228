"""Counts messages of strangers, which a listener drops without an answer."""

from __future__ import annotations

from collections import Counter


class Dropped(Counter[str]):
    """Number of dropped messages by reason."""

    _tell_at = 1

    def news(self, who: str, address: str) -> str | None:
        """A sentence for the terminal: at the first dropped message, then at every tenfold number."""
        total = self.total()
        if total < self._tell_at:
            return None
        self._tell_at = 10 ** len(str(total))
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(self.items()))
        return f"{who}: dropped {total} messages at {address} that are not from this run ({kinds})"

"""Which steps leave a trace."""

from __future__ import annotations

from collab_megatron.config.sections.base import Count, Positive, Section


class ProfileSection(Section):
    """Torch traces of single training steps, in logs/NAME/attempt-K/profile/, for Perfetto or chrome://tracing."""

    steps: tuple[Positive, ...] = ()  # training steps to trace, such as [5, 6]; each is slower, and a trace is large
    ranks: tuple[Count, ...] = (0,)  # trainer ranks to trace
    # RL: trace the engines too, from the wait for the step's rollouts to its weight sync. Before it they may have
    # sampled a part already (driver.max_staleness)
    engines: bool = True

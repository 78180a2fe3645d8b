"""How far an adapter's training has come, and what was seen of it."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Progress:
    """How far an adapter's training has come.

    Attributes:
        steps: real optimizer steps, over resumes and runs. run_start: as many as there were when the run began.
        total_steps: length of the run in such steps, if known.
        backwards: backward passes that gave it gradients, while attached. stepped_by: ids of the optimizers that stepped the
            latest of them. fresh_gradient: whether a gradient came since.
    """

    steps: int = 0
    run_start: int = 0
    total_steps: int | None = None
    backwards: int = 0
    stepped_by: set[int] = field(default_factory=set)
    fresh_gradient: bool = False

    def forget_gradients(self) -> None:
        """What came of earlier gradients says nothing of those to come."""
        self.backwards, self.stepped_by, self.fresh_gradient = 0, set(), False

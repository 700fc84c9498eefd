"""The loss curve as a matplotlib figure. (Importing matplotlib takes a while: import this where it is drawn.)"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from qlora.report.charts import smooth


class LossFigure(Figure):
    """Training loss (each step and smoothed) and held-out loss over optimizer steps.

    It belongs to no window, and pyplot, whose backend is the user's choice, is left alone. A notebook shows it.

    Args:
        training, evaluations: lines of metrics.jsonl, as `read_metrics` parts them.
    """

    def __init__(self, training: Sequence[dict[str, Any]], evaluations: Sequence[dict[str, Any]]) -> None:
        super().__init__(figsize=(7, 4), layout="constrained")
        axes = self.subplots()
        steps, losses = [x["step"] for x in training], [x["loss"] for x in training]
        smoothed, width = smooth(losses)
        axes.plot(steps, losses, color="0.8", linewidth=1, label="training, each step")
        axes.plot(steps, smoothed, color="tab:blue", label=f"training, mean of {width} steps")
        if evaluations:
            held_out = [x["eval_loss"] for x in evaluations]
            axes.plot([x["step"] for x in evaluations], held_out, "o-", color="tab:orange", label="held out")
        unit = "row of preferences" if any("accuracy" in line for line in training) else "target token (nats)"
        axes.set(xlabel="optimizer step", ylabel=f"loss per {unit}")
        axes.grid(alpha=0.3)
        axes.legend()

    def png(self) -> bytes:
        """The picture."""
        buffer = io.BytesIO()
        self.savefig(buffer, dpi=120, format="png")
        return buffer.getvalue()

    _repr_png_ = png  # what IPython asks for

"""Charts as SVG files of their own, for papers and notebooks: no plotting library, no NumPy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from ..support.errors import InputError, to_install
from ..support.files import atomic_write
from . import metrics
from .charts import Chart, bins_of, environment, interval_chart, printable, reliability_chart

__all__ = ["Figure", "intervals", "pdf", "reliability"]


class Figure(str):
    """The text of an SVG file. A notebook shows it as a picture.

    ece: of the answers that it shows, for `reliability`; None for other charts.
    """

    ece: float | None = None

    def _repr_svg_(self) -> str:
        return str(self)

    def save(self, path: Path | str) -> None:
        """Write it to a file: as PDF if its name ends so, else as SVG. Raises InputError."""
        data = pdf(self) if Path(path).suffix == ".pdf" else self.encode()
        with atomic_write(path) as file:
            file.write(data)


def reliability(
    probs: Tensor, labels: Tensor, *, n_bins: int = 15, name: str | None = None
) -> Figure:
    """A reliability diagram in the manner of scikit-learn's CalibrationDisplay, as SVG text.

    Answers are put in `n_bins` bins of equal width by their confidence, the largest probability.
    Each bar is the share of right answers, each tick the mean confidence, the tint their gap. Above
    stands `name`, and the expected calibration error, which the result has as `ece`.

    probs: (N, C). labels: (N,) class ids. Raises InputError as `metrics.ece` does.

    >>> import torch
    >>> from scalabl_ref import plots
    >>> probs = torch.tensor([[0.75, 0.25], [0.25, 0.75]])
    >>> figure = plots.reliability(probs, torch.tensor([0, 0]), name="a model")
    >>> figure.ece, figure.startswith("<svg")
    (0.25, True)
    """
    bins = bins_of(metrics.reliability(probs, labels, n_bins))
    ece = metrics.ece(probs, labels, n_bins)
    head = f"{name + ': ' if name else ''}ECE {ece:.3f}"
    figure = _figure(reliability_chart(0, name or "the answers", bins, head))
    figure.ece = ece
    return figure


def intervals(
    rows: Sequence[tuple[str, float, float, float]], heading: str, numbers: Sequence[int] = ()
) -> Figure:
    """A score of several models, one below the other: (name, value, low, high) of each.

    heading: of the axis. numbers: of the models, which decide their colours; their places if not
    given. Raises InputError if there are no rows.
    """
    if not rows:
        raise InputError("a figure of intervals needs rows, and has none")
    numbered = [(n, *row) for n, row in zip(numbers or range(len(rows)), rows, strict=True)]
    return _figure(interval_chart(numbered, "score", heading, None, heading))


def pdf(figure: str) -> bytes:
    """An SVG of this module as PDF, by svglib and reportlab. Raises InputError without them."""
    try:
        from reportlab.graphics import renderPDF
        from svglib.svglib import svg2rlg
    except ImportError:
        raise InputError(f"PDF needs svglib: {to_install('figures')}") from None
    import io

    return renderPDF.drawToString(svg2rlg(io.BytesIO(figure.encode())))


def _figure(chart: Chart) -> Figure:
    template = environment().get_template("figure.svg")
    return Figure(printable(template.render(chart=chart._replace(alone=True)).strip() + "\n"))

"""The trajectory check's free run as a picture: two loss curves, how far the twins are apart, and the envelope.

    python -m parity.report.trajectory docs/trajectory.svg     draws a whole run (50 steps) of the twins

No framework is imported with this module, and matplotlib only by the function that draws.
"""

from __future__ import annotations

import io
import math
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from parity.errors import CannotLook, Misuse
from parity.report.json_file import write_text
from parity.result import CheckResult

__all__ = ["CURVES", "console_lines", "draw", "main", "write"]

CURVES = (
    "step", "loss jax", "loss torch", "loss difference", "loss difference, typical", "loss difference, edge",
    "distance", "distance, typical", "distance, edge",
)  # fmt: skip
"""The curves of `CheckResult.series` that the picture needs, all over the same steps."""
BLOCKS = "▁▂▃▄▅▆▇█"
COLUMNS = 50
"""A longer curve is thinned out to so many characters."""


def console_lines(result: CheckResult) -> list[str]:
    """The free run in a few lines of text; none if the result holds no curves.

    Differences and their edges share one logarithmic scale: where a lower line is higher, the twins are inside.
    """
    series = result.series
    if not series:
        return []
    _demand(series)
    lines = [f"free run of {len(series['step'])} steps"]
    left, right = series["loss jax"], series["loss torch"]
    scale = _scale([*left, *right])
    for side, curve in (("jax", left), ("torch", right)):
        lines.append(f"  loss, {side:<11}{_blocks(curve, scale)}  {curve[0]:.4f} to {curve[-1]:.4f}")
    for what, words in (("loss difference", "loss apart"), ("distance", "params apart")):
        found, edge = series[what], series[f"{what}, edge"]
        scale = _scale([math.log(x) for x in (*found, *edge) if 0 < x < math.inf])
        for label, curve in ((words, found), ("  edge", edge)):
            logs = [math.log(x) if x > 0 else -math.inf for x in curve]
            lines.append(f"  {label:<17}{_blocks(logs, scale)}  at most {max(curve):.1e}")
    return lines


def _scale(values: Sequence[float]) -> tuple[float, float]:
    known = [x for x in values if math.isfinite(x)] or [0.0]
    return min(known), max(known)


def _blocks(curve: Sequence[float], scale: tuple[float, float]) -> str:
    low, high = scale
    stride = -(-len(curve) // COLUMNS)

    def block(x: float) -> str:
        if math.isnan(x):
            return "?"
        if x < low:
            return " "
        share = (x - low) / (high - low) if high > low else 0.0
        return BLOCKS[min(int(min(share, 1.0) * len(BLOCKS)), len(BLOCKS) - 1)]

    return "".join(block(x) for x in curve[::stride])


def draw(series: Mapping[str, Sequence[float]], title: str = "") -> str:
    """The picture as SVG text.

    Raises `Misuse` for curves that are missing, `CannotLook` where matplotlib is not installed.
    """
    _demand(series)
    try:
        import matplotlib
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise CannotLook("the picture needs matplotlib, which is not installed: pip install matplotlib") from error
    steps = series["step"]
    # The salt, because names of clip paths are otherwise random and no two files alike.
    style: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "parity", "font.size": 9.0}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(7.2, 7.0), layout="constrained")
        FigureCanvasSVG(figure)
        top, middle, bottom = figure.subplots(3, 1, sharex=True, height_ratios=(1.2, 1.0, 1.0))
        top.plot(steps, series["loss jax"], color=JAX, linewidth=3.0, label="omni_jax")
        top.plot(steps, series["loss torch"], color=TORCH, linewidth=1.2, linestyle="--", label="omni_torch")
        top.set_ylabel("loss (nats)")
        top.set_title(title or "Two twins train from the same weights on the same batches", loc="left")
        for axes, what, label in (
            (middle, "loss difference", "|loss − loss′|"),
            (bottom, "distance", "relative distance\nof all displacements"),
        ):
            _apart(axes, steps, series, what)
            axes.set_ylabel(label)
        bottom.set_xlabel("step")
        bottom.xaxis.set_major_locator(MaxNLocator(integer=True))
        for axes in (top, middle, bottom):
            axes.grid(True, color="0.9", linewidth=0.6)
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
        top.legend(loc="upper right", frameon=False)
        middle.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=4, frameon=False, borderaxespad=0.2)
        figure.align_ylabels([top, middle, bottom])
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None, "Title": "Training trajectories"})
    svg = "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n"
    # matplotlib names clip paths by addresses: the same picture gets the same names here.
    names = dict.fromkeys(re.findall(r'id="(\w[0-9a-f]{10})"', svg))
    for number, name in enumerate(names):
        svg = svg.replace(name, f"part{number}")
    return svg


JAX, TORCH, APART, INSIDE = "#7a9cc6", "#c8553d", "#222222", "#dfe8d8"


def _apart(axes: Any, steps: Sequence[float], series: Mapping[str, Sequence[float]], what: str) -> None:
    """A difference on a logarithmic scale inside its envelope; exact zeros are open dots at the foot."""
    found, edge = series[what], series[f"{what}, edge"]
    foot = min((x for x in (*found, *series[f"{what}, typical"]) if 0 < x < math.inf), default=1.0) / 2
    lifted = [x if x > 0 else math.nan for x in edge]
    axes.fill_between(steps, foot, lifted, color=INSIDE, linewidth=0, label="envelope")
    typical = [x if x > 0 else math.nan for x in series[f"{what}, typical"]]
    axes.plot(steps, typical, color="#7d9b6a", linewidth=1.0, linestyle=":", label="weights one roundoff away")
    axes.plot(steps, [x if x > 0 else math.nan for x in found], color=APART, linewidth=1.4, marker=".", label="twins")
    zeros = [step for step, x in zip(steps, found) if x == 0]
    if zeros:
        axes.plot(zeros, [foot] * len(zeros), "o", color=APART, markerfacecolor="white", markersize=3.5, label="equal")
    axes.set_yscale("log")
    axes.set_ylim(bottom=foot * 0.9)


def _demand(series: Mapping[str, Sequence[float]]) -> None:
    missing = [name for name in CURVES if name not in series]
    if missing:
        raise Misuse(f"series: no curve {', '.join(map(repr, missing))}; pass the series of the trajectory check")
    lengths = {name: len(series[name]) for name in CURVES}
    if len(set(lengths.values())) != 1 or not lengths["step"]:
        raise Misuse(f"series: curves must have one length above 0, got {lengths}")


def write(result: CheckResult, path: str | Path) -> None:
    """Draw the curves of `result` into an SVG file."""
    write_text(draw(result.series), path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the twins for a whole run and draw it into the file that is named; prints the lines for the console."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print("usage: python -m parity.report.trajectory FILE.svg", file=sys.stderr)
        return 2
    from parity.checks import Scope, trajectory
    from parity.checks._training import Training
    from parity.runner import prepare

    prepare()
    result = CheckResult("trajectory")
    trajectory.free_runs(Scope(), Training(), result, lambda *_: None, trajectory.STEPS)
    write(result, arguments[0])
    print("\n".join(console_lines(result)))
    for row in result.rows:
        print(f"{row.name}: {row.verdict}: {row.evidence}")
    for control in result.controls:
        print(f"{control.name}: {control.evidence}")
    return result.exit_code


if __name__ == "__main__":
    raise SystemExit(main())

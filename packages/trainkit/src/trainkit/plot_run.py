"""A run's curves, out of its CSV log: losses, learning rates, throughput, and whatever else was logged."""

from __future__ import annotations

import base64
import csv
import html
import io
from importlib import import_module
from pathlib import Path
from typing import Any

from common_platform.errors import ConfigError, ResourceError

GROUPS = {  # title -> what a metric's name has in it
    "loss": ("loss",),
    "learning rate": ("lr-", "lr/"),
    "throughput": ("per_s", "throughput", "mfu"),
}
LEFT_OUT = {"step", "epoch"}
ENDINGS = (".png", ".svg", ".html")
Curves = dict[str, list[tuple[int, float]]]  # metric -> (step, value)


def plot_run(run: str | Path, out: str | Path | None = None) -> Path:
    """Draw the metrics of ``run``, a picture a group.

    Args:
        run: a folder with ``metrics.csv``; or one above it, where the newest is taken.
        out: a ``.png``, ``.svg`` or ``.html`` file; default: ``curves.png`` beside ``metrics.csv``.

    Returns:
        What was written.

    Raises:
        ConfigError: there is no log, nothing in it, or the ending is another one.
        ResourceError: matplotlib is not installed.
    """
    log = _log_of(Path(run))
    path = Path(out) if out is not None else log.with_name("curves.png")
    if path.suffix not in ENDINGS:
        raise ConfigError("--out", path.name, f"a name that ends with one of {ENDINGS}")
    curves = read_curves(log)
    if not curves:
        raise ConfigError("run", str(log.parent), "a run that has logged something")
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix != ".html":
        path.write_bytes(_picture(curves, path.suffix[1:]))
        return path
    shown = base64.b64encode(_picture(curves, "svg")).decode()
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{points[-1][0]}</td><td>{points[-1][1]:.6g}</td></tr>"
        for name, points in sorted(curves.items())
    )
    title = html.escape(log.parent.name)
    path.write_text(
        f"<!doctype html><meta charset=utf-8><title>{title}</title><body style='font-family:sans-serif'>"
        f"<h1>{title}</h1>"
        f"<img alt='curves' style='max-width:100%' src='data:image/svg+xml;base64,{shown}'>"
        f"<table><tr><th>metric<th>last step<th>last value</tr>{rows}</table>\n"
    )
    return path


def read_curves(log: Path) -> Curves:
    """Every metric's values by step; rows without a value of it are left out."""
    curves: Curves = {}
    with log.open(newline="") as file:
        for row in csv.DictReader(file):
            if not str(row.get("step", "")).isdigit():
                continue  # cut off by a kill
            for name, text in row.items():
                if name not in LEFT_OUT and text not in ("", None):
                    curves.setdefault(name, []).append((int(row["step"]), float(text)))
    return curves


def _log_of(run: Path) -> Path:
    if (run / "metrics.csv").is_file():
        return run / "metrics.csv"
    found = sorted(run.glob("**/metrics.csv"), key=lambda p: p.stat().st_mtime) if run.is_dir() else []
    if not found:
        raise ConfigError("run", run.name, "a folder with a metrics.csv in it or below it")
    return found[-1]


def _grouped(curves: Curves) -> dict[str, Curves]:
    groups: dict[str, Curves] = {}
    for name, points in sorted(curves.items()):
        title = next((t for t, parts in GROUPS.items() if any(part in name for part in parts)), "other")
        groups.setdefault(title, {})[name] = points
    return {title: groups[title] for title in [*GROUPS, "other"] if title in groups}


def _picture(curves: Curves, form: str) -> bytes:
    figure_of = _matplotlib()
    groups = _grouped(curves)
    figure = figure_of(figsize=(8, 3 * len(groups)), layout="constrained")
    for place, (title, members) in enumerate(groups.items(), 1):
        axes = figure.add_subplot(len(groups), 1, place)
        for name, points in members.items():
            axes.plot(*zip(*points, strict=True), "o-" if len(points) < 10 else "-", label=name, markersize=3)
        axes.set(title=title, xlabel="step")
        axes.legend(fontsize="small")
    data = io.BytesIO()
    figure.savefig(data, format=form, dpi=120)
    return data.getvalue()


def _matplotlib() -> Any:
    try:
        return import_module("matplotlib.figure").Figure
    except ModuleNotFoundError as error:
        raise ResourceError("plot", "matplotlib is not installed", "pip install 'trainkit[plot]'") from error

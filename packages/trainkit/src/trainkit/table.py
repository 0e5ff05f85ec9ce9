"""Metrics as a table in the terminal."""

from __future__ import annotations


def print_metrics(stage: str, metrics: list[dict[str, float]]) -> None:
    """Print the metrics of an evaluation, a column a loader, on stdout."""
    if not any(metrics):
        return
    from rich.console import Console  # imported where they are needed: they are slow to import
    from rich.table import Table

    table = Table(stage, *(f"loader {n}" if len(metrics) > 1 else "value" for n in range(len(metrics))))
    names = dict.fromkeys(name.partition("/dataloader_idx_")[0] for found in metrics for name in found)
    for name in names:
        columns = [found.get(name, found.get(f"{name}/dataloader_idx_{n}")) for n, found in enumerate(metrics)]
        table.add_row(name, *("" if value is None else f"{value:.6g}" for value in columns))
    Console().print(table)

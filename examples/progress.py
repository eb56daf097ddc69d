# SPDX-License-Identifier: BSD-3-Clause
"""A progress bar on a terminal, plain lines elsewhere; tables of text."""

from __future__ import annotations

import sys
import time
from typing import Any


class Progress:
    """`with Progress("training", 100) as p: p.advance("loss 3.1")`."""

    def __init__(self, title: str, total: int) -> None:
        self.title, self.total, self.done = title, total, 0
        self._bar: Any = None

    def __enter__(self) -> Progress:
        self._begin = time.perf_counter()
        if sys.stdout.isatty():
            try:
                from rich import progress
            except ImportError:
                return self
            self._bar = progress.Progress(
                progress.TextColumn("[bold]{task.description}"),
                progress.BarColumn(bar_width=None),
                progress.MofNCompleteColumn(),
                progress.TimeRemainingColumn(),
                progress.TextColumn("{task.fields[note]}"),
                expand=True,
            )
            self._bar.start()
            self._task = self._bar.add_task(self.title, total=self.total, note="")
        return self

    def advance(self, note: str = "") -> None:
        self.done += 1
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, note=note)
            return
        every = max(1, self.total // 20)
        if self.done % every == 0 or self.done in (1, self.total):
            seconds = time.perf_counter() - self._begin
            print(f"{self.title} {self.done:4d}/{self.total} {seconds:6.1f} s  {note}", flush=True)

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()


def print_table(title: str, rows: list[dict[str, Any]]) -> None:
    columns = list(rows[0])
    widths = [max(len(c), *(len(str(r.get(c, ""))) for r in rows)) for c in columns]
    print(f"\n{title}\n")
    lines = [columns, ["-" * w for w in widths]]
    lines += [[str(row.get(c, "")) for c in columns] for row in rows]
    for line in lines:
        first, *rest = zip(line, widths, strict=True)
        cells = [first[0].ljust(first[1])] + [cell.rjust(width) for cell, width in rest]
        print("    " + "  ".join(cells))

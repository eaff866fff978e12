"""Tables, for pages and terminals."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import rich.table


class Table(NamedTuple):
    """A table whose first columns are aligned to the left, and the others to the right."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int

    def markdown(self) -> str:
        """Writes it in Markdown."""
        return table(self.head, self.rows, self.left)

    def terminal(self, title: str) -> rich.table.Table:
        """Makes a table that `rich` prints."""
        shown = rich.table.Table(title=title, title_justify="left", box=None)
        for number, name in enumerate(self.head):
            shown.add_column(name, justify="left" if number < self.left else "right")
        for row in self.rows:
            shown.add_row(*row)
        return shown


def table(head: Sequence[str], rows: Iterable[Sequence[str]], left: int) -> str:
    """Writes a table in Markdown."""
    rule = ["---"] * left + ["--:"] * (len(head) - left)
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, rule, *rows))

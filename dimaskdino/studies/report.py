"""Report of a study: means and deviations, differences with intervals, and the published numbers."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dimaskdino.markdown import escape
from dimaskdino.serialization import write_text
from dimaskdino.studies.comparison import Difference, EvaluatedRun, Quantity, difference
from dimaskdino.studies.study import Row, Study

PAPER = Path(__file__).parent / "paper_tables.json"


def paper_tables() -> dict[str, Any]:
    """The numbers of the paper's tables and of its figure 1."""
    return json.loads(PAPER.read_text())


@dataclass(frozen=True)
class StudyReport:
    """The results of a study.

    Attributes:
        study: the definition.
        scale: the scale that was run.
        measured: by row name and seed; rows without results are left out.
        published: by column of the study, row name and quantity.
    """

    study: Study
    scale: str
    measured: dict[str, dict[int, EvaluatedRun]]
    published: dict[str, dict[str, dict[str, float]]]

    @classmethod
    def of(cls, study: Study, scale: str, folder: Path) -> "StudyReport":
        """Read the results in a study folder.

        Raises:
            UserError: a result cannot be read.
        """
        published = study.published(paper_tables()) if study.columns else {}
        return cls(study, scale, study.measured(folder), published)

    def values(self, row: str, quantity: Quantity) -> dict[int, float]:
        """A quantity by seed, where it is defined."""
        outcome = {seed: quantity.of(m.result) for seed, m in self.measured.get(row, {}).items()}
        return {seed: value for seed, value in outcome.items() if value is not None}

    def difference(self, row: Row, quantity: Quantity) -> Difference | None:
        """Difference to the row that a row is compared with; None without such a row or without common seeds."""
        if row.against is None:
            return None
        return difference(self.measured.get(row.name, {}), self.measured.get(row.against, {}), quantity)

    def published_difference(self, column: str, row: Row, quantity: Quantity) -> float | None:
        """The same difference in the paper; None if the paper does not have both numbers."""
        outcome = [self.published[column].get(name or "", {}).get(str(quantity)) for name in (row.name, row.against)]
        return None if outcome[0] is None or outcome[1] is None else round(outcome[0] - outcome[1], 1)

    def comparisons(self) -> dict[str, dict[str, tuple[Difference, dict[str, float]]]]:
        """By label of the quantity and name of the comparison: the difference, and the published ones by column."""
        panels: dict[str, dict[str, tuple[Difference, dict[str, float]]]] = {}
        for quantity in self.study.quantities:
            for row in self.study.rows:
                outcome = self.difference(row, quantity)
                if outcome is not None and row.against is not None:
                    there = {c: self.published_difference(c, row, quantity) for c in self.published}
                    known = {column: value for column, value in there.items() if value is not None}
                    name = f"{row.label}\n− {self.study.row(row.against).label}"
                    panels.setdefault(quantity.label, {})[name] = (outcome, known)
        return panels

    def to_json(self) -> dict[str, Any]:
        """The whole report as plain values."""
        return {"study": self.study.title, "scale": self.scale, "rows": [self._row(row) for row in self.study.rows]}

    def _row(self, row: Row) -> dict[str, Any]:
        record: dict[str, Any] = {"name": row.name, "label": row.label, "against": row.against, "measured": {}}
        for quantity in self.study.quantities:
            values = self.values(row.name, quantity)
            compared = self.difference(row, quantity)
            record["measured"][str(quantity)] = {
                "by_seed": values,
                "mean": statistics.mean(values.values()) if values else None,
                "standard_deviation": statistics.stdev(values.values()) if len(values) > 1 else None,
                "difference": compared.to_json() if compared else None,
            }
        record["published"] = {column: rows[row.name] for column, rows in self.published.items()}
        return record

    def markdown(self) -> str:
        """The report as two tables: the rows, and their differences."""
        title = f"**{escape(self.study.title)}**, scale {escape(self.scale)}: means of the seeds ± standard deviation"
        parts = [title, _table(*self._rows_table())]
        header, rows = self._differences_table()
        if rows:
            parts += [
                "Differences, with 95 % intervals: over images, for these models (paired bootstrap), and over "
                "trainings (Student's t over the differences of the seeds). `as published`: whether the sign is that "
                "of the paper, which requires three seeds and intervals without 0.",
                _table(header, rows),
            ]
        return "\n\n".join(parts)

    def _rows_table(self) -> tuple[list[str], list[list[str]]]:
        quantities = self.study.quantities
        published = [(column, q) for column in self.published for q in quantities if self._is_published(column, q)]
        header = ["", *(q.label for q in quantities), "seeds", *(f"{column}: {q.label}" for column, q in published)]
        rows = []
        for row in self.study.rows:
            cells = [_spread(list(self.values(row.name, q).values()), q) for q in quantities]
            numbers = [_number(self.published[column][row.name].get(str(q)), q) for column, q in published]
            rows.append([escape(row.label), *cells, str(len(self.measured.get(row.name, {}))), *numbers])
        return header, rows

    def _is_published(self, column: str, quantity: Quantity) -> bool:
        return any(str(quantity) in values for values in self.published[column].values())

    def _differences_table(self) -> tuple[list[str], list[list[str]]]:
        header = ["", "", "difference", "over images", "over trainings", "seeds"]
        header += [text for column in self.published for text in (column, "as published")]
        rows = []
        for row in self.study.rows:
            for quantity in self.study.quantities:
                outcome = self.difference(row, quantity)
                if outcome is None or row.against is None:
                    continue
                what = escape(f"{row.label} − {self.study.row(row.against).label}")
                cells = [what, quantity.label, f"{outcome.mean:+.1f}"]
                for interval in (outcome.over_images, outcome.over_seeds):
                    cells.append(f"{interval.low:+.1f} to {interval.high:+.1f}" if interval else "–")
                cells.append(str(len(outcome.by_seed)))
                for column in self.published:
                    there = self.published_difference(column, row, quantity)
                    cells += ["–", "–"] if there is None else [f"{there:+.1f}", outcome.agrees(there)]
                rows.append(cells)
        return header, rows

    def save(self, folder: Path) -> None:
        """Write table.json and table.md.

        Raises:
            UserError: they cannot be written.
        """
        write_text(folder / "table.json", json.dumps(self.to_json(), indent=1) + "\n")
        write_text(folder / "table.md", self.markdown() + "\n")


def _number(value: float | None, quantity: Quantity) -> str:
    return "–" if value is None else f"{value:{'+' if quantity.what == 'imbalance' else ''}.1f}"


def _spread(values: Sequence[float], quantity: Quantity) -> str:
    if not values:
        return "–"
    mean = _number(statistics.mean(values), quantity)
    return f"{mean} ± {statistics.stdev(values):.1f}" if len(values) > 1 else mean


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with columns aligned in plain text."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in lines)

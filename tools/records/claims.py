"""The table of claims in results.md: what the paper says, what was seen here, and the verdicts of study.md's rule."""

from dataclasses import dataclass

from dimaskdino.studies.comparison import ComparisonResult, Quantity
from tools.records.formats import signed
from tools.records.miniature_blocks import registered
from tools.records.sources import measured
from tools.records.study_blocks import BOX, VERDICTS, interval, report

LAG = Quantity.parse("first.imbalance")
BOTH = ("figure_1", "DI-MaskDINO − MaskDINO")
ON_PHOTOGRAPHS = ("photographs", "DI-MaskDINO − MaskDINO, published formula")


@dataclass(frozen=True)
class Claim:
    """What the paper says about a difference between models, and where it was looked at.

    Attributes:
        text: the claim.
        study: the study of the first miniature.
        plus, minus: rows of that study.
        quantity: what differs.
        column: of the published numbers.
        as_published, last_cell: study and label of the comparison of the second miniature, under the published formula
            for the boxes of masks and under that with the last cell; None if it was not run.
    """

    text: str
    study: str
    plus: str
    minus: str
    quantity: Quantity = BOX
    column: str = "COCO"
    as_published: tuple[str, str] | None = None
    last_cell: tuple[str, str] | None = None

    @property
    def first(self) -> ComparisonResult:
        """The comparison in the first miniature."""
        wanted = ((self.plus,), (self.minus,), self.quantity)
        found = report(self.study).results
        return next(c for c in found if (c.comparison.plus, c.comparison.minus, c.comparison.quantity) == wanted)

    @property
    def published(self) -> float:
        """The difference in the paper."""
        return report(self.study).published_difference(self.column, self.first.comparison)

    def found_in(self, place: tuple[str, str]) -> ComparisonResult:
        """The comparison that a registered study has under a label."""
        study, label = place
        found = registered(study).results
        return next(c for c in found if (c.comparison.label, c.comparison.quantity) == (label, self.quantity))

    @property
    def verdict(self) -> str:
        """By the second miniature, under the published formula if it was run so; by the first one where it has none."""
        places = [place for place in (self.as_published, self.last_cell) if place]
        return VERDICTS[(self.found_in(places[0]) if places else self.first).verdict(self.published)]


def _by_formula(module: str) -> dict[str, tuple[str, str]]:
    return {
        "as_published": ("box_formula", f"{module}, published formula"),
        "last_cell": ("box_formula", f"{module}, bounds with the last cell"),
    }


def _table_3(text: str, rows: str, label: str) -> Claim:
    place = ("table_3", f"De-Imbalance, {label}")
    return Claim(text, "table_3", f"di_{rows}", f"neither_{rows}", column="BDD100K", last_cell=place)


CLAIMS = (
    Claim("De-Imbalance raises box AP", "table_4", "di", "neither", **_by_formula("De-Imbalance")),
    Claim("BATO raises box AP", "table_4", "bato", "neither", **_by_formula("BATO")),
    Claim("both raise box AP", "table_4", "di_bato", "neither", last_cell=BOTH),
    Claim(
        "both narrow the lag of boxes at the first layer",
        "figure_1",
        "di_bato",
        "neither",
        LAG,
        "BDD100K",
        last_cell=BOTH,
    ),
    _table_3("De-Imbalance raises box AP in a shallow decoder", "shallow", "standard"),
    _table_3("… and with box losses times 0.1", "shallow_weights", "box losses times 0.1"),
    _table_3("… and with random positions", "shallow_positions", "random positions"),
    Claim("guidance by `T_i` is worse than by `Q_bal`", "table_5", "bato", "di_bato"),
    Claim("guidance by `T_s2` is worse than by `Q_bal`", "table_5", "guidance_T_s2", "di_bato"),
    Claim("BATO without generation is worse", "table_6", "no_generation", "di_bato"),
    Claim("a third selection is worse", "table_7", "triple", "di_bato"),
)


def claims() -> str:
    """What the paper says, published and here, with the verdict of the registered rule."""
    heads = (
        "the paper says",
        "published",
        "first miniature",
        "second, published formula",
        "second, with the last cell",
    )
    lines = [f"| {' | '.join((*heads, 'photographs', 'verdict'))} |", "|---|---|---|---|---|---|---|"]
    for claim in CLAIMS:
        cells = [claim.text, f"{signed(claim.published)} ({claim.column})", _difference(claim.first)]
        for place in (claim.as_published, claim.last_cell):
            cells.append("not run" if place is None else _difference(claim.found_in(place)))
        cells += [_on_photographs(claim) if claim.last_cell == BOTH else "not run", claim.verdict]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _difference(found: ComparisonResult) -> str:
    """A difference with its interval; none of rows with a single run, which say nothing."""
    return "one run" if min(found.runs.values()) == 1 else f"{signed(found.difference)} ({interval(found)})"


def _on_photographs(claim: Claim) -> str:
    """Differences between the two models on photographs and their signs: trainings to the end, then the study's."""
    comparisons = measured("photographs.json")["animals"]["comparisons"]
    [ended] = (c for c in comparisons if c["quantity"] == str(claim.quantity))
    low, high = (signed(ended["joint"][end]) for end in ("low", "high"))
    found = claim.found_in(ON_PHOTOGRAPHS)
    return (
        f"{signed(ended['difference'])} ({low} to {high}): {VERDICTS[ended['verdict']]}; "
        f"{_difference(found)}: {VERDICTS[found.verdict(claim.published)]}"
    )

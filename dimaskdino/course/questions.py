"""Predict, then reveal: questions that a student answers before a figure does.

    answer = Number("How far are the boxes behind the masks, in points?", low=0, high=20)
    answer         # shows the control; the answer is committed with its button
    answer.reveal(truth=4.5, mistakes={0: "the same queries, but not the same knowledge"})

An answer can be given without widgets, too: `answer.commit(7)`. `reveal` shows the answer beside the truth, so the
notebook stores both.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import ipywidgets as widgets
import numpy as np
from matplotlib.figure import Figure

from dimaskdino.data.painting import BLUE, GREY, ORANGE
from dimaskdino.viz.style import panels, style

_ROWS = widgets.Layout(flex_flow="row wrap")


class Question:
    """A question with controls for the answer and a button that commits it.

    Args:
        text: the question.
        controls: the controls, in order.

    Attributes:
        answer: the committed answer; None before.
    """

    def __init__(self, text: str, controls: Sequence[widgets.ValueWidget]) -> None:
        self.text, self.controls = text, list(controls)
        self.answer: Any = None
        self._button = widgets.Button(description="That is my answer", button_style="primary")
        self._note = widgets.Label()
        self._button.on_click(lambda _: self.commit(self._values()))
        title, row = widgets.HTML(f"<b>{text}</b>"), widgets.HBox(self.controls, layout=_ROWS)
        self.widget = widgets.VBox([title, row, self._button, self._note])

    def _values(self) -> Any:
        return self.controls[0].value

    def commit(self, answer: Any) -> None:
        """Answer. The answer stays; the controls are closed."""
        self.answer = answer
        for control in [*self.controls, self._button]:
            control.disabled = True
        self._note.value = "Noted. Run the next cell."

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        live = self.widget._repr_mimebundle_(**kwargs)
        data, metadata = live if isinstance(live, tuple) else (live, {})
        return data | {"text/plain": f"{self.text} (answer in the live notebook, or with .commit(…))"}, metadata

    def _answered(self) -> bool:
        if self.answer is None:
            print("○ Answer the question first, then run this cell again. The right answer is shown anyway.")
        return self.answer is not None


def _slider(low: float, high: float, step: float = 0.5, **options: Any) -> widgets.FloatSlider:
    wide = {"description_width": "initial"}
    return widgets.FloatSlider((low + high) / 2, min=low, max=high, step=step, style=wide, **options)


class Number(Question):
    """A question for a number, answered with a slider."""

    def __init__(self, text: str, low: float, high: float, step: float = 0.5) -> None:
        super().__init__(text, [_slider(low, high, step)])
        self.low, self.high = low, high

    @style()
    def reveal(self, truth: float, mistakes: Mapping[float, str] | None = None) -> Figure:
        """Show the answer beside the truth and beside frequent mistakes.

        Args:
            truth: the right number.
            mistakes: frequent answers, and what is wrong with each.
        """
        mistakes = mistakes or {}
        figure, [axes] = panels(1, 1, 8, 1.9 + 0.22 * len(mistakes))
        axes.axhline(0, color=GREY, linewidth=1)
        values = [self.low, self.high, truth, *mistakes]
        low, high = min(values), max(values)
        for number, (value, text) in enumerate(mistakes.items(), start=1):
            axes.plot(value, 0, "x", color=GREY, markersize=8)
            side = "right" if value > (low + high) / 2 else "left"  # so that the text stays within the axes
            below = (0, -14 - 14 * number)
            axes.annotate(text, (value, 0), below, textcoords="offset points", ha=side, color=GREY, fontsize=9)
        axes.plot(truth, 0, "o", color=ORANGE, markersize=12, label=f"measured: {truth:.1f}")
        if self._answered():
            axes.plot(self.answer, 0, "D", color=BLUE, markersize=10, label=f"your answer: {self.answer:.1f}")
        margin = 0.05 * (high - low)
        axes.set(xlim=(low - margin, high + margin), yticks=[], title=self.text)
        axes.spines["left"].set_visible(False)
        figure.legend(loc="outside lower center", ncols=2, fontsize=9)
        return figure


class Choice(Question):
    """A question with options to choose from."""

    def __init__(self, text: str, options: Sequence[str]) -> None:
        buttons = widgets.RadioButtons(options=list(options), value=None, layout=widgets.Layout(width="100%"))
        super().__init__(text, [buttons])
        self.options = tuple(options)

    def reveal(self, right: str, mistakes: Mapping[str, str] | None = None) -> None:
        """Print whether the answer is right, and what is wrong with the others.

        Raises:
            ValueError: the right answer is not among the options.
        """
        if right not in self.options:
            raise ValueError(f"'{right}' is none of the options {', '.join(self.options)}")
        if self._answered():
            print(f"{'✓' if self.answer == right else '✗'} Your answer: {self.answer}")
        print(f"Right: {right}")
        for option, text in (mistakes or {}).items():
            print(f"Not “{option}”: {text}")


class Curve(Question):
    """A question for a curve: one slider for each place on an axis."""

    def __init__(self, text: str, places: Sequence[str], low: float, high: float) -> None:
        super().__init__(text, [_slider(low, high, orientation="vertical", description=place) for place in places])
        self.places = tuple(places)

    def _values(self) -> list[float]:
        return [slider.value for slider in self.controls]

    @style()
    def reveal(self, truth: Sequence[float], label: str) -> Figure:
        """Show the drawn curve beside the measured one.

        Args:
            truth: the measured value of each place; NaN where there is none.
            label: of the axis.
        """
        figure, [axes] = panels(1, 1, 8, 3.2)
        axes.plot(range(len(self.places)), truth, "o-", color=ORANGE, label="measured")
        if self._answered():
            axes.plot(range(len(self.places)), self.answer, "D--", color=BLUE, label="your curve")
            error = float(np.nanmean(np.abs(np.array(self.answer) - np.array(truth, dtype=float))))
            axes.text(0.02, 0.04, f"on average {error:.1f} apart", transform=axes.transAxes, color=GREY, fontsize=9)
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set_xticks(range(len(self.places)), self.places)
        axes.set(ylabel=label, title=self.text)
        axes.legend(loc="best")
        return figure

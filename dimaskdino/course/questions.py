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
from dimaskdino.viz.style import NotebookFigure, style

_WIDE = {"description_width": "initial"}


class Question:
    """A question with controls for the answer and a button that commits it.

    Args:
        text: the question.
        controls: the controls, in order.

    Attributes:
        answer: what was committed; None before.
    """

    def __init__(self, text: str, controls: Sequence[widgets.ValueWidget]) -> None:
        self.text, self.controls = text, list(controls)
        self.answer: Any = None
        self._button = widgets.Button(description="That is my answer", button_style="primary")
        self._note = widgets.Label()
        self._button.on_click(lambda _: self.commit(self._values()))
        self.widget = widgets.VBox([widgets.HTML(f"<b>{text}</b>"), *self.controls, self._button, self._note])

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

    def _unanswered(self) -> bool:
        if self.answer is None:
            print("○ Answer the question first, then run this cell again; here is the truth all the same.")
        return self.answer is None


class Number(Question):
    """A question for a number, answered with a slider."""

    def __init__(self, text: str, low: float, high: float, step: float = 0.5) -> None:
        slider = widgets.FloatSlider((low + high) / 2, min=low, max=high, step=step, style=_WIDE)
        super().__init__(text, [slider])
        self.low, self.high = low, high

    def reveal(self, truth: float, mistakes: Mapping[float, str] | None = None) -> Figure:
        """Show the answer beside the truth and beside what others get wrong.

        Args:
            truth: the right number.
            mistakes: frequent answers, and what is wrong with each.
        """
        self._unanswered()
        mistakes = mistakes or {}
        with style():
            figure = NotebookFigure(figsize=(8, 1.9 + 0.22 * len(mistakes)), layout="constrained")
            axes = figure.subplots()
            axes.axhline(0, color=GREY, linewidth=1)
            values = [self.low, self.high, truth, *mistakes]
            margin, middle = 0.05 * (max(values) - min(values)), (max(values) + min(values)) / 2
            for number, (value, text) in enumerate(mistakes.items(), start=1):
                axes.plot(value, 0, "x", color=GREY, markersize=8)
                side = "right" if value > middle else "left"  # so that the text stays within the axes
                axes.annotate(
                    text,
                    (value, 0),
                    (0, -14 - 14 * number),
                    textcoords="offset points",
                    color=GREY,
                    fontsize=9,
                    ha=side,
                )
            axes.plot(truth, 0, "o", color=ORANGE, markersize=12, label=f"measured: {truth:.1f}")
            if self.answer is not None:
                axes.plot(self.answer, 0, "D", color=BLUE, markersize=10, label=f"your answer: {self.answer:.1f}")
            axes.set(xlim=(min(values) - margin, max(values) + margin), yticks=[], title=self.text)
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
        """Say whether the answer is right, and what is wrong with the others.

        Raises:
            ValueError: the right answer is not among the options.
        """
        if right not in self.options:
            raise ValueError(f"'{right}' is none of the options {', '.join(self.options)}")
        if not self._unanswered():
            print(f"{'✓' if self.answer == right else '✗'} Your answer: {self.answer}")
        print(f"Right: {right}")
        for option, text in (mistakes or {}).items():
            print(f"Not “{option}”: {text}")


class Curve(Question):
    """A question for a curve: one slider for each place on an axis."""

    def __init__(self, text: str, places: Sequence[str], low: float, high: float) -> None:
        sliders = [
            widgets.FloatSlider(
                (low + high) / 2, min=low, max=high, step=0.5, orientation="vertical", description=place, style=_WIDE
            )
            for place in places
        ]
        super().__init__(text, sliders)
        self.places = tuple(places)
        self.widget.children = [
            self.widget.children[0],
            widgets.HBox(sliders, layout=widgets.Layout(flex_flow="row wrap")),
            *self.widget.children[1 + len(sliders) :],
        ]

    def _values(self) -> list[float]:
        return [slider.value for slider in self.controls]

    def reveal(self, truth: Sequence[float], label: str) -> Figure:
        """Show the drawn curve beside the measured one.

        Args:
            truth: the measured value of each place; NaN where there is none.
            label: what the values are, for the axis.
        """
        self._unanswered()
        with style():
            figure = NotebookFigure(figsize=(8, 3.2), layout="constrained")
            axes = figure.subplots()
            axes.plot(range(len(self.places)), truth, "o-", color=ORANGE, label="measured")
            if self.answer is not None:
                axes.plot(range(len(self.places)), self.answer, "D--", color=BLUE, label="your curve")
                error = float(np.nanmean(np.abs(np.array(self.answer) - np.array(truth, dtype=float))))
                axes.text(0.02, 0.04, f"on average {error:.1f} apart", transform=axes.transAxes, color=GREY, fontsize=9)
            axes.axhline(0, color="black", linewidth=0.8)
            axes.set_xticks(range(len(self.places)), self.places)
            axes.set(ylabel=label, title=self.text)
            axes.legend(loc="best")
        return figure

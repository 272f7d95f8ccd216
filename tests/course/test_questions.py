"""Predict, then reveal."""

import numpy as np
import pytest

from dimaskdino.course.questions import Choice, Curve, Number


def test_an_answer_is_committed_with_the_button_and_stays():
    question = Number("How many?", 0, 10)
    assert question.answer is None
    question.controls[0].value = 7
    question._button.click()
    assert question.answer == 7
    assert question.controls[0].disabled
    data, _ = question._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in data
    assert data["text/plain"].startswith("How many?")


def test_a_number_is_shown_beside_the_truth_and_mistakes(capsys):
    question = Number("How many?", 0, 10)
    unanswered = question.reveal(4.5)
    assert "Answer the question first" in capsys.readouterr().out
    assert [text.get_text() for text in unanswered.legends[0].get_texts()] == ["measured: 4.5"]
    question.commit(7)
    figure = question.reveal(4.5, {0.0: "too small", 40.0: "too large"})
    axes = figure.axes[0]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["measured: 4.5", "your answer: 7.0"]
    assert {text.get_text() for text in axes.texts} == {"too small", "too large"}
    assert axes.get_xlim()[1] > 40


def test_a_choice_says_what_is_wrong_with_the_others(capsys):
    question = Choice("Which?", ["this", "that"])
    question.controls[0].value = "that"
    question._button.click()
    question.reveal("this", {"that": "it is not"})
    printed = capsys.readouterr().out
    assert printed == "✗ Your answer: that\nRight: this\nNot “that”: it is not\n"
    question.commit("this")
    question.reveal("this")
    assert capsys.readouterr().out.startswith("✓ Your answer: this")
    with pytest.raises(ValueError, match="'other' is none of the options this, that"):
        question.reveal("other")


def test_a_drawn_curve_is_compared_place_by_place():
    question = Curve("How does it go?", ["first", "second", "third"], -5, 5)
    for slider, value in zip(question.controls, (1.0, 2.0, 4.0), strict=True):
        slider.value = value
    question._button.click()
    axes = question.reveal([2.0, np.nan, 1.0], "points").axes[0]
    assert question.answer == [1.0, 2.0, 4.0]
    assert list(axes.lines[1].get_ydata()) == [1.0, 2.0, 4.0]
    assert axes.texts[0].get_text() == "on average 2.0 apart"  # of 1 and 3, the second has no truth

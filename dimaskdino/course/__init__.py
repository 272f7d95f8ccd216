"""The course's notebooks: made from sources, opened with a model, their exercises checked."""

from dimaskdino.course.lesson import Lesson, begin

__all__ = ["Lesson", "begin"]

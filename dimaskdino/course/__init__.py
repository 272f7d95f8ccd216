"""Lessons, questions and exercise checks, for the chapters of the course."""

from dimaskdino.course.lesson import Lesson, begin

__all__ = ["Lesson", "begin"]

"""The checks of the exercises, a file for each chapter; `checks` runs them."""

from . import (chapter_01, chapter_02, chapter_03, chapter_04, chapter_05, chapter_06, chapter_07, chapter_08,  # noqa: F401
               chapter_09, chapter_10)

"""Sphinx's settings for the book. `build.py` prepares the sources in book/_build/source and calls Sphinx with this file.

Nothing is executed, and nothing comes from elsewhere when a page is read: MathJax lies in _static/mathjax.
"""

import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

import sphinxcontrib.bibtex.plugin
from pybtex.plugin import register_plugin
from pybtex.style.formatting.unsrt import Style
from pybtex.style.labels import BaseLabelStyle
from pybtex.style.sorting import BaseSortingStyle
from pybtex.style.template import field as bib_field, href, join
from sphinxcontrib.bibtex.style.referencing import BracketStyle
from sphinxcontrib.bibtex.style.referencing.label import LabelReferenceStyle

BOOK = Path(__file__).parent
sys.path[:0] = [str(BOOK.parent), str(BOOK)]

import ldm_minimal  # noqa: E402
from build import known_papers  # noqa: E402

highlight_language = "none"
project = "ldm_minimal"
author = "the ldm_minimal authors"
project_copyright = f"2026, {author}, MIT license"
version = release = ldm_minimal.__version__
language = "en"

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.viewcode", "sphinx.ext.mathjax", "sphinx_copybutton",
              "sphinxcontrib.bibtex"]
source_suffix = {".md": "myst-nb", ".ipynb": "myst-nb", ".rst": "restructuredtext"}
master_doc = "index"

# notebooks: as they were stored

nb_execution_mode = "off"
nb_merge_streams = True
nb_code_prompt_show, nb_code_prompt_hide = "Show the set-up cell", "Hide the set-up cell"
myst_enable_extensions = ["dollarmath", "attrs_inline", "attrs_block", "colon_fence", "deflist"]
myst_heading_anchors = 4
myst_dmath_double_inline = True


# look

html_theme = "sphinx_book_theme"
html_title = "Latent diffusion from scratch"
html_static_path = ["static"]  # build.py adds MathJax and the interactive page
html_favicon = "static/favicon.svg"
html_css_files = ["book.css"]
html_js_files = [("book.js", {"defer": "defer"})]
html_copy_source = False
html_domain_indices = False
html_show_sphinx = False
html_last_updated_fmt = None
html_permalinks_icon = "#"
html_context = {"default_mode": "auto"}
html_theme_options = {
    "use_download_button": False,  # each chapter has its own link, to the notebook as it is in the repository
    "use_fullscreen_button": False,
    "navbar_start": [], "navbar_center": [], "navbar_end": [], "navbar_persistent": [],  # the side bar has it all
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}
copybutton_selector = "div.highlight pre"
mathjax_path = "mathjax/tex-chtml.js"
mathjax3_config = {"options": {"enableMenu": False}}

# the API reference: docstrings are plain text with formulas, so indented lines are shown as they stand

add_module_names = False
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
autodoc_typehints = "signature"
autodoc_inherit_docstrings = False
autodoc_preserve_defaults = True


PAPERS = known_papers()
PAPER = re.compile(r"(?<![\w./])\d{4}\.\d{4,5}(?!\w)")


def plain_docstring(app, what, name, obj, options, lines: list[str]) -> None:
    """Docstring -> reStructuredText: indented blocks become literal, `code` becomes ``code``, the rest is escaped."""
    made, literal = [], False
    for line in lines:
        if line.startswith("  "):
            if not literal:
                made += ["", ".. code-block:: text", ""]
            literal = True
            made.append("  " + line)
        else:
            if literal and line.strip():
                made.append("")
                literal = False
            parts = re.split(r"`+([^`]+)`+", line)
            parts[::2] = [re.sub(r"([*_|\\])", r"\\\1", part) for part in parts[::2]]
            parts[::2] = [PAPER.sub(lambda m: f":cite:`{m[0]}`" if m[0] in PAPERS else m[0], part) for part in parts[::2]]
            parts[1::2] = [f"``{part}``" for part in parts[1::2]]
            made.append("".join(parts))
    lines[:] = made


# the bibliography: labels are arXiv numbers, as the chapters cite them

bibtex_bibfiles = ["references.bib"]
bibtex_default_style = "numbered_by_arxiv"
bibtex_reference_style = "bare"


class ArxivLabels(BaseLabelStyle):
    def format_labels(self, entries):
        return [entry.fields.get("eprint", entry.key) for entry in entries]


class ByNumber(BaseSortingStyle):
    def sorting_key(self, entry):
        return entry.fields["year"], entry.key


class ArxivStyle(Style):
    default_label_style = ArxivLabels
    default_sorting_style = ByNumber

    def get_eprint_template(self, e):
        return href[join["https://arxiv.org/abs/", bib_field("eprint", raw=True)], join["arXiv:", bib_field("eprint", raw=True)]]

    def format_web_refs(self, e):
        return self.get_eprint_template(e) if "eprint" in e.fields else super().format_web_refs(e)


@dataclass
class BareStyle(LabelReferenceStyle):
    """The label without brackets: the chapters' sentences have their own."""

    bracket_parenthetical: BracketStyle = field(default_factory=lambda: BracketStyle(left="", right=""))


register_plugin("pybtex.style.formatting", "numbered_by_arxiv", ArxivStyle)
sphinxcontrib.bibtex.plugin.register_plugin("sphinxcontrib.bibtex.style.referencing", "bare", BareStyle)


# roles and labels that checkers of accessibility object to

ROLES = {'role="doc-biblioentry"': 'role="listitem"', '<summary aria-label="Toggle hidden content">': "<summary>"}


def plain_roles(app, pagename, templatename, context, doctree) -> None:
    for theirs, ours in ROLES.items():
        context["body"] = context.get("body", "").replace(theirs, ours)


def setup(app) -> None:
    app.connect("autodoc-process-docstring", plain_docstring)
    app.connect("html-page-context", plain_roles)

"""How the pages and docstrings become the manual: ``python -m sphinx -W -n docs OUTPUT``.

Nothing is fetched while it is built or read: no inventory of other projects, no font, no script from elsewhere.
"""

import enum
import inspect
import re
import tomllib
from pathlib import Path

from sphinx.domains.python import PyObject  # type: ignore[attr-defined]  # where every version has it

_ROOT = Path(__file__).resolve().parent.parent

project = "qmpvcpu"
author = "the qmpvcpu authors"
project_copyright = author
version = release = tomllib.loads((_ROOT / "pyproject.toml").read_text())["project"]["version"]

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
source_suffix = {".md": "markdown"}

# The pages must read well on a plain forge: Markdown, relative links, anchors as forges make them.
myst_heading_anchors = 4
myst_links_external_new_tab = False

html_theme = "furo"
html_title = f"qmpvcpu {version}"
html_copy_source = False
html_show_sphinx = False
html_theme_options = {"navigation_with_keys": True}
html_static_path = ["_static"]
html_css_files = ["manual.css"]
toc_object_entries_show_parents = "hide"

autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "undoc-members": True}
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
python_display_short_literal_types = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_custom_sections = ["Source", "Shapes", "Units"]

nitpicky = True
# Only our own names can be resolved: the standard library's are elsewhere, and nothing is fetched.
nitpick_ignore_regex = [
    ("py:.*", r"(?!qmpvcpu\b).*"),
    ("py:.*", r"qmpvcpu\..*\b(_\w+|G|Runner)"),  # type variables, and what is private in a hint
]

#: Classes whose objects are handed out: how they are made is nobody else's business.
_HANDED_OUT = {
    "VcpuController",
    "UnplugRequest",
    "Host",
    "EventStream",
    "Export",
    "DomainConfig",
    "FleetEvents",
    "Results",
    "RunControl",
    "Bus",
    "Bucket",
    "Feed",
}

_COLON = "\ue000"  # of the private use area: nobody writes it
_SECTION_IN_LINE = re.compile(r"^(\s*)(Source|Shapes|Units): (?=\S)")


def _before_napoleon(
    _app: object, what: str, name: str, _subject: object, _options: object, lines: list[str]
) -> None:
    """Prepare a docstring for napoleon, and for readers who use the package and do not work on it."""
    if what == "module" and name != "qmpvcpu.errors":
        lines.clear()  # which floor it is on, and what is in it: the page says what it is for
    # A section that is told in its first line (``Units: seconds``) looks like the others.
    lines[:] = [_SECTION_IN_LINE.sub(r"\1**\2:** ", line) for line in lines if not line.startswith("Floor ")]
    if what == "property" and lines:
        lines[0] = lines[0].replace(":", _COLON)  # else what stands before it is taken for the property's type


def _after_napoleon(
    _app: object, _what: str, _name: str, _subject: object, _options: object, lines: list[str]
) -> None:
    """Put back what _before_napoleon took away."""
    lines[:] = [line.replace(_COLON, ":") for line in lines]


def _no_constructor(_app: object, what: str, name: str, *_rest: object) -> tuple[str, None] | None:
    """Show no constructor where users call none."""
    return ("", None) if what == "class" and name.rpartition(".")[2] in _HANDED_OUT else None


def _skip_fields(_app: object, what: str, _name: str, subject: object, *_rest: object) -> bool | None:
    """Leave out what the section Attributes of a class has told already: all but methods, properties and members."""
    if what != "class" or isinstance(subject, enum.Enum | property | classmethod | staticmethod):
        return None
    return None if inspect.isroutine(subject) and not inspect.ismemberdescriptor(subject) else True


def setup(app) -> None:  # type: ignore[no-untyped-def]  # noqa: ANN001 - Sphinx is no dependency of the type check
    """Add to Sphinx what its options cannot say."""
    for field in PyObject.doc_field_types:
        if field.name == "variable":
            field.label = "Attributes"  # as the docstrings call them
    app.connect("autodoc-skip-member", _skip_fields)
    app.connect("autodoc-process-signature", _no_constructor)
    app.connect("autodoc-process-docstring", _before_napoleon, priority=100)
    app.connect("autodoc-process-docstring", _after_napoleon, priority=900)

"""Just enough SVG for the manual's diagrams: boxes, words, arrows, in colours for a light and a dark page."""

from dataclasses import dataclass, field
from html import escape

_LIGHT = {"page": "#ffffff", "ink": "#1f2328", "faint": "#59636e", "box": "#f6f8fa", "rim": "#8c959f"}
_DARK = {"page": "#161b22", "ink": "#e6edf3", "faint": "#9198a1", "box": "#21262d", "rim": "#6e7681"}
_TONES = {  # of an arrow or a box: light, dark
    "good": ("#1a7f37", "#3fb950"),
    "bad": ("#cf222e", "#ff7b72"),
    "doubt": ("#9a6700", "#d29922"),
    "plain": ("#0969da", "#58a6ff"),
}


def _colours(of: dict[str, str], tone: int) -> str:
    tones = "".join(
        f".{name}{{stroke:{pair[tone]}}}.{name}-ink,.{name}-tip{{fill:{pair[tone]}}}" for name, pair in _TONES.items()
    )
    return (
        f".page{{fill:{of['page']}}}text{{fill:{of['ink']}}}.faint{{fill:{of['faint']}}}"
        f".box{{fill:{of['box']};stroke:{of['rim']}}}.life{{stroke:{of['rim']}}}.halo{{stroke:{of['page']}}}{tones}"
    )


_STYLE = (
    "text{font-family:system-ui,'Segoe UI','DejaVu Sans',sans-serif;font-size:13px}"
    ".code{font-family:ui-monospace,'DejaVu Sans Mono',monospace;font-size:12px}"
    ".small{font-size:11px}.strong{font-weight:600}"
    ".box{stroke-width:1}.arrow{fill:none;stroke-width:1.6}.dashed{stroke-dasharray:5 4}"
    ".life{stroke-width:1;stroke-dasharray:2 4}.halo{stroke-width:5;stroke-linejoin:round;paint-order:stroke}"
    + _colours(_LIGHT, 0)
    + f"@media (prefers-color-scheme:dark){{{_colours(_DARK, 1)}}}"
)


@dataclass
class Drawing:
    """One picture; (0, 0) is its upper left corner, and units are pixels.

    Attributes:
        width: How wide it is.
        height: How high it is.
        title: What it shows, for those who do not see it.
    """

    width: int
    height: int
    title: str
    _parts: list[str] = field(default_factory=list)

    def box(self, x: float, y: float, width: float, height: float, tone: str = "") -> None:
        """Draw a box with its corner at (x, y)."""
        self._parts.append(
            f'<rect class="box {tone}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="7"/>'
        )

    def text(self, x: float, y: float, words: str, kind: str = "", anchor: str = "middle") -> None:
        """Write *words* with their base line at y; *kind*: code, small, strong, faint, a tone with ``-ink``."""
        place = f'x="{x:g}" y="{y:g}" text-anchor="{anchor}"'
        self._parts.append(f'<text class="halo {kind}" {place}>{escape(words)}</text>')

    def arrow(self, path: str, tone: str = "plain", *, dashed: bool = False) -> None:
        """Draw an arrow along *path*, an SVG path."""
        kind = f"arrow {tone}{' dashed' if dashed else ''}"
        self._parts.append(f'<path class="{kind}" d="{path}" marker-end="url(#{tone})"/>')

    def life_line(self, x: float, top: float, bottom: float) -> None:
        """Draw the line of somebody's life in a sequence."""
        self._parts.append(f'<line class="life" x1="{x:g}" y1="{top:g}" x2="{x:g}" y2="{bottom:g}"/>')

    def __str__(self) -> str:
        tips = "".join(
            f'<marker id="{name}" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" '
            f'orient="auto-start-reverse"><path class="{name}-tip" d="M0 0L10 5L0 10z"/></marker>'
            for name in _TONES
        )
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{self.width}" height="{self.height}" '
            f'viewBox="0 0 {self.width} {self.height}" role="img">'
        )
        page = f'<rect class="page" width="{self.width}" height="{self.height}" rx="10"/>'
        parts = [head, f"<title>{escape(self.title)}</title><style>{_STYLE}</style><defs>{tips}</defs>", page]
        return "\n".join([*parts, *self._parts, "</svg>", ""])

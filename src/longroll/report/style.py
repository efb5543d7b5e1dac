"""Colours per role and the looks (web, phone, paper) a figure can be drawn in.

One palette serves every medium: figures are drawn in the light hex values; on the page each becomes a CSS
variable (`svg.py`), so a dark page recolours the same drawing. The run colours keep 4.5:1 contrast on their
ground, differ in lightness, and every repaired run has its own dash, so that figures are readable in grey.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from longroll.report.runs import AnyRun, as_run, labels, role_of


@dataclass(frozen=True)
class Tone:
    """A named colour with its light and dark value; `name` is its CSS variable without the dashes."""

    name: str
    light: str
    dark: str


INK = Tone("ink", "#1c2127", "#e6e9ed")
MUTED = Tone("muted", "#5f6973", "#9ba5b0")
RULE = Tone("rule", "#dfe3e7", "#2c333b")
PAPER = Tone("paper", "#fdfdfc", "#14171b")

RUN_TONES = {
    "base": Tone("run-base", "#2a323b", "#d3d9df"),
    "none": Tone("run-none", "#6e757c", "#8f99a4"),
    "random": Tone("run-random", "#946200", "#e0ae45"),
    "fitted": Tone("run-fitted", "#a03a84", "#e48fc8"),
    "sp": Tone("run-sp", "#0a66b0", "#62b0f0"),
    "tbptt": Tone("run-tbptt", "#0b7a5a", "#46c59c"),
}
SPARE_TONES = (
    Tone("run-a", "#c04a0b", "#f58f55"),
    Tone("run-b", "#6a51b8", "#ab9af2"),
    Tone("run-c", "#2e7f93", "#67c3d8"),
    Tone("run-d", "#8a4b3a", "#d9a08e"),
)
BELOW = Tone("below", "#0b66b1", "#63b1f1")  # the two ends of a diverging map; also better and worse
ABOVE = Tone("above", "#b8470c", "#f58f56")
TONES = (INK, MUTED, RULE, PAPER, *RUN_TONES.values(), *SPARE_TONES, BELOW, ABOVE)

Dash = Any  # a line style of matplotlib: a name, or (offset, (on, off, ...))
_DASHES: dict[str, Dash] = {
    "base": "solid",
    "none": (0, (1.2, 1.6)),
    "random": (0, (5, 1.6, 1.2, 1.6)),
    "fitted": (0, (3, 1.6)),
    "sp": (0, (5.5, 2)),
    "tbptt": (0, (8, 1.8, 2.5, 1.8)),
}
_SPARE_DASHES: tuple[Dash, ...] = ((0, (4, 2)), (0, (2, 1.2)), (0, (7, 2, 1.2, 2)), (0, (5, 1, 2, 1)))


@dataclass(frozen=True)
class RunStyle:
    """How one run is drawn everywhere: its label, tone and dash."""

    label: str
    role: str
    tone: Tone
    dash: Dash

    @property
    def color(self) -> str:
        """The colour matplotlib draws with."""
        return self.tone.light


def run_styles(runs: Sequence[AnyRun]) -> list[RunStyle]:
    """Give every run its style: the first is the base, each later one the tone of its role or a spare one."""
    styles: list[RunStyle] = []
    spare = 0
    opened = [as_run(run) for run in runs]
    for i, (run, label) in enumerate(zip(opened, labels(opened), strict=True)):
        role = "base" if i == 0 else role_of(run)
        if role in RUN_TONES and role not in {style.role for style in styles}:
            tone, dash = RUN_TONES[role], _DASHES[role]
        else:
            tone, dash = SPARE_TONES[spare % len(SPARE_TONES)], _SPARE_DASHES[spare % len(_SPARE_DASHES)]
            spare, role = spare + 1, "other"
        styles.append(RunStyle(label, role, tone, dash))
    return styles


@dataclass(frozen=True)
class Look:
    """A medium: its width, its type sizes and how much fits on it.

    On the web one matplotlib point is one CSS pixel (the SVG is 72 dpi), so 12.5 below means 12.5 px.
    """

    name: str
    width: float
    """Width in inches of 72 points."""
    text: float
    """Size of labels, in points."""
    small: float
    """Size of ticks and remarks, in points."""
    line: float
    """Width of a curve, in points."""
    aspect: float
    """Height of a single plot over its width."""
    family: str
    """A font family that ships with matplotlib: the layout is then the same on every machine."""
    columns: int
    """Panels side by side in a figure of small multiples."""
    panels: int
    """Panels in all."""
    upright: bool = True
    """Whether the name of the y axis stands above it, as on the web, or runs along it, as in print."""
    x: str = "log"
    """Scale of an axis of positions or lengths: "log" or "linear"."""

    @property
    def points(self) -> float:
        """Width in points."""
        return 72 * self.width

    @property
    def rc(self) -> Any:  # matplotlib's own type for it changes from version to version
        """The matplotlib settings of this medium."""
        return {
            "font.family": [self.family, "DejaVu Sans"],  # the second for signs the first lacks, like ⁶
            "font.size": self.text,
            "axes.labelsize": self.text,
            "axes.titlesize": self.text,
            "xtick.labelsize": self.small,
            "ytick.labelsize": self.small,
            "legend.fontsize": self.text,
            "text.color": INK.light,
            "text.parse_math": False,  # a "$" in a label is a dollar
            "axes.labelcolor": MUTED.light,
            "axes.edgecolor": MUTED.light,
            "axes.linewidth": 0.8 if self.upright else 0.6,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.spines.left": not self.upright,
            "axes.grid": self.upright,
            "axes.grid.axis": "y",
            "axes.axisbelow": True,
            "axes.facecolor": "none",
            "figure.facecolor": "none",
            "savefig.facecolor": "none",
            "grid.color": RULE.light,
            "grid.linewidth": 0.8,
            "xtick.color": MUTED.light,
            "ytick.color": MUTED.light,
            "xtick.labelcolor": MUTED.light,
            "ytick.labelcolor": MUTED.light,
            "xtick.major.size": 4 if self.upright else 2.5,
            "xtick.major.width": 0.8 if self.upright else 0.6,
            "ytick.major.size": 0 if self.upright else 2.5,
            "ytick.major.width": 0.6,
            "lines.linewidth": self.line,
            "lines.dash_capstyle": "butt",
            "lines.scale_dashes": True,
            "legend.frameon": False,
            "figure.constrained_layout.h_pad": 0.03,
            "figure.constrained_layout.w_pad": 0.03,
            "figure.constrained_layout.wspace": 0.06,
            "figure.constrained_layout.hspace": 0.05,
            "svg.fonttype": "none",  # text stays text: searchable, and set in the font of the page
            "svg.hashsalt": "longroll",  # ids that do not change from run to run
            "pdf.fonttype": 42,  # embedded TrueType, as conferences ask
            "ps.fonttype": 42,
        }


WEB = Look(
    "web", 860 / 72, text=13, small=12.5, line=2, aspect=0.46, family="DejaVu Sans", columns=3, panels=6
)
PHONE = Look(
    "phone", 350 / 72, text=12, small=11, line=1.8, aspect=0.8, family="DejaVu Sans", columns=2, panels=4
)
PAPER_COLUMN = Look(
    "paper",
    3.25,
    text=8,
    small=7,
    line=1.2,
    aspect=0.66,
    family="STIXGeneral",
    columns=2,
    panels=4,
    upright=False,
)
PAPER_PAGE = Look(
    "paper-wide",
    6.75,
    text=8,
    small=7,
    line=1.2,
    aspect=0.36,
    family="STIXGeneral",
    columns=3,
    panels=6,
    upright=False,
)


def css_variables() -> str:
    """Write the palette as CSS variables: light, and dark where the reader asks for it on a screen."""
    light = "".join(f"--{tone.name}:{tone.light};" for tone in TONES)
    dark = "".join(f"--{tone.name}:{tone.dark};" for tone in TONES)
    return f":root{{{light}}}\n@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}"

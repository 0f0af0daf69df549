"""Colours, fonts and files of the figures of studies, probes and comparisons."""

import warnings
from pathlib import Path

_FALLBACK_FONTS = (
    *(f"Noto Sans CJK {region}" for region in ("SC", "TC", "JP", "KR")),
    *("Source Han Sans", "WenQuanYi Zen Hei", "WenQuanYi Micro Hei", "IPAexGothic", "IPAGothic", "NanumGothic"),
    *("PingFang SC", "Hiragino Sans", "Apple SD Gothic Neo", "Microsoft YaHei", "Yu Gothic", "Malgun Gothic"),
)
"""Fonts, if installed, for scripts that matplotlib's own font lacks."""

BLACK, VERMILLION, BLUE = "#000000", "#D55E00", "#0072B2"
_COLORS = [VERMILLION, BLUE, "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]
"""Palette of Okabe and Ito (2008), distinguishable with any colour vision."""
_MARKERS = "sD^vPX"
_LINES = ["-", "--", ":", "-."]


def style(index: int) -> dict[str, str]:
    """Colour, marker and line of the curve with that index; the first alone is black."""
    if index == 0:
        return {"color": BLACK, "marker": "o", "linestyle": "-"}
    cycle, index = divmod(index - 1, len(_COLORS))
    return {"color": _COLORS[index], "marker": _MARKERS[index], "linestyle": _LINES[cycle % len(_LINES)]}


def new_figure(width: float, height: float):
    """An empty figure, in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure, path: Path) -> Path:
    """Writes a picture, a PNG byte-identical each time; characters that no font has are drawn as boxes."""
    from matplotlib.font_manager import get_font_names
    from matplotlib.text import Text

    installed = set(get_font_names())
    families = ["DejaVu Sans", *(name for name in _FALLBACK_FONTS if name in installed)]
    for text in figure.findobj(Text):
        text.set_fontfamily(families)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        # A PNG without the version of matplotlib; other formats have no such entry.
        figure.savefig(path, dpi=120, metadata={"Software": None} if path.suffix.lower() == ".png" else None)
    return path


def escape(name: str) -> str:
    """Escapes dollar signs, which start formulas in matplotlib."""
    return name.replace("$", r"\$")

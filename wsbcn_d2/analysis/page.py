"""A page of text, tables and pictures, as Markdown with files beside it or as one HTML file."""

import base64
import html
import io
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Dict, List, Sequence, Union

from matplotlib import rc_context
from matplotlib.figure import Figure
from PIL import Image

from ..engine.checkpoint import atomic_write

_DOTS_PER_INCH = 110

# For functions that draw: a "$" in a name is no formula.
AS_WRITTEN = rc_context({"text.parse_math": False})

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff;
       max-width: 1100px; margin: 2em auto; padding: 0 1em; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2em; }
img { max-width: 100%; height: auto; display: block; margin: 1em 0; }
div.table { overflow-x: auto; margin: 1em 0; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: 3px 9px; text-align: right; white-space: nowrap; border-bottom: 1px solid #ddd; }
th { border-bottom: 2px solid #999; } tbody tr:hover { background: #f4f6fa; }
.left { text-align: left; }
code { background: #f2f2f2; padding: 1px 4px; border-radius: 3px; }
summary { cursor: pointer; font-weight: 600; }
"""


@dataclass
class Heading:
    """A heading below that of the page."""

    text: str


@dataclass
class Text:
    """A paragraph, in which ``code`` and **bold** are as in Markdown."""

    text: str


@dataclass
class Table:
    """A table of texts.

    Attributes:
        header: names of the columns.
        rows: as many cells each.
        left: how many columns are aligned to the left; the others to the right.
        summary: if not empty, the table is hidden behind this line.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int = 1
    summary: str = ""


@dataclass
class Picture:
    """A figure, and the word that ends the name of its PNG file."""

    figure: Figure
    name: str
    description: str


Block = Union[Heading, Text, Table, Picture]


@dataclass
class Page:
    """A page.

    Attributes:
        title: its first heading.
        blocks: what follows, in order.
    """

    title: str
    blocks: List[Block] = field(default_factory=list)

    def write(self, folder: str, name: str) -> List[str]:
        """Writes the page, in files that appear when they are complete.

        Args:
            folder: made if it is not there.
            name: the files are ``NAME.md``, ``NAME.html`` and ``NAME-<picture>.png``.

        Returns:
            Their paths.
        """
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        pictures = {b.name: _png(b.figure) for b in self.blocks if isinstance(b, Picture)}
        files = {f"{name}-{key}.png": data for key, data in pictures.items()}
        files[f"{name}.md"] = self.markdown(name).encode()
        files[f"{name}.html"] = self._html(pictures).encode()
        for file_name, data in files.items():
            with atomic_write(str(path / file_name)) as file:
                file.write(data)
        return [str(path / file_name) for file_name in files]

    def markdown(self, name: str) -> str:
        """The page as Markdown, with pictures named ``NAME-<picture>.png``."""
        parts = [f"# {self.title}"]
        for block in self.blocks:
            if isinstance(block, Heading):
                parts.append(f"## {block.text}")
            elif isinstance(block, Text):
                parts.append(block.text)
            elif isinstance(block, Picture):
                parts.append(f"![{block.description}]({name}-{block.name}.png)")
            else:
                parts.append(_markdown_table(block))
        return "\n\n".join(parts) + "\n"

    def _html(self, pictures: Dict[str, bytes]) -> str:
        """The page as one HTML file that refers to nothing outside."""
        title = html.escape(self.title)
        parts = [f"<h1>{title}</h1>"]
        for block in self.blocks:
            if isinstance(block, Heading):
                parts.append(f"<h2>{_inline(block.text)}</h2>")
            elif isinstance(block, Text):
                parts.append(f"<p>{_inline(block.text)}</p>")
            elif isinstance(block, Picture):
                data = base64.b64encode(pictures[block.name]).decode()
                alt = html.escape(block.description)
                parts.append(f'<img alt="{alt}" src="data:image/png;base64,{data}">')
            else:
                parts.append(_html_table(block))
        return (
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            f"<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
            + "\n".join(parts)
            + "\n</body>\n</html>\n"
        )


@AS_WRITTEN
def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(
        buffer,
        format="png",
        dpi=_DOTS_PER_INCH,
        bbox_inches="tight",  # nothing is cut off, however long labels are
        metadata={"Software": None},  # the same results give the same file with any matplotlib
    )
    # A palette is enough for drawings, and makes pages a third of the size.
    small = io.BytesIO()
    Image.open(buffer).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(
        small, format="png", optimize=True
    )
    return small.getvalue()


def _markdown_table(table: Table) -> str:
    alignment = ["---"] * table.left + ["---:"] * (len(table.header) - table.left)
    rows = [[cell.replace("|", "\\|") for cell in row] for row in [table.header, *table.rows]]
    lines = ["| " + " | ".join(row) + " |" for row in [rows[0], alignment, *rows[1:]]]
    text = "\n".join(lines)
    if table.summary:
        return f"<details><summary>{table.summary}</summary>\n\n{text}\n\n</details>"
    return text


def _html_table(table: Table) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        tags = [
            f'<{tag} class="left">' if i < table.left else f"<{tag}>" for i in range(len(cells))
        ]
        return "<tr>" + "".join(f"{t}{_inline(c)}</{tag}>" for t, c in zip(tags, cells)) + "</tr>"

    head = row(table.header, "th")
    body = "\n".join(row(cells, "td") for cells in table.rows)
    text = (
        f'<div class="table"><table>\n<thead>{head}</thead>\n<tbody>\n{body}\n</tbody>\n'
        "</table></div>"
    )
    if table.summary:
        return f"<details><summary>{_inline(table.summary)}</summary>\n{text}\n</details>"
    return text


def _inline(text: str) -> str:
    escaped = html.escape(text, quote=False)
    escaped = re.sub(r"`([^`]+)`", r"<code>\1</code>", escaped)
    return re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", escaped)

"""Pages of text, tables and pictures, as Markdown and as one page of HTML without scripts."""

import html
import re
from collections.abc import Iterable
from typing import NamedTuple

Rows = list[list[str]]


class Heading(NamedTuple):
    """A heading within a page.

    Args:
      text: what it says.
    """

    text: str


class Picture(NamedTuple):
    """A picture beside the page.

    Args:
      file: its name, in the page's directory.
      text: what it shows.
    """

    file: str
    text: str


class Page(NamedTuple):
    """A page.

    Args:
      title: on top.
      blocks: what follows: paragraphs, tables as rows of cells with the head first, pictures.
    """

    title: str
    blocks: list[str | Rows | Heading | Picture]


def rows_of(rows: Rows) -> str:
    """Rows as a Markdown table.

    Example:
      >>> print(rows_of([['a', 'b'], ['1', '2']]))
      | a | b |
      |---|---|
      | 1 | 2 |
    """
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def markdown(page: Page) -> str:
    """A page as Markdown.

    Example:
      >>> print(markdown(Page('T', ['text', Picture('a.png', 'an a')])))
      # T
      <BLANKLINE>
      text
      <BLANKLINE>
      ![an a](a.png)
      <BLANKLINE>
    """
    return "\n\n".join([f"# {page.title}", *map(_markdown, page.blocks)]) + "\n"


def _markdown(block: str | Rows | Heading | Picture) -> str:
    """A block as Markdown."""
    if isinstance(block, Heading):
        return f"## {block.text}"
    if isinstance(block, Picture):
        return f"![{block.text}]({block.file})"
    return rows_of(block) if isinstance(block, list) else block


def page_html(title: str, pages: Iterable[Page]) -> str:
    """Several pages as one of HTML, which shows pictures from its own directory.

    Args:
      title: on top.
      pages: one after another.

    Returns:
      The whole file.

    Example:
      >>> '<h2 id=p0>A &amp; B</h2><p>text</p>' in page_html('T', [Page('A & B', ['text'])])
      True
    """
    numbered = list(enumerate(pages))
    contents = "".join(f"<li><a href='#p{number}'>{html.escape(page.title)}</a>"
                       for number, page in numbered)
    parts = [f"<h2 id=p{number}>{html.escape(page.title)}</h2>"
             + "".join(map(_html, page.blocks)) for number, page in numbered]
    return ("<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport "
            f"content='width=device-width'><title>{html.escape(title)}</title><style>body{{font:"
            "16px sans-serif;margin:1em;color-scheme:light dark}.t{overflow-x:auto}img{max-width:"
            "100%}table{border-collapse:collapse}td,th{padding:.2em .6em;border-bottom:1px solid "
            f"#8888;white-space:nowrap}}</style><h1>{html.escape(title)}</h1><ul>{contents}</ul>"
            + "".join(parts) + "</html>\n")


def _inline(text: str) -> str:
    """Text as HTML, its `code` and [links](file.md) too; the files lie beside the page."""
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text, quote=False))
    return re.sub(r"\[([^\]]+)\]\(([\w./#-]+)\)", r"<a href='\2'>\1</a>", text)


def _html(block: str | Rows | Heading | Picture) -> str:
    """A block as HTML."""
    if isinstance(block, Heading):
        return f"<h3>{html.escape(block.text)}</h3>"
    if isinstance(block, Picture):
        return f"<p><img src='{html.escape(block.file)}' alt='{html.escape(block.text)}'></p>"
    if isinstance(block, str):
        return f"<p>{_inline(block)}</p>"
    head, *body = block
    lines = ["".join(f"<th>{html.escape(c)}</th>" for c in head),
             *("".join(f"<td>{_inline(c)}</td>" for c in row) for row in body)]
    return "<div class=t><table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table></div>"

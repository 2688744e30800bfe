"""The site: README, docs/ and the pages of measurements, as they stand, and the public functions from their docstrings.

    make docs    # into build/site

The source folder is the repository, so that links between the pages are what they are on GitHub.
"""

import re
from pathlib import Path

from pygments.lexers.special import TextLexer
from sphinx.highlighting import lexers

project = "safe-kernels"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "README"
include_patterns = ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "docs/*.md", "bench/results/*.md"]
html_theme = "furo"
html_title = project
default_role = "code"  # as in Markdown
myst_heading_anchors = 4
autodoc_typehints = "none"
lexers["mermaid"] = TextLexer()  # GitHub draws it

PAGES = {
    "Library": ["docs/kernels", "docs/divergences", "docs/integrations", "docs/performance", "docs/api"],
    "Trainer": ["docs/trainer", "docs/algorithm", "docs/rewards", "docs/scaling", "docs/write-an-algorithm"],
    "Measured": [
        "docs/study",
        "bench/results/README",
        "bench/results/study",
        "bench/results/budget",
        "bench/results/updates",
        "bench/results/per_nat",
    ],
    "Project": ["docs/architecture", "docs/versions", "CONTRIBUTING", "CHANGELOG"],
}


def on_the_site(app, name: str, source: list[str]) -> None:
    """A link to a folder is no page here; the README is the first page: it loses its badges and gets the contents."""
    page = Path(app.srcdir) / f"{name}.md"

    def link(found: re.Match[str]) -> str:
        return found[1] if (page.parent / found[2]).is_dir() else found[0]

    source[0] = re.sub(r"\[([^]]+)\]\(([^)#:]+)\)", link, source[0])
    if name == root_doc:
        source[0] = re.sub(r"^\[!\[.*\n", "", source[0], flags=re.MULTILINE)  # badges are GitHub's
        for title, pages in PAGES.items():
            there = [each for each in pages if (Path(app.srcdir) / f"{each}.md").is_file()]
            source[0] += "\n```{toctree}\n:hidden:\n:caption: " + "\n".join([title, "", *there, "```", ""])


def with_code_blocks(app, what: str, name: str, of: object, options: object, lines: list[str]) -> None:
    """Indented paragraphs of a docstring are code, as in Markdown."""
    found: list[str] = []
    is_code = False
    for line in lines:
        is_indented, follows_blank = line.startswith("    "), not found or not found[-1].strip()
        starts = is_indented and follows_blank and not is_code and any(found)
        if starts and not next(before for before in reversed(found) if before.strip()).startswith("    "):
            found += ["::", ""]
            is_code = True
        elif line.strip() and not is_indented:
            is_code = False
        found.append(line)
    lines[:] = found


def setup(app) -> None:
    app.connect("source-read", on_the_site)
    app.connect("autodoc-process-docstring", with_code_blocks, priority=100)  # before napoleon

"""What MkDocs cannot do by itself: pages of the repository that lie outside ``docs/``.

The changelog and the results of the benchmarks join the site under their paths in the repository,
and links between files of the repository become links of the site. The same Markdown therefore
works on the site and where the repository is read.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
DOCS = "docs/"
OUTSIDE = ("CHANGELOG.md", "benchmarks/README.md", "benchmarks/results/**/*.*")
SERVED = {".md", ".png", ".jsonl"}

_LITERAL = re.compile(r"<p>::</p>\s*|\s*::(?=</p>)")  # announces a block of code in a docstring
_LINK = re.compile(r"(?P<text>!?\[[^\]]*\])\((?P<path>[^()\s#:]+)(?P<anchor>#[^()\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the files from outside ``docs/``."""
    for pattern in OUTSIDE:
        for path in sorted(ROOT.glob(pattern)):
            if path.suffix in SERVED and "quick" not in path.parts:
                name = path.relative_to(ROOT).as_posix()
                files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turn a page's links to files of the repository into links of the site."""
    here = posixpath.dirname(page.file.src_uri)

    def rewritten(link: re.Match) -> str:
        inside = page.file.src_uri.startswith("benchmarks/") or page.file.name == "CHANGELOG"
        folder = here if inside else DOCS + here
        target = posixpath.normpath(posixpath.join(folder, link["path"]))
        if not (ROOT / target).is_file():
            return link[0]  # no file of the repository; MkDocs warns of a broken link
        name = target.removeprefix(DOCS)
        if files.get_file_from_path(name) is None:
            return link["text"].strip("!")[1:-1]  # a file that is not on the site
        relative = posixpath.relpath(name, here or ".")
        return f"{link['text']}({relative}{link['anchor'] or ''})"

    return _LINK.sub(rewritten, markdown)


def on_page_content(html: str, page: Any, config: Any, files: Files) -> str:
    """Leave out the colons that announce a block of code in a docstring."""
    return _LITERAL.sub("", html)

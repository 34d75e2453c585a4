"""The page /toptheta: one document with its style and script inside, which loads nothing from anywhere else."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path

_FOLDER = Path(__file__).parent
_DOCUMENT, _STYLE, *_SCRIPTS = (
    _FOLDER.joinpath(name).read_text(encoding="utf-8") for name in ("page.html", "page.css", "figures.js", "page.js")
)
_SCRIPT = "".join(_SCRIPTS)


def _source(text: str) -> str:
    """What a content security policy calls an inline style or script of this text."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


PAGE = _DOCUMENT.replace("<style></style>", f"<style>{_STYLE}</style>").replace(
    '<script type="module"></script>', f'<script type="module">{_SCRIPT}</script>'
)
PAGE_HEADERS = {
    "Content-Security-Policy": (
        f"default-src 'none'; style-src {_source(_STYLE)}; script-src {_source(_SCRIPT)}; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}

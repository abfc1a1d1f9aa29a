"""The explorer's page: as files for the server, or whole in one file that needs neither server nor network."""

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

_FILES = Path(__file__).with_suffix("")
ASSETS = {"explorer.css": "text/css", "view.js": "text/javascript", "live.js": "text/javascript"}
"""Files that the page loads, and their types."""


def read(name: str) -> str:
    """The text of one of them."""
    return (_FILES / name).read_text(encoding="utf-8")


PAGE = read("index.html")
_STYLE = '<link rel="stylesheet" href="explorer.css">'
_SCRIPTS = '<script src="view.js" defer></script>\n<script src="live.js" defer></script>'


def render(view: dict[str, Any]) -> str:
    """One page that shows a view of `Explorer` and can be opened from a file.

    All text in the view is data: a JSON block, which the page's script shows as text. The page's policy allows its own
    style and script alone.
    """
    style, script = read("explorer.css"), read("view.js")
    policy = f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; img-src data:"
    # "<" could end the block.
    data = json.dumps(view, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    head = f'<meta http-equiv="content-security-policy" content="{policy}">\n<style>{style}</style>'
    tail = f'<script type="application/json" id="view">{data}</script>\n<script>{script}</script>'
    before, style_link, rest = PAGE.partition(_STYLE)
    middle, scripts, after = rest.partition(_SCRIPTS)
    assert style_link and scripts, "the page does not load its files as render expects"
    return f"{before}{head}{middle}{after.replace('</body>', f'{tail}</body>')}"


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()

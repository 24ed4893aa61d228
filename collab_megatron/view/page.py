"""The HTML file around payload and script: a strict content security policy, and data that no parser takes for markup.

    head    policy, title, style
    body    #app, the index, the script, then the blocks

The script stands before the blocks, so the list is painted while the browser still reads the rest. The policy allows
this one script and this one style by hash, and no request at all: no image, no font, no connection, no frame, no form.
Trusted Types are required and no policy may be made, so assigning a text as markup (innerHTML) throws.
"""

from __future__ import annotations

import base64
import hashlib
import html
from importlib.resources import files

from collab_megatron.errors import UserError
from collab_megatron.view.payload import Payload

BUNDLE = "bundle/viewer.js"
STYLE = "browser/viewer.css"
ENDS_A_SCRIPT = ("</script", "<!--", "<script")  # what code inside a script element must not contain
ENDS_A_STYLE = ("</style", "<!--")
PACKED = "application/x-zlib-base64"  # a type that no browser runs


def read_bundle() -> str:
    """The script, built by tools/viewer from browser/*.js. Raises UserError if it was not built."""
    bundle = files("collab_megatron.view").joinpath(BUNDLE)
    if not bundle.is_file():
        raise UserError(
            "the viewer's script was not built (collab_megatron/view/bundle/viewer.js is missing): run npm ci and npm "
            "run build in tools/viewer"
        )
    return bundle.read_text("utf-8")


def read_style() -> str:
    return files("collab_megatron.view").joinpath(STYLE).read_text("utf-8")


def render_page(payload: Payload, *, title: str, script: str, style: str) -> str:
    """The file. Raises ValueError where script or style would end their own element: a bug of the build."""
    for code, ends, name in ((script, ENDS_A_SCRIPT, "script"), (style, ENDS_A_STYLE, "style")):
        if found := next((end for end in ends if end in code.lower()), None):
            raise ValueError(f"the {name} of the viewer contains {found!r}, which an HTML parser would act on")
    script, style = f"\n{script}\n", f"\n{style}\n"
    return "".join(
        (
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n',
            f'<meta http-equiv="Content-Security-Policy" content="{policy(script, style)}">\n',
            '<meta name="referrer" content="no-referrer">\n',
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n',
            '<meta name="color-scheme" content="light dark">\n',
            f"<title>{html.escape(title)}</title>\n<style>{style}</style>\n</head>\n<body>\n",
            '<div id="app"></div>\n<noscript>This page shows a record with a script of its own: allow it.</noscript>\n',
            f'<script type="application/json" id="index">{payload.index}</script>\n<script>{script}</script>\n',
            *(_data(f"words-{number}", words) for number, words in enumerate(payload.words)),
            *(_data(f"block-{number}", block) for number, block in enumerate(payload.blocks)),
            "</body>\n</html>\n",
        )
    )


def policy(script: str, style: str) -> str:
    """The content security policy; the arguments are the exact contents of the two elements."""
    return "; ".join(
        (
            "default-src 'none'",
            f"script-src '{_hash(script)}'",
            f"style-src '{_hash(style)}'",
            "base-uri 'none'",
            "form-action 'none'",
            "require-trusted-types-for 'script'",
            "trusted-types 'none'",
        )
    )


def _hash(content: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode("utf-8")).digest()).decode("ascii")


def _data(name: str, content: str) -> str:
    return f'<script type="{PACKED}" id="{name}">{content}</script>\n'

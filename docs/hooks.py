"""What MkDocs asks while it builds the site: formulas as MathML, which browsers show without a script."""

import re
from typing import Any

from latex2mathml.converter import convert

_FORMULA = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\\(?P<kind>[(\[])(?P<tex>.*?)\\[)\]]</(?P=tag)>', re.DOTALL
)


def on_page_content(html: str, **_of: Any) -> str:
    """The page with every formula that arithmatex marked turned into MathML."""

    def as_mathml(match: re.Match[str]) -> str:
        tex = match["tex"].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&").strip()
        display = "block" if match["kind"] == "[" else "inline"
        # The element stays: the theme lets the wide ones scroll on narrow screens.
        return f'<{match["tag"]} class="arithmatex">{convert(tex, display=display)}</{match["tag"]}>'

    return _FORMULA.sub(as_mathml, html)

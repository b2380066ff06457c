"""SVG elements that escape by construction, and text that hides nothing.

Elements are those of the standard library: whatever text comes in can only come out as text. Positions along x are
given in percent wherever possible, so that a chart fills a phone and a desktop without scaling its letters.
"""

from __future__ import annotations

import re
from xml.etree import ElementTree as ET

Element = ET.Element

# Controls, and signs that turn the direction of the text around them: what they hide is shown instead.
_HIDDEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufffe\uffff]")


def visible(text: str) -> str:
    """Text in which every sign can be seen, such as ``⟨U+202E⟩`` for one that turns the direction of reading."""
    return _HIDDEN.sub(lambda sign: f"⟨U+{ord(sign[0]):04X}⟩", text)


def element(name: str, *children: Element, text: object = None, **attributes: object) -> Element:
    """An element; in the names of attributes ``_`` stands for ``-``, and one at the end is dropped.

    Example:
        >>> render(element("text", text="a < b", text_anchor="end", class_="name"))
        '<text text-anchor="end" class="name">a &lt; b</text>'
    """
    values = {key.removesuffix("_").replace("_", "-"): number(value) for key, value in attributes.items()}
    made = ET.Element(name, values)
    made.text = None if text is None else visible(str(text))
    made.extend(children)
    return made


def drawing(label: str, *children: Element, **attributes: object) -> Element:
    """An ``svg`` element that tells people who cannot see it what it shows."""
    return element("svg", *children, role="img", aria_label=label, **attributes)


def render(made: Element) -> str:
    """The element as markup for HTML."""
    return ET.tostring(made, encoding="unicode")


def number(value: object) -> str:
    """An attribute's value; of a number no more digits than a screen can show."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else visible(str(value))


def percent(value: float) -> str:
    """A position along x."""
    return f"{number(float(value))}%"

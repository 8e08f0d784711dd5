"""Interactive figures that need no kernel: they run in the static page.

Used in chapters 01 (``scores_buffer``), 02 (``what_grows``) and 04 (``roofline``).
``core.py`` holds the object, ``model.py`` and ``scene.py`` compute and draw it in
Python, ``runtime.js`` does both in the browser.  Loads neither torch nor Triton.
"""

from __future__ import annotations

from labkit.explorers.core import Explorer
from labkit.explorers.grows import what_grows
from labkit.explorers.roofline import roofline
from labkit.explorers.scores import scores_buffer

__all__ = ["Explorer", "roofline", "scores_buffer", "what_grows"]

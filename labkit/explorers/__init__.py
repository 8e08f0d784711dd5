"""Interactive figures that need no kernel: they run in the static page.

Used in chapters 01 (``scores_buffer``), 02 (``what_grows``), 04 (``roofline``), 07
(``tile_stepper``), 10 (``fits``), 11 (``pattern_tiles``) and 12 (``nsa_reads``).
``core.py`` holds the object, ``model.py`` and ``scene.py`` compute and draw it in Python,
``runtime.js`` does both in the browser.
``stepper.py`` runs an algorithm when the figure is made, and ``stepper.js`` shows its states;
``patterns.py`` makes masks, and ``tiles.js`` draws them.
Loads neither torch nor Triton; ``tile_stepper`` and ``pattern_tiles`` load torch when called.
"""

from __future__ import annotations

from labkit.explorers.core import Explorer
from labkit.explorers.fits import fits
from labkit.explorers.grows import what_grows
from labkit.explorers.nsa_reads import nsa_reads
from labkit.explorers.patterns import pattern_tiles
from labkit.explorers.roofline import roofline
from labkit.explorers.scores import scores_buffer
from labkit.explorers.stepper import Stepper, tile_stepper

__all__ = [
    "Explorer",
    "Stepper",
    "fits",
    "nsa_reads",
    "pattern_tiles",
    "roofline",
    "scores_buffer",
    "tile_stepper",
    "what_grows",
]

"""Figures: one style, in light and dark, with alt text.

A figure function draws on Axes and is wrapped by ``figure``.  Calling it
draws nothing yet; it returns a ``Drawing``, which is drawn twice, once per
theme, when it is shown::

    plots.show(plots.memory_bars(table), alt="Bars: bytes of each tensor …")

What a notebook stores is the light PNG, with the dark one and the alt text in its
metadata: the book shows the one that fits the reader's theme, print takes the
light one.  Alt text is required, and holds no measured figure: it says which axes
there are and what to see.

House rules: units on each axis, sizes on axes of powers of two, labels beside the
lines instead of a legend, colours that stay apart for colour-blind readers
(after Okabe and Ito) and that never carry a meaning alone.

Loads matplotlib on use, neither torch nor Triton.
"""

from __future__ import annotations

from labkit.plots.axes import bytes_axis, end_labels, size_axis
from labkit.plots.backward import (
    backward_passes,
    backward_rates,
    gradient_errors,
    kernel_split,
    ways_memory,
    ways_time,
)
from labkit.plots.dispatch import backend_map, half_gain, sdpa_picks
from labkit.plots.drawing import Drawing, Shown, draw, figure, show
from labkit.plots.fits import longest_found
from labkit.plots.flash import flash_rates, flash_resources, flash_steps, score_clocks
from labkit.plots.flow import data_flow
from labkit.plots.growth import growth, here_beside_recorded, launch_overhead, scaling_fit
from labkit.plots.hierarchy import (
    access_order,
    bytes_in_flight,
    hierarchy_bandwidth,
    hierarchy_latency,
    reuse,
)
from labkit.plots.layer_speed import (
    layer_gaps,
    layer_launch,
    layer_speedups,
    layer_times,
    speedup_product,
)
from labkit.plots.memory import memory_bars, timeline
from labkit.plots.nsa_half_rate import half_rate_error, half_rate_savings
from labkit.plots.nsa_patterns import (
    attention_patterns,
    gate_histogram,
    selected_blocks,
    timing_answers,
)
from labkit.plots.nsa_reading import branch_reads, keys_by_position, needle_found
from labkit.plots.nsa_speed import (
    nsa_branches,
    nsa_bytes,
    nsa_choices,
    nsa_crossover,
    nsa_groups,
    nsa_topk,
    nsa_unions,
)
from labkit.plots.online import error_by_length, order_spread, running_state
from labkit.plots.pattern_pictures import pattern_masks, tiles_by_size
from labkit.plots.patterns import blocks_and_time, window_lengths
from labkit.plots.precision import (
    loss_scales,
    overflow_limits,
    precision_errors,
    rounding_places,
    training_loss,
    training_parts,
)
from labkit.plots.rooflines import dram_ledger, intensity_limits, roofline, time_bounds
from labkit.plots.style import DARK, LIGHT, Theme, theme, use_style
from labkit.plots.traffic import loop_orders, order_bars, tile_traffic, traffic, traffic_law
from labkit.plots.training import longest_lengths, saved_bars, stack_peaks

__all__ = [
    "DARK",
    "LIGHT",
    "Drawing",
    "Shown",
    "Theme",
    "access_order",
    "attention_patterns",
    "backend_map",
    "backward_passes",
    "backward_rates",
    "blocks_and_time",
    "branch_reads",
    "bytes_axis",
    "bytes_in_flight",
    "data_flow",
    "dram_ledger",
    "draw",
    "end_labels",
    "error_by_length",
    "figure",
    "flash_rates",
    "flash_resources",
    "flash_steps",
    "gate_histogram",
    "gradient_errors",
    "growth",
    "half_gain",
    "half_rate_error",
    "half_rate_savings",
    "here_beside_recorded",
    "hierarchy_bandwidth",
    "hierarchy_latency",
    "intensity_limits",
    "kernel_split",
    "keys_by_position",
    "launch_overhead",
    "layer_gaps",
    "layer_launch",
    "layer_speedups",
    "layer_times",
    "longest_found",
    "longest_lengths",
    "loop_orders",
    "loss_scales",
    "memory_bars",
    "needle_found",
    "nsa_branches",
    "nsa_bytes",
    "nsa_choices",
    "nsa_crossover",
    "nsa_groups",
    "nsa_topk",
    "nsa_unions",
    "order_bars",
    "order_spread",
    "overflow_limits",
    "pattern_masks",
    "precision_errors",
    "reuse",
    "roofline",
    "rounding_places",
    "running_state",
    "saved_bars",
    "scaling_fit",
    "score_clocks",
    "sdpa_picks",
    "selected_blocks",
    "show",
    "size_axis",
    "speedup_product",
    "stack_peaks",
    "theme",
    "tile_traffic",
    "tiles_by_size",
    "time_bounds",
    "timeline",
    "timing_answers",
    "traffic",
    "traffic_law",
    "training_loss",
    "training_parts",
    "use_style",
    "ways_memory",
    "ways_time",
    "window_lengths",
]

"""The arithmetic of benchmarks.samplers; the benchmark itself imagines for a quarter of an hour."""

import math

import numpy as np
import pytest

from benchmarks import samplers


def _row(solver, steps, truth, chunk_s=1.0):
    return {"solver": solver, "steps": steps, "truth": truth, "chunk_s": chunk_s}


def test_likeness_looks_at_the_named_chunks_and_only_at_recorded_steps():
    theirs = np.zeros((2, 32, 1, 4, 4, 3), np.uint8)
    ours = theirs.copy()
    ours[:, :8] = 1  # chunk 1 is off by one grey level
    ours[:, 8:24] = 200  # no figure is about these
    ours[1, 24:] = 255  # beyond the end of the second recording
    first, fourth = samplers.likeness(ours, theirs, np.array([32, 24]), 8)
    assert first == pytest.approx(20 * math.log10(255))
    assert fourth > 100
    assert math.isnan(samplers.likeness(ours, theirs, np.array([8, 8]), 8)[1])


def test_cheapest_has_the_fewest_steps_among_those_as_true_as_the_reference():
    rows = [_row("ddim", 50, 0.9), _row("ddim", 1, 0.85), _row("ddim", 4, 0.9)]
    rows += [_row("dpm++", 2, 0.89), _row("unipc", 2, 0.9)]
    assert samplers.cheapest(rows) == rows[4]
    assert samplers.cheapest(rows[:2]) == rows[0]

"""How many times as long one thing takes as another, from blocks of pairs of times, and how sure that is."""

import math
import statistics
from typing import NamedTuple

from common import need


class Ratio(NamedTuple):
    """A ratio of times with its standard error; infinite where one block alone cannot say."""

    ratio: float
    error: float
    blocks: int


def ratio_of_blocks(blocks, floor=0.0):
    """The Ratio of blocks [[(reference ms, ms), ...], ...]: the geometric mean of their median ratios.

    Pairs of one process share its luck (where memory lies, what else the machine does just then), so that each block
    is one observation, however many pairs it has. `floor` is the standard error of one block, in units of the ratio,
    that the same settings on both sides showed on this machine: few blocks may agree by chance.
    """
    logs = [statistics.median(math.log(ms / reference_ms) for reference_ms, ms in pairs) for pairs in blocks]
    ratio = math.exp(statistics.fmean(logs))
    spread = floor or math.inf
    if len(logs) > 1:
        spread = max(statistics.stdev(logs), floor)
    return Ratio(ratio, ratio * spread / math.sqrt(len(logs)), len(logs))


def differs(ratio):
    """Whether a Ratio can be told from 1 at 95 %, by Student's t."""
    return bool(abs(math.log(ratio.ratio)) > student(max(ratio.blocks - 1, 1)) * ratio.error / ratio.ratio)


def student(degrees):
    """Student's t at 97.5 %; BadInput without scipy."""
    return need("a ratio of times", "scipy").stats.t.ppf(0.975, degrees)

"""How good a map is: confusion, scores, areas with their uncertainty, a baseline to beat, and pictures of all that.

Nothing here knows networks: whatever made a map, it is judged by its codes alone. Pixels are counted by
:mod:`s2seg.assess.confusion`. Pictures are in :mod:`s2seg.assess.pictures` and the baseline in
:mod:`s2seg.assess.forest`; both load more than this package does.

``scores_test.json`` of several seeds, side by side::

    runs = [read_scores(folder / "scores_test.json")["U-Net"] for folder in folders]
    table = compare_table({"U-Net": runs})

``s2seg evaluate`` counts every labelled pixel of the test blocks, which tells models apart but says little about areas:
neighbouring pixels are not independent. For areas with honest confidence intervals draw a random sample of places
within each mapped class, look up the truth there, and pass both to :func:`estimate_areas`.
"""

from s2seg.assess.area import AreaEstimates, Estimate, estimate_areas
from s2seg.assess.confusion import Confusion
from s2seg.assess.scores import Scores, SeedScores, Spread, compare_table, mean_over_seeds, read_scores, write_scores

__all__ = [
    "AreaEstimates",
    "Confusion",
    "Estimate",
    "Scores",
    "SeedScores",
    "Spread",
    "compare_table",
    "estimate_areas",
    "mean_over_seeds",
    "read_scores",
    "write_scores",
]

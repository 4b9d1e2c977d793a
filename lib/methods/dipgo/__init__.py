"""DiP-GO (arXiv 2410.16942): a small pruner learns, through the whole sampling run, which cells may reuse.

The `SuperNet` runs every block at every step and mixes each output with what the block gave before, by a gate. A
`Pruner` gives the gates; the images' difference from the teacher's and the price of the gates that are on are minimised
by gradient (`train`). Its scores then become plans of any cost (`prune`).
"""

from lib.methods.dipgo.learning import Recipe, Training, Watch, consistency, train
from lib.methods.dipgo.prices import Prices, grouping, outside_columns
from lib.methods.dipgo.pruners import Pruner, evenly, straight_through
from lib.methods.dipgo.pruning import PRUNE, ScoreSpace, by_bisection, by_greed, by_threshold, prune
from lib.methods.dipgo.supernet import SuperNet

__all__ = ["PRUNE", "Prices", "Pruner", "Recipe", "ScoreSpace", "SuperNet", "Training", "Watch", "by_bisection",
           "by_greed", "by_threshold", "consistency", "evenly", "grouping", "outside_columns", "prune",
           "straight_through", "train"]

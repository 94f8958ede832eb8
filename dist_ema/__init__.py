"""An exponential moving average of the weights that lives where the weights live."""

from dist_ema.requirements import require

require("torch")

from dist_ema.batchnorm import update_bn
from dist_ema.ema import ShardedEMA
from dist_ema.posthoc import synthesize
from dist_ema.schedule import Constant, Cosine, EqualWeight, HalfLife, PowerFunction, Warmup

__all__ = [
    "Constant",
    "Cosine",
    "EqualWeight",
    "HalfLife",
    "PowerFunction",
    "ShardedEMA",
    "Warmup",
    "synthesize",
    "update_bn",
]

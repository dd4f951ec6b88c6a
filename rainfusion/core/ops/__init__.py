"""The operations a plan is made of, a file for each idea, every definition beside its type."""

from rainfusion.core.ops.attend import Attend, AttendMeans, Merge, attend, attend_means, merge
from rainfusion.core.ops.attend_quantised import AttendMeansQuantised, AttendQuantised
from rainfusion.core.ops.base import Data, Op, ValueType, from_dict, operand, result, signature
from rainfusion.core.ops.constants import AllBlocks, Constant, WindowOrder
from rainfusion.core.ops.means import BlockMean, BlockScore, block_mean, block_score
from rainfusion.core.ops.quantise import Quantise, quantise
from rainfusion.core.ops.select import Select, select

__all__ = [
    "AllBlocks",
    "Attend",
    "AttendMeans",
    "AttendMeansQuantised",
    "AttendQuantised",
    "BlockMean",
    "BlockScore",
    "Constant",
    "Data",
    "Merge",
    "Op",
    "Quantise",
    "Select",
    "ValueType",
    "WindowOrder",
    "attend",
    "attend_means",
    "block_mean",
    "block_score",
    "from_dict",
    "merge",
    "operand",
    "quantise",
    "result",
    "select",
    "signature",
]

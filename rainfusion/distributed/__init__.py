"""Context parallelism: attention over a sequence whose tokens are spread over the ranks of torch.distributed.

    out = rainfusion.distributed.attention(q, k, v, grid=(21, 45, 80), sparsity=0.8)  # q, k, v: this rank's tokens

The result is the one of a single device. `import rainfusion` does not load this package; importing it loads torch.
"""

from rainfusion.distributed.agreement import DistributedError
from rainfusion.distributed.functional import METHODS, attention, clear
from rainfusion.distributed.shards import shard, unshard

__all__ = ["METHODS", "DistributedError", "attention", "clear", "shard", "unshard"]

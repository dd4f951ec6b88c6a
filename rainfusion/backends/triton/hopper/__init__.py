"""attend on Hopper, in Triton's Gluon: one producer warp feeds two consumer warpgroups.

A program stays on its multiprocessor and takes tiles (128 query rows of one head) off a shared counter, heavy ones
first, until none is left. Inside it

- the **producer** takes tiles, walks their lists of key blocks, and has the copy engine (TMA) fetch q, k and v into
  rings of shared memory;
- two **consumers** hold 64 rows each and keep the tensor cores (wgmma) busy: the exponentials of step j run under
  q kᵀ of step j+1, and the row maximum of step j+1 under p v of step j. Step j+1 may belong to the next tile: the
  stream of steps does not pause between tiles.

Warp specialisation and the overlap of softmax with products follow FlashAttention-3 (arXiv 2407.08608); splitting the
softmax into maximum and exponentials that overlap different products, and rescaling only where a maximum grows by more
than a threshold, follow FlashAttention-4.

The means of the omitted blocks (attend_means) come last in a tile, 128 of them a step. Output and log-sum-exp go
straight to the caller's tokens.

**Keys that take no part.** Some keys of a tile's last block may lie beyond the end: of the keys, or of the valid ones
where samples have lengths. The producer tells the consumers which step that is and how many keys of it count. A tile
that keeps nothing takes one step, of which no key counts, over a block beyond the end, which the copy engine reads as
zeros: consumers expect a first step in every tile. Hiding keys costs a branch a step, so it is compiled only where
there may be some to hide; without, zeros alone make the output 0, and only the log-sum-exp looks at emptiness.

**Where a walk begins (ours).** Programs drift apart, and before long they read all over a head's keys. Where the head
outgrows the cache, each then fetches from memory what another fetched before. So lists are walked as rings: P programs
take a tile every P-th of a walk, and the p-th tile begins p/P of a round in, which is where the others are by then. It
depends on p alone, not on timing: results are the same bits every time.

**Eight bits.** `consume_8bit` is a second consumer, for operands that `quantise_blocks` has rounded; the producer and
the stream of steps are the same.
"""

from rainfusion.backends.triton.hopper.launch import attend_hopper, can_fetch

__all__ = ["attend_hopper", "can_fetch"]

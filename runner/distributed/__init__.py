"""Ranks together: they meet, agree, exchange gradients, and notice each other's end.

- `process_group`: joins and leaves the ranks' group
- `rendezvous`: where the ranks of one run meet, and no others
- `collectives`: broadcast, gather, all_gather of plain values
- `preemption`: all stop or save at the same step
- `engine`: DeepSpeed's configuration and engine
- `flat_zero`: the optimiser step over one flat gradient
- `gradient_exchange`: sums the flat step's gradients over ranks, hands weights back
- `heartbeat`: each rank's signs of life and exit note
- `watchdog`: notices a rank that is stuck or gone
- `failures`: one sentence for what ends all ranks
"""

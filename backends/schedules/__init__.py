"""The zoo of schedules: a file per idea, with its source, cost and picture.

`DEFAULTS` is what a collective runs when a backend brings nothing better. Direct is right for a transport of which
nothing is known: fewest steps, least bytes; it needs room for n-1 messages at once. With n ranks and a tensor of M
bytes, one rank sends at most

| collective | algorithm | steps | bytes |
|---|---|---|---|
| all_reduce | direct: reduce-scatter, then all-gather | 2 | 2 (n-1)/n M |
| reduce_scatter, all_gather, all_to_all | direct: every rank to every rank | 1 | (n-1)/n M |
| broadcast, reduce | binomial tree | ceil(log2 n) | ceil(log2 n) M, or M |
| gather, scatter | direct: every rank with the root | 1 | (n-1)/n M at the root of a scatter |
| barrier | dissemination | ceil(log2 n) | ceil(log2 n) |

where M of an all-gather or reduce-scatter is its larger tensor. The ring has a file that is read before all of these,
backends/ring.py.
"""

from collections.abc import Mapping

from backends.schedules import binomial, direct, dissemination
from minidist.schedule import Schedule

DEFAULTS: Mapping[str, Schedule] = {
    "all_reduce": direct.two_shot_all_reduce,
    "reduce_scatter": direct.direct_reduce_scatter,
    "all_gather": direct.direct_all_gather,
    "all_to_all": direct.direct_all_to_all,
    "gather": direct.direct_gather,
    "scatter": direct.direct_scatter,
    "broadcast": binomial.binomial_broadcast,
    "reduce": binomial.binomial_reduce,
    "barrier": dissemination.dissemination_barrier,
}

"""Which replica generates which group: a pure function of data that all ranks share."""

from collections.abc import Sequence


def place_groups(expected_lengths: Sequence[float], num_replicas: int) -> list[int]:
    """Replica of each group: whole, the longest expected one first to the replica with the least to do.

    Replicas differ by one group at most (a step's time grows with its batch, too); where nothing is known of lengths,
    groups are dealt in turn.
    """
    least, num_larger = divmod(len(expected_lengths), num_replicas)
    load, count, replicas = [0.0] * num_replicas, [0] * num_replicas, [0] * len(expected_lengths)
    for group in longest_first(expected_lengths):
        has_larger = sum(each > least for each in count) < num_larger
        open_replicas = [replica for replica in range(num_replicas) if count[replica] < least + has_larger]
        replica = min(open_replicas, key=lambda replica: (load[replica], count[replica]))
        replicas[group] = replica
        load[replica] += expected_lengths[group]
        count[replica] += 1
    return replicas


def longest_first(expected_lengths: Sequence[float]) -> list[int]:
    """Indices by falling expected length; equal ones in their order."""
    return sorted(range(len(expected_lengths)), key=lambda index: -expected_lengths[index])

"""Which replica generates which group: a pure function of data that all ranks share."""


def place_groups(num_groups: int, num_replicas: int) -> list[int]:
    """Replica of each group, groups whole and dealt in turn, so that replicas differ by one group at most."""
    return [group % num_replicas for group in range(num_groups)]

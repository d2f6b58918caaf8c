"""What draft tokens are worth against what they cost: the rules of the router, and of its replay.

Worth is in expected tokens, and so are prices: seconds times tokens a second. Shapes: B requests, K draft tokens, N
tokens of all drafts.
"""

import numpy as np


def trusted(stands: np.ndarray, factors: np.ndarray | float) -> np.ndarray:
    """Probabilities that tokens stand, scaled by trust; never quite 1."""
    return np.minimum(stands * factors, 0.999)


def take(worth: np.ndarray, price: float, longest: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(number of tokens worth their price, worth beyond it, worth), each [B], of falling [B, K] worths."""
    head = worth[:, :longest]
    pays = np.logical_and.accumulate(head > price, axis=1)
    gain = (head * pays).sum(1)
    num = pays.sum(1)
    return num, gain - price * num, gain


def paying_depth(worth: np.ndarray, num: np.ndarray, price: float, pass_price: float, given_up: np.ndarray) -> int:
    """Passes that a head should make for rows that want [B] tokens: the depth at which the worth of all rows, less
    passes, is largest; `given_up` [B] is what they would be worth without it. 0 if it is less than that."""
    deepest = int(num.max(initial=0))
    if deepest == 0:
        return 0
    wants = np.arange(deepest) < num[:, None]
    net = np.cumsum(((worth[:, :deepest] - price) * wants).sum(0) - pass_price)
    depth = int(net.argmax()) + 1
    return depth if net[depth - 1] > given_up[num > 0].sum() else 0


def worth_a_pass(worth: np.ndarray, price: float, pass_price: float) -> np.ndarray:
    """[B] which rows, whose next tokens are worth [B], are in one more pass: none unless together they pay for it."""
    net = worth - price
    wants = net > 0
    if net[wants].sum() <= pass_price:
        wants[:] = False
    return wants


def worth_verifying(worth: np.ndarray, verify_s: np.ndarray, *, sure: float, passes_s: float, rate: float) -> int:
    """How many of N drafted tokens, worth falling [N], are to be verified; `verify_s` of a step with 0, 1, ... of
    them, which gives `sure` tokens besides."""
    gain = np.cumsum(np.concatenate([[0.0], worth]))[: len(verify_s)]
    # In a step poorer than the last ones their rate cannot be had: at that price it would draft nothing.
    rate = min(rate, float(((sure + gain) / (verify_s + passes_s)).max()))
    return int((gain - rate * verify_s).argmax())

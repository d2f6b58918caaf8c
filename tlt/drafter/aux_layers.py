"""Which three hidden states of its target an EAGLE-3 head reads (Li et al., arXiv 2503.01840).

Numbers are vLLM's: i is the residual stream that enters layer i, so 0 is the embedding, and the number of layers is
what leaves the last one, before the final norm.
"""

from collections.abc import Sequence

NUM_AUX_LAYERS = 3
"""Low, middle, high."""
DEFAULT = "default"


def check_aux_layers(layers: Sequence[int], what: str, *, num_layers: int) -> tuple[int, ...]:
    """The same numbers. ValueError that begins with `what` where the target of `num_layers` has no such three states.

    They must rise: vLLM sorts them and drops what it is told twice.
    """
    are_numbers = isinstance(layers, list | tuple) and all(type(layer) is int for layer in layers)
    is_right = are_numbers and len(layers) == NUM_AUX_LAYERS and list(layers) == sorted(set(layers))
    if not is_right or layers[0] < 0 or layers[-1] > num_layers:
        raise ValueError(f"{what} must be {NUM_AUX_LAYERS} rising numbers from 0 to {num_layers}, got {layers!r}")
    return tuple(layers)


def parse_aux_layers(text: str | None, flag: str, *, num_layers: int) -> tuple[int, ...]:
    """`i,j,k`, or vLLM's own choice where `text` is `default`; None reads none. ValueError naming the flag."""
    if text is None:
        return ()
    if text == DEFAULT:
        # SupportsEagle3.get_eagle3_default_aux_hidden_state_layers of vLLM 0.32
        what = f"{flag} {DEFAULT} needs a deeper target: layers"
        return check_aux_layers((2, num_layers // 2, num_layers - 3), what, num_layers=num_layers)
    numbers = text.split(",")
    layers = [int(number) if number.strip().isdecimal() else number for number in numbers]
    return check_aux_layers(layers, flag, num_layers=num_layers)

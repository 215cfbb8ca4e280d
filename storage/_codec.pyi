from typing import Any

from numpy.typing import NDArray

def encode(
    vectors: NDArray[Any],
    codes: NDArray[Any],
    scales: NDArray[Any],
    biases: NDArray[Any],
    bits: int,
    group: int,
    block: int,
    /,
) -> None: ...
def decode(
    vectors: NDArray[Any],
    codes: NDArray[Any],
    scales: NDArray[Any],
    biases: NDArray[Any],
    bits: int,
    group: int,
    block: int,
    /,
) -> None: ...

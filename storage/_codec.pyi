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
def to_q4_1(
    blocks: NDArray[Any],
    codes: NDArray[Any],
    scales: NDArray[Any],
    biases: NDArray[Any],
    interleaved: bool,
    /,
) -> None: ...
def from_q4_1(
    blocks: NDArray[Any],
    codes: NDArray[Any],
    scales: NDArray[Any],
    biases: NDArray[Any],
    interleaved: bool,
    /,
) -> None: ...

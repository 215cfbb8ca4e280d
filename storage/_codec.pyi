from typing import Any

from numpy.typing import NDArray

def encode_q4(x: NDArray[Any], group: int, block: int) -> tuple[bytes, bytes, bytes]: ...
def decode_q4(
    codes: NDArray[Any], scales: NDArray[Any], biases: NDArray[Any], group: int, block: int
) -> bytes: ...

"""What the text of a compiled program says: the sizes of its arrays."""

import math
import re

_BYTES = {"f64": 8, "f32": 4, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "u8": 1, "s8": 1, "pred": 1}


def bytes_of(types: str) -> int:
    """The bytes of all arrays named in a piece of the program, such as "(f32[64,3], bf16[8])"."""
    shapes = re.findall(rf"({'|'.join(_BYTES)})\[([\d,]*)\]", types)
    return sum(_BYTES[kind] * math.prod(int(n) for n in dims.split(",") if n) for kind, dims in shapes)

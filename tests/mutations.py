"""Random damage to the bytes of a file."""

from __future__ import annotations

import numpy as np


def mutated(content: bytes, random: np.random.Generator) -> bytes:
    """The content with one to three changes: bytes flipped, replaced, inserted, removed, copied
    from elsewhere in it, or its end cut off."""
    data = bytearray(content)
    for _ in range(int(random.integers(1, 4))):
        place = int(random.integers(len(data)))
        match int(random.integers(6)):
            case 0:
                data[place] ^= 1 << int(random.integers(8))
            case 1:
                data[place] = int(random.integers(256))
            case 2:
                data[place:place] = bytes(random.choice(list(b'",\n\r;\x00\xff-0 '), 1).tolist())
            case 3:
                del data[place : place + int(random.integers(1, 60))]
            case 4:
                data[place:place] = data[place // 2 : place // 2 + int(random.integers(1, 200))]
            case 5 if random.random() < 0.3:
                del data[place:]
            case _:
                data[place : place + 1] = b'"'
        if not data:
            break
    return bytes(data)

"""Which blocks stay on the device when not all of them fit."""


def spread(count: int, blocks: int) -> tuple[int, ...]:
    """Return `count` of `blocks` indices, scattered evenly: after each resident block as few streamed ones as can be.

    The first block is streamed if any is, so that it can be read while text is encoded.
    """
    return tuple(block for block in range(blocks) if (block + 1) * count // blocks > block * count // blocks)


def most(stored: list[int], room: int) -> tuple[int, ...]:
    """Return the largest scattered set of blocks that fits."""
    for count in range(len(stored), 0, -1):
        chosen = spread(count, len(stored))
        if sum(stored[block] for block in chosen) <= room:
            return chosen
    return ()

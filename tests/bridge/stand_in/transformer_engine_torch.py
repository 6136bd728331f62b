"""Which tokens of packed sequences a context-parallel rank has."""

import torch


def shares(lengths, ranks, rank):
    """Of 2 ``ranks`` equal pieces of each sequence, the tokens of numbers ``rank`` and 2 ``ranks`` - 1 - ``rank``."""
    rows, start = [], 0
    for length in lengths:
        pieces = torch.arange(start, start + length).view(2 * ranks, -1)
        rows += [pieces[rank], pieces[2 * ranks - 1 - rank]]
        start += length
    return torch.cat(rows)


def thd_get_partitioned_indices(cu_seqlens, total_tokens, world_size, rank):
    if int(cu_seqlens[-1]) != total_tokens:
        raise NotImplementedError("the stand-in shares only sequences that fill the row")
    return shares(cu_seqlens.diff().tolist(), world_size, rank)

"""The Triton kernels' work of one step, planned on the host from lengths and block tables, used by every layer.

Knows numbers only. Invariant: the items of a token cover what it sees exactly once, and where a token has several, its
part slots name each of them once. A part slot is room for a result of one token that is not complete.

A decode item is 8 numbers:   token, table row, start, end, slot, scores sinks, first of the part slots, how many:
                              1 is all of the token, 0 leaves merging to another launch; and where the slot is
                              below 0, too, nothing is written: the item fills up a list
A wide item is 12 numbers:    first and count of `tokens`, table row, start, end of the keys that all rows see (full
                              tiles), end, slot of the first token or -1, most and fewest positions a key may be
                              before a row's own, scores sinks, and for the host: number of the tile, is a node
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

from kernels.configs import Tuning
from kernels.prefix_tree import Node, Shape, shared_nodes
from kernels.step import Ints, Step

FAR = 1 << 30
PART_KEYS = 90  # to write and read a part takes about as long as so many more keys
PIECE_KEYS = 64  # the same of what a decode item costs however short it is
SIZES_TRIED = 48
FIRST, COUNT, SEQUENCE, START, FULL, END, SLOT, MOST, FEWEST, SINKS, TILE, NODE = range(12)


@dataclass(frozen=True, slots=True)
class WorkList:
    """All attention of a step for layers with one window."""

    decode: Ints  # [num_items, 8]
    wide: Ints  # [num_items, 12]
    tokens: Ints  # those of wide items
    part_slots: Ints
    merges: Ints  # [num_merges, 3]: token that wide items leave parts of, first of its part slots, how many
    num_slots: int
    rows: int  # of a wide item: room for num_heads // num_kv_heads of each token


def work_list(step: Step, num_heads: int, window: int | None, sinks: int, tuning: Tuning) -> WorkList:
    """Plan layers with this window. Raises ValueError where a table has a hole that is read."""
    check_holes(step, window, sinks)
    group = num_heads // step.num_kv_heads
    members = np.flatnonzero(step.query_lens == 1)
    nodes = _nodes(step, members, num_heads, tuning) if window is None and tuning.share is not False else []
    if not nodes and len(members) == len(step.query_lens):
        return _decode_only(_decode_pieces(step, members, np.zeros_like(members), (window, sinks), tuning))
    rows = _rows(step, nodes, group, tuning)
    prompts = [tiles_of(step, int(i), window, sinks, rows // group) for i in np.flatnonzero(step.query_lens > 1)]
    spans, tokens = _with_nodes(step, prompts, nodes, members, rows // group)
    covered = _covered(step, nodes, members)
    beside = int((step.context_lens[members] - np.maximum(covered, step.seen(window).first[members])).sum())
    wide = _wide_pieces(spans, beside, step.num_kv_heads, tuning)
    wide_tokens, wide_slots = _filled(wide, tokens)
    decode = _decode_pieces(step, members, covered, (window, sinks), tuning)
    return _assembled(step, decode, (wide, tokens, rows), (wide_tokens, wide_slots))


def check_holes(step: Step, window: int | None, sinks: int) -> None:
    """Raises ValueError where a table has a hole that is read."""
    holes, seen = step.block_tables < 0, step.seen(window)
    if not holes.any():
        return
    column, end = np.arange(holes.shape[1])[None, :], -(-seen.end // step.block_size)
    if window is None:
        bad = (np.where(holes.any(1), holes.argmax(1), holes.shape[1]) < end).any()
    else:
        read = (column < end[:, None]) & (column >= (seen.first // step.block_size)[:, None])
        read |= column < -(-step.seen_sinks(window, sinks).end // step.block_size)[:, None]
        bad = (holes & read).any()
    if bad:
        raise ValueError("a block table has a hole where it is read")


def _nodes(step: Step, members: Ints, num_heads: int, tuning: Tuning) -> list[Node]:
    """What decoding sequences share. The block that a token is written to is its own."""
    shape = Shape(num_heads, step.num_kv_heads, step.head_dim, step.block_size, step.dtype.itemsize)
    lengths = (step.context_lens[members] - 1) // step.block_size
    tables = step.block_tables if len(members) == len(step.block_tables) else step.block_tables[members]
    return shared_nodes(tables, lengths, shape, tuning)


def _rows(step: Step, nodes: list[Node], group: int, tuning: Tuning) -> int:
    """Wider tiles read keys less often, where there are enough of them for every processor to have two."""
    many = tuning.many.rows // max(group, 1)
    prompts = step.query_lens[step.query_lens > 1]
    tiles = int((-(-prompts // max(many, 1))).sum()) + sum(-(-len(node.rows) // max(many, 1)) for node in nodes)
    enough = tiles * step.num_kv_heads >= 2 * tuning.processor.multiprocessors
    return int(max(tuning.many.rows if enough else tuning.wide.rows, 1 << (group - 1).bit_length()))


def tiles_of(step: Step, sequence: int, window: int | None, sinks: int, tile_tokens: int) -> Ints:
    """What the queries of a sequence that computes several tokens see, a tile of them at a time: wide items."""
    count = int(step.query_lens[sequence])
    begin = np.arange(0, count, tile_tokens)
    spans = np.zeros((len(begin), 12), dtype=np.int64)
    spans[:, FIRST] = step.query_starts[sequence] + begin
    spans[:, COUNT] = np.minimum(tile_tokens, count - begin)
    spans[:, SEQUENCE] = sequence
    first = int(step.context_lens[sequence]) - count + begin  # position of a tile's first query
    spans[:, END] = first + spans[:, COUNT]
    spans[:, TILE] = np.arange(len(begin))
    spans[:, MOST] = FAR
    if window is None:
        spans[:, FULL] = first + 1
        return spans
    spans[:, START] = spans[:, FULL] = np.maximum(0, first - window + 1)
    spans[:, MOST] = window - 1
    far = spans.copy()
    far[:, START] = far[:, FULL] = 0
    far[:, END] = np.minimum(sinks, spans[:, END] - window)
    far[:, MOST], far[:, FEWEST], far[:, SINKS] = FAR, window, 1
    return np.concatenate((spans, far[far[:, END] > 0]))


def _with_nodes(
    step: Step, prompts: list[Ints], nodes: list[Node], members: Ints, tile_tokens: int
) -> tuple[Ints, Ints]:
    """All wide items, uncut, and the tokens they name."""
    spans, tokens, known = [np.zeros((0, 12), dtype=np.int64)], [np.arange(step.num_tokens)], step.num_tokens
    tiles = 0
    for prompt in prompts:
        prompt[:, TILE] += tiles
        tiles = int(prompt[:, TILE].max()) + 1
        spans.append(prompt)
    for node in nodes:
        begin = np.arange(0, len(node.rows), tile_tokens)
        made = np.zeros((len(begin), 12), dtype=np.int64)
        made[:, FIRST], made[:, COUNT] = known + begin, np.minimum(tile_tokens, len(node.rows) - begin)
        made[:, SEQUENCE] = members[node.rows[0]]
        made[:, START], made[:, END] = node.first * step.block_size, node.end * step.block_size
        made[:, FULL] = made[:, END]
        made[:, MOST], made[:, FEWEST], made[:, NODE] = FAR, -FAR, 1
        made[:, TILE] = tiles + np.arange(len(begin))
        tiles += len(begin)
        spans.append(made)
        tokens.append(step.query_starts[members[node.rows]])
        known += len(node.rows)
    return np.concatenate(spans), np.concatenate(tokens)


def _wide_pieces(spans: Ints, beside: int, num_kv_heads: int, tuning: Tuning) -> Ints:
    """Cut long ranges where processors would be idle; long pieces first. Assigns slots. Meanwhile so many keys are
    read by decode items."""
    if not len(spans):
        return spans
    tile = tuning.wide.tile
    length = spans[:, END] - spans[:, START]
    most = _cuts(len(spans) * num_kv_heads, float(length.mean()), beside * num_kv_heads, tuning)
    spans[:, FULL] = spans[:, START] + (spans[:, FULL] - spans[:, START]) // tile * tile
    size = _even(length, np.clip(-(-length // tuning.wide.shortest), 1, most), tile)
    owner, number = expanded(-(-length // size))
    pieces = spans[owner]
    pieces[:, START] += number * size[owner]
    pieces[:, END] = np.minimum(pieces[:, START] + size[owner], pieces[:, END])
    pieces[:, FULL] = np.clip(pieces[:, FULL], pieces[:, START], pieces[:, END])
    in_part = (np.bincount(pieces[:, TILE])[pieces[:, TILE]] > 1) | (pieces[:, NODE] > 0)
    needed = pieces[:, COUNT] * in_part
    pieces[:, SLOT] = np.where(in_part, np.cumsum(needed) - needed, -1)
    return pieces[np.argsort(pieces[:, START] - pieces[:, END], kind="stable")]


def _cuts(programs: int, length: float, beside: int, tuning: Tuning) -> int:
    """Into how many pieces it is best to cut so many programs of about one length, counted in keys. With one program a
    multiprocessor decode items run beside; two are faster together, and decode items wait for them."""
    processor = tuning.processor
    decoding = beside / processor.multiprocessors / processor.decode_keys

    def cost(cuts: int) -> float:
        keys, count = length / cuts + (PART_KEYS if cuts > 1 else 0), programs * cuts
        if count <= processor.multiprocessors:
            return max(keys / processor.alone_keys, decoding)
        return -(-count // (2 * processor.multiprocessors)) * keys / processor.paired_keys + decoding

    most = max(1, min(-(-4 * processor.multiprocessors // programs), int(length) // tuning.wide.shortest))
    return min(range(1, most + 1), key=cost)


def _filled(wide: Ints, tokens: Ints) -> tuple[Ints, Ints]:
    """The tokens of wide items that leave parts, and the slots they fill."""
    partial = wide[wide[:, SLOT] >= 0]
    owner, number = expanded(partial[:, COUNT])
    return tokens[partial[owner, FIRST] + number], partial[owner, SLOT] + number


def _covered(step: Step, nodes: list[Node], members: Ints) -> Ints:
    """Positions of each decoding sequence that nodes have read: [len(members)]."""
    covered = np.zeros(len(members), dtype=np.int64)
    for node in nodes:
        covered[node.rows] = np.maximum(covered[node.rows], node.end * step.block_size)
    return covered


def _decode_pieces(
    step: Step, members: Ints, covered: Ints, window_sinks: tuple[int | None, int], tuning: Tuning
) -> Ints:
    """Items without slots, those of a token one after the other."""
    window, sinks = window_sinks
    seen = step.seen(window)
    start, end = np.maximum(covered, seen.first[members]), step.context_lens[members]
    owner, for_sinks = np.arange(len(members)), np.zeros(len(members), dtype=np.int64)
    if window is not None and sinks:
        far = step.seen_sinks(window, sinks).end[members]
        longer = np.flatnonzero(far > 0)
        owner, for_sinks = np.concatenate((owner, longer)), np.repeat([0, 1], [len(owner), len(longer)])
        start, end = np.concatenate((start, np.zeros_like(longer))), np.concatenate((end, far[longer]))
    length = end - start
    size = _even(length, -(-length // _decode_size(length, step.num_kv_heads, tuning)), tuning.decode.tile)
    span, number = expanded(-(-length // size))
    pieces = np.zeros((len(span), 8), dtype=np.int64)
    pieces[:, 0] = step.query_starts[members][owner[span]]
    pieces[:, 1] = members[owner[span]]
    pieces[:, 2] = start[span] + number * size[span]
    pieces[:, 3] = np.minimum(pieces[:, 2] + size[span], end[span])
    pieces[:, 5] = for_sinks[span]
    return pieces[np.argsort(pieces[:, 0], kind="stable")]


def _decode_size(length: Ints, num_kv_heads: int, tuning: Tuning) -> int:
    """The most keys of a piece: pieces are taken in rounds by as many programs as there is room for, so the last round
    should be full, and every piece has a fixed cost."""
    config = tuning.decode
    if not len(length):
        return config.shortest
    sizes = _sizes(config.tile, config.shortest, 1 << int(length.max()).bit_length())
    programs = (-(-length[None, :] // sizes[:, None])).sum(1) * num_kv_heads
    rounds = -(-programs // (tuning.processor.multiprocessors * config.resident))
    return int(sizes[np.argmin(rounds * (sizes + PIECE_KEYS))])


@cache
def _sizes(tile: int, shortest: int, longest: int) -> Ints:
    """Sizes worth trying, in whole tiles."""
    sizes = np.geomspace(shortest, max(longest, shortest + 1), SIZES_TRIED).astype(np.int64) // tile * tile
    return np.unique(np.maximum(sizes, tile))


def _decode_only(decode: Ints) -> WorkList:
    """As `_assembled`, where every part is a decode item's."""
    token, none = decode[:, 0], np.zeros(0, dtype=np.int64)
    count = np.bincount(token)
    several = count[token] > 1
    slots = np.arange(np.count_nonzero(several))
    decode[several, 4] = slots
    decode[several, 6] = (np.cumsum(np.where(count > 1, count, 0)) - count)[token[several]]
    decode[:, 7] = count[token]
    return WorkList(decode, none.reshape(0, 12), none, slots, none.reshape(0, 3), len(slots), 0)


def _assembled(step: Step, decode: Ints, wide: tuple[Ints, Ints, int], filled: tuple[Ints, Ints]) -> WorkList:
    """Give decode items their slots, and every token with several parts the list of them."""
    items, tokens, rows = wide
    wide_tokens, wide_slots = filled
    num_tokens = step.num_tokens
    by_wide = np.bincount(wide_tokens, minlength=num_tokens)
    by_decode = np.bincount(decode[:, 0], minlength=num_tokens)
    total = (by_wide + by_decode) * ((by_wide + by_decode > 1) | (by_wide > 0))
    first = np.cumsum(total) - total
    part_slots = np.zeros(int(total.sum()), dtype=np.int64)
    order = np.argsort(wide_tokens, kind="stable")
    part_slots[_ranked(wide_tokens[order], first)] = wide_slots[order]
    owners = decode[:, 0]
    several = total[owners] > 0
    decode[:, 4] = np.where(several, len(wide_slots) + np.cumsum(several) - 1, 0)
    decode[:, 6] = np.where(several, first[owners], 0)
    decode[:, 7] = np.where(several, total[owners] * (by_wide[owners] == 0), 1)
    part_slots[_ranked(owners[several], first + by_wide)] = decode[several, 4]
    apart = np.flatnonzero(by_wide)
    merges = np.stack((apart, first[apart], total[apart]), axis=1)
    return WorkList(decode, items, tokens, part_slots, merges, len(part_slots), rows)


def _ranked(owners: Ints, first: Ints) -> Ints:
    """`first[owner]`, and one more for each of that owner's before: owners are in order."""
    new = np.flatnonzero(np.diff(owners, prepend=-1))
    rank = np.arange(len(owners)) - np.repeat(new, np.diff(np.append(new, len(owners))))
    return first[owners] + rank


def _even(length: Ints, pieces: Ints, tile: int) -> Ints:
    """The size of each piece where a length is cut into about so many, in whole tiles."""
    size: Ints = (-(-length // pieces) + tile - 1) // tile * tile
    return np.maximum(size, tile)


def expanded(counts: Ints) -> tuple[Ints, Ints]:
    """For `counts[i]` things of each owner i: the owner of each thing, and its number among the owner's."""
    owner = np.repeat(np.arange(len(counts)), counts)
    return owner, np.arange(len(owner)) - (np.cumsum(counts) - counts)[owner]

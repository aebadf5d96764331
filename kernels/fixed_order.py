"""Products and attention in plain torch whose every row is the same to the last bit in any batch and any chunk.

Knows tensors and plans. A library's product adds up in an order that depends on the shapes it is given, so here each
shape is always the same: tiles of rows, pieces of keys. Invariant: no shape that decides an order of addition depends
on what else is in the step.
"""

from __future__ import annotations

from functools import cache

import torch

from kernels.fixed_plan import FixedPlan, FixedWork, Pieces
from kernels.quantize import KV
from kernels.reference import gathered, rotary_write_kv, write_kv

__all__ = ["FixedTiles", "attention", "linear", "rotary_write_kv", "sink_attention", "write_kv"]

ROWS = 16
OTHER_ROWS = (128, 8, 4)


class FixedTiles:
    """`weight[outputs, inputs]` whose products are made in tiles of `ROWS` rows, and of `OTHER_ROWS` where the library
    adds up those in the same order: `sizes`, the largest first."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight
        outputs, inputs = weight.shape
        others: tuple[int, ...] = ()
        if weight.device.type == "cpu":
            others = _others_in_order(inputs, outputs, weight.dtype, torch.get_num_threads())
        self.sizes = tuple(sorted((ROWS, *others), reverse=True))


def linear(x: torch.Tensor, weight: FixedTiles, bias: torch.Tensor | None = None) -> torch.Tensor:
    """As `kernels.linear`, `x[rows, inputs]`."""
    rows, x, across = x.shape[0], x.contiguous(), weight.weight.t()
    out = torch.empty((rows, across.shape[1]), dtype=x.dtype, device=x.device)
    first = 0
    for size in (size for size in weight.sizes if size >= ROWS):
        while first + size <= rows:
            torch.mm(x[first : first + size], across, out=out[first : first + size])
            first += size
    if first < rows:
        last = x.new_zeros((min(size for size in weight.sizes if size >= rows - first), x.shape[1]))
        last[: rows - first] = x[first:]
        out[first:] = torch.mm(last, across)[: rows - first]
    return out if bias is None else out.add_(bias)


@cache
def _others_in_order(inputs: int, outputs: int, dtype: torch.dtype, threads: int) -> tuple[int, ...]:
    """In tiles of which of `OTHER_ROWS` a row is what it is in one of `ROWS`. The library chooses an order by shape,
    for so many threads, so a product of any numbers tells it for all."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((max(OTHER_ROWS), inputs), generator=generator).to(dtype)
    across = torch.randn((outputs, inputs), generator=generator).to(dtype).t()

    def tiled(size: int) -> torch.Tensor:
        return torch.cat([torch.mm(x[row : row + size], across) for row in range(0, len(x), size)])

    expected = tiled(ROWS)
    return tuple(size for size in OTHER_ROWS if torch.equal(tiled(size), expected))


def attention(
    query: torch.Tensor, layer_kv: KV, plan: FixedPlan, *, scale: float, window: int | None = None
) -> torch.Tensor:
    """As `kernels.attention`."""
    tiles = _tiles(query, plan, layer_kv.shape[2], scale)
    return _untiled(_attend(tiles, tiles, layer_kv, plan, plan.work[window]), query, plan)


def sink_attention(
    query: torch.Tensor,
    sink_query: torch.Tensor,
    layer_kv: KV,
    plan: FixedPlan,
    *,
    scale: float,
    window: int,
) -> torch.Tensor:
    """As `kernels.sink_attention`."""
    tiles, sink_tiles = (_tiles(rows, plan, layer_kv.shape[2], scale) for rows in (query, sink_query))
    return _untiled(_attend(tiles, sink_tiles, layer_kv, plan, plan.work[window]), query, plan)


def _tiles(query: torch.Tensor, plan: FixedPlan, num_kv_heads: int, scale: float) -> torch.Tensor:
    """[num_tiles, num_kv_heads, rows, head_dim] float32, times the scale, zero where there is no token."""
    num_heads, head_dim = query.shape[1:]
    num_tiles, tokens = plan.tile_tokens.shape
    group = num_heads // num_kv_heads
    padded = torch.cat((query, query.new_zeros((1, num_heads, head_dim))))
    rows = padded.index_select(0, plan.tile_tokens.view(-1)).view(num_tiles, tokens, num_kv_heads, group, head_dim)
    tiles = torch.zeros((num_tiles, num_kv_heads, plan.rows, head_dim), device=query.device)
    by_head = rows.permute(0, 2, 1, 3, 4).reshape(num_tiles, num_kv_heads, tokens * group, head_dim)
    tiles[:, :, : tokens * group] = by_head
    return tiles.mul_(scale)


def _untiled(tiles: torch.Tensor, query: torch.Tensor, plan: FixedPlan) -> torch.Tensor:
    """What `_tiles` took apart, in the query's dtype."""
    num_tiles, num_kv_heads, _, head_dim = tiles.shape
    tokens, group = plan.tile_tokens.shape[1], query.shape[1] // num_kv_heads
    parts = tiles[:, :, : tokens * group].view(num_tiles, num_kv_heads, tokens, group, head_dim)
    rows = parts.permute(0, 2, 1, 3, 4).reshape(num_tiles * tokens, *query.shape[1:])
    return rows.index_select(0, plan.token_places).to(query.dtype)


def _attend(
    tiles: torch.Tensor, sink_tiles: torch.Tensor, layer_kv: KV, plan: FixedPlan, work: FixedWork
) -> torch.Tensor:
    """[num_tiles, num_kv_heads, rows, head_dim]: every tile takes its pieces one after the other. One of which a row
    sees nothing leaves the row as it was."""
    total = torch.zeros_like(tiles)
    weight = tiles.new_zeros((*tiles.shape[:-1], 1))
    largest = torch.full_like(weight, -torch.inf)
    for pieces in work.pieces:
        keys, values = (part.float() for part in gathered(layer_kv, pieces.gather, plan.workspace))
        scored = sink_tiles if pieces.sinks else tiles
        made = (
            _shared(scored, keys[0], values[0], pieces) if keys.shape[0] == 1 else _apart(scored, keys, values, pieces)
        )
        for where, which in pieces.runs:
            part, part_weight, part_largest = (one[which] for one in made)
            before = largest[where]
            now = torch.maximum(before, part_largest)
            finite = _finite(now)
            fade, count = torch.exp(before - finite), torch.exp(part_largest - finite)
            # Products and sums one by one: fused, they would be rounded in another way.
            total[where] = (total[where] * fade).add_(part * count)
            weight[where] = (weight[where] * fade).add_(part_weight * count)
            largest[where] = now
    return total.div_(weight)


_State = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _apart(tiles: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, pieces: Pieces) -> _State:
    """Each piece has keys of its own, `[num_pieces, num_kv_heads, keys, head_dim]`."""
    rows = tiles[pieces.tiles]
    scores = _products(rows.flatten(0, 1), keys.flatten(0, 1), across=True).view(*rows.shape[:3], -1)
    weights, weight, largest = _weighted(scores, pieces)
    part = _products(weights.flatten(0, 1), values.flatten(0, 1)).view(rows.shape)
    return part, weight, largest


def _shared(tiles: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, pieces: Pieces) -> _State:
    """All tiles see the same `[num_kv_heads, keys, head_dim]`."""
    rows = tiles[pieces.tiles]
    count = rows.shape[0]
    heads = range(keys.shape[0])
    scores = [_products(rows[:, head], keys[head].expand(count, -1, -1), across=True) for head in heads]
    weights, weight, largest = _weighted(torch.stack(scores, 1), pieces)
    part = [_products(weights[:, head], values[head].expand(count, -1, -1)) for head in heads]
    return torch.stack(part, 1), weight, largest


def _weighted(scores: torch.Tensor, pieces: Pieces) -> _State:
    """Exponentials of `scores[num_pieces, num_kv_heads, rows, keys]` less the largest, in place, their sums, and it."""
    if len(pieces.partial) == len(scores):
        scores.add_(pieces.mask)
    elif len(pieces.partial):
        scores[pieces.partial] += pieces.mask
    largest = scores.amax(-1, keepdim=True)
    weights = scores.sub_(_finite(largest)).exp_()
    return weights, weights.sum(-1, keepdim=True), largest


def _finite(largest: torch.Tensor) -> torch.Tensor:
    """Zero for a row that has seen nothing, so that no difference of infinities becomes NaN."""
    return largest.masked_fill(largest == -torch.inf, 0)


def _products(left: torch.Tensor, right: torch.Tensor, *, across: bool = False) -> torch.Tensor:
    """`left[n, ...] @ right[n, ...]`, with `across` by right's transpose. A library gives every thread whole products
    where there are enough of them; where there are not it cuts them up, in another order: so there are."""
    threads = torch.get_num_threads() if left.device.type == "cpu" else 1
    count = left.shape[0]
    whole = count // threads * threads
    parts = [_batch(left[:whole], right[:whole], across)] if whole else []
    if whole < count:
        # Once more some of what is there, so that it is as many as threads.
        again = [index % count for index in range(whole, whole + threads)]
        parts.append(_batch(left[again], right[again], across)[: count - whole])
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _batch(left: torch.Tensor, right: torch.Tensor, across: bool) -> torch.Tensor:
    return torch.bmm(left, right.transpose(1, 2) if across else right)

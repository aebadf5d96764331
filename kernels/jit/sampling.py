"""Drawing a token of each row of logits, by the rule of `kernels.sampling`: the same token, to the last bit.

A row is read twice where the filters leave few tokens: for its largest logits, and for the weight of all and a list of
those that may be left. Everything after is done with the list; where the filters leave more, with the row. Invariant:
nothing is summed but whole numbers, and no product is fused with a sum (the launch says so).
"""

import triton
import triton.language as tl

LOWEST = tl.constexpr(-(1 << 31))
ALL = tl.constexpr(1 << 53)
MANY = tl.constexpr((1 << 31) - 1)


@triton.jit
def ban_kernel(logits, banned, logits_stride, count, SIZE: tl.constexpr):
    """-inf for each (row, token) of `banned[count, 2]`."""
    index = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    row = tl.load(banned + 2 * index, mask=index < count, other=0)
    token = tl.load(banned + 2 * index + 1, mask=index < count, other=0)
    tl.store(logits + row * logits_stride + token, -float("inf"), mask=index < count)


@triton.jit
def loaded(values_of, index, end):
    """Logits with one zero and no NaN; -inf from `end` on."""
    values = tl.load(values_of + index, mask=index < end, other=-float("inf"))
    values = tl.where(values >= -float("inf"), values, -float("inf"))
    return tl.where(values == 0.0, 0.0, values)


@triton.jit
def ordered(values):
    """int32 that are ordered as the values are."""
    bits = values.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def weights(values, largest, scale):
    """As `kernels.sampling.weights`."""
    x = (values - largest) * scale
    x = tl.where(x > -64.0, x, -64.0)
    whole = tl.floor(x)
    x -= whole
    power = x * 0.001879318617284298 + 0.008990994654595852
    power = power * x + 0.05581867694854736
    power = power * x + 0.240159273147583
    power = power * x + 0.6931517124176025
    power = power * x + 1.0
    bits = power.to(tl.int32, bitcast=True) + ((whole.to(tl.int32) + 40) << 23)
    return bits.to(tl.float32, bitcast=True).to(tl.int64)


@triton.jit
def weight_of(key, largest, scale):
    """Of the values whose `ordered` is `key`."""
    bits = key.to(tl.int32)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return weights(bits.to(tl.float32, bitcast=True), largest, scale)


@triton.jit
def portion(fraction, total):
    """floor(fraction * total / 2^53), as `kernels.sampling.portion`."""
    low: tl.constexpr = (1 << 27) - 1
    a, b, c, d = fraction >> 27, fraction & low, total >> 27, total & low
    return 2 * a * c + ((a * d + b * c + ((b * d) >> 27)) >> 26)


@triton.jit
def uniform_bits(seed, position):
    """53 bits, as `kernels.sampling.uniform_bits`."""
    zero = (position & 0).to(tl.uint32)
    first, second, _, _ = tl.philox(
        seed, (position & 0xFFFFFFFF).to(tl.uint32), (position >> 32).to(tl.uint32), zero, zero
    )
    return (first.to(tl.int64) << 21) | (second >> 11).to(tl.int64)


@triton.jit
def lowest_kept(
    values_of,
    count,
    largest,
    scale,
    low,
    high,
    goal,
    BY_WEIGHT: tl.constexpr,
    STEP: tl.constexpr,
    PIVOTS: tl.constexpr,
):
    """The largest key in [low, high) that is reached: of which the values that are not below it, or their weights, come
    to `goal`; and to how much come those above it. `low` is reached, `high` is not: nothing is above or at it."""
    above = low * 0
    at = tl.arange(0, STEP)
    parts = tl.arange(0, PIVOTS).to(tl.int64)
    while high - low > 1:
        pivots = low + 1 + (high - low - 1) * parts // PIVOTS
        found = tl.zeros([PIVOTS, STEP], tl.int64)
        for start in range(0, count, STEP):
            values = loaded(values_of, start + at, count)
            amount = weights(values, largest, scale) if BY_WEIGHT else (start + at < count).to(tl.int64)
            found += tl.where(ordered(values)[None, :].to(tl.int64) >= pivots[:, None], amount[None, :], 0)
        sums = tl.sum(found, 1)
        reached = sums >= goal
        low = tl.maximum(low, tl.max(tl.where(reached, pivots, low), 0))
        above = tl.maximum(above, tl.max(tl.where(reached, 0, sums), 0))
        high = tl.minimum(high, tl.min(tl.where(reached, high, pivots), 0))
    return low, above


@triton.jit
def lane_guide(lanes, goal, PIVOTS: tl.constexpr):
    """A key that about `goal` of the values of `lanes` reach, and never fewer, if so many are there."""
    keys = ordered(lanes).to(tl.int64)
    low, high = tl.min(keys, 0), tl.max(keys, 0) + 1
    parts = tl.arange(0, PIVOTS).to(tl.int64)
    for _ in range(6):
        pivots = low + (high - low) * parts // PIVOTS
        sums = tl.sum((keys[None, :] >= pivots[:, None]).to(tl.int32), 1)
        reached = sums >= goal
        next_low = tl.maximum(low, tl.max(tl.where(reached, pivots, low), 0))
        high = tl.minimum(high, tl.min(tl.where(reached, high, pivots), 0))
        low = next_low
    return low


@triton.jit
def mass_above(values_of, count, largest, scale, key, least, TILE: tl.constexpr):
    """What values above `key` weigh, of those that weigh `least` at least; and how many values are at it."""
    mass, equal = tl.zeros([TILE], tl.int64), tl.zeros([TILE], tl.int32)
    for start in range(0, count, TILE):
        index = start + tl.arange(0, TILE)
        values = loaded(values_of, index, count)
        amount = weights(values, largest, scale)
        keys = ordered(values).to(tl.int64)
        mass += tl.where((keys > key) & (amount >= least), amount, 0)
        equal += ((keys == key) & (index < count)).to(tl.int32)
    return tl.sum(mass, 0), tl.sum(equal, 0)


@triton.jit
def place_of(values_of, count, largest, scale, key, ties, least, target, TILE: tl.constexpr):
    """The first index up to which the values left weigh more than `target`: those above `key`, and the first `ties` at
    it, that weigh `least` at least. -1 if there is none."""
    place, start, weighed, tied = count * 0 - 1, count * 0, target * 0, ties * 0
    while (place < 0) & (start < count):
        index = start + tl.arange(0, TILE)
        values = loaded(values_of, index, count)
        amount = weights(values, largest, scale)
        keys = ordered(values).to(tl.int64)
        equal = ((keys == key) & (index < count)).to(tl.int64)
        rank = tied + tl.cumsum(equal, 0)
        left = ((keys > key) | ((equal > 0) & (rank <= ties))) & (amount >= least)
        amount = tl.where(left, amount, 0)
        running = weighed + tl.cumsum(amount, 0)
        first = tl.min(tl.where(running > target, index, MANY), 0)
        place = tl.where(first < MANY, first, place)
        tied += tl.sum(equal, 0)
        weighed += tl.sum(amount, 0)
        start += TILE
    return place


@triton.jit
def listed(
    logits,
    list_values,
    list_ids,
    vocab,
    largest,
    scale,
    guide,
    TILE: tl.constexpr,
    ROOM: tl.constexpr,
    STAGES: tl.constexpr,
):
    """List the values that reach `guide`, in order, as far as there is room. How many there are, what they weigh, and
    what all weigh."""
    total, mass = tl.zeros([TILE], tl.int64), tl.zeros([TILE], tl.int64)
    count = vocab * 0
    for start in tl.range(0, vocab, TILE, num_stages=STAGES):
        index = start + tl.arange(0, TILE)
        values = loaded(logits, index, vocab)
        amount = weights(values, largest, scale)
        taken = (ordered(values) >= guide) & (index < vocab)
        place = count + tl.cumsum(taken.to(tl.int32), 0) - 1
        room = taken & (place < ROOM)
        tl.store(list_values + place, values, mask=room)
        tl.store(list_ids + place, index, mask=room)
        total += amount
        mass += tl.where(taken, amount, 0)
        count += tl.sum(taken.to(tl.int32), 0)
    tl.debug_barrier()  # other threads read what these have stored
    return count, tl.sum(mass, 0), tl.sum(total, 0)


@triton.jit
def left_over(
    values_of,
    count,
    largest,
    scale,
    low,
    top_k,
    top_p,
    total,
    STEP: tl.constexpr,
    PIVOTS: tl.constexpr,
    TILE: tl.constexpr,
):
    """What top_k and top_p leave: all above a key, and so many at it."""
    high = ordered(largest).to(tl.int64) + 1
    key, ties = low * 0 + LOWEST, low * 0 + MANY
    if top_k > 0:
        key, above = lowest_kept(values_of, count, largest, scale, low, high, top_k, False, STEP, PIVOTS)
        ties = top_k - above
        mass, _ = mass_above(values_of, count, largest, scale, key, low * 0, TILE)
        total = mass + ties * weight_of(key, largest, scale)
    if top_p < ALL:
        goal = tl.maximum(portion(top_p, total), 1)
        start = tl.maximum(low, key)  # what top_k leaves comes to the goal
        weighty, above = lowest_kept(values_of, count, largest, scale, start, high, goal, True, STEP, PIVOTS)
        each = tl.maximum(weight_of(weighty, largest, scale), 1)
        needed = tl.maximum((goal - above + each - 1) // each, 1)
        ties = tl.where(weighty > key, needed, tl.minimum(ties, needed))
        key = weighty
    return key, ties


@triton.jit
def sample_kernel(
    drawn,  # [n] int64
    logits,  # [n, vocab] float32, rows logits_stride apart
    rows,  # [n, 6] int64: as `kernels.sampling.Draws`
    list_values,  # [n, ROOM] float32
    list_ids,  # [n, ROOM] int32
    logits_stride,
    vocab,
    TILE: tl.constexpr,
    ROOM: tl.constexpr,
    GUIDE: tl.constexpr,
    STEP: tl.constexpr,
    PIVOTS: tl.constexpr,
    STAGES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * logits_stride
    rows += row * 6
    lanes, ids = tl.full([TILE], -float("inf"), tl.float32), tl.zeros([TILE], tl.int32)
    for start in tl.range(0, vocab, TILE, num_stages=STAGES):
        index = start + tl.arange(0, TILE)
        values = loaded(logits, index, vocab)
        ids = tl.where(values > lanes, index, ids)
        lanes = tl.maximum(lanes, values)
    largest = tl.max(lanes, 0)
    token = tl.min(tl.where(lanes == largest, ids, MANY), 0)
    scale = tl.load(rows).to(tl.int32).to(tl.float32, bitcast=True)
    if (scale > 0.0) & (largest > -float("inf")):
        top_k, top_p, least = tl.minimum(tl.load(rows + 3), vocab), tl.load(rows + 4), tl.load(rows + 5)
        goal = tl.where(top_k > 0, top_k, GUIDE)
        guide = lane_guide(lanes, goal, PIVOTS)
        listed_values, listed_ids = list_values + row * ROOM, list_ids + row * ROOM
        count, mass, total = listed(logits, listed_values, listed_ids, vocab, largest, scale, guide, TILE, ROOM, STAGES)
        # Weights follow the ranking but for rounding.
        past = weight_of(guide, largest, scale) < least - (least >> 10)
        enough = (mass >= tl.maximum(portion(top_p, total), 1)) | past
        short = (count <= ROOM) & tl.where(top_k > 0, count >= top_k, enough)
        values_of = logits
        low = guide * 0 + LOWEST
        length = vocab
        if short:
            values_of, low, length = listed_values, guide, count
        key, ties = left_over(values_of, length, largest, scale, low, top_k, top_p, total, STEP, PIVOTS, TILE)
        mass, equal = mass_above(values_of, length, largest, scale, key, least, TILE)
        each = weight_of(key, largest, scale)
        mass += tl.where(each >= least, tl.minimum(ties, equal) * each, 0)
        target = portion(uniform_bits(tl.load(rows + 1), tl.load(rows + 2)), mass)
        place = place_of(values_of, length, largest, scale, key, ties, least, target, TILE)
        if place >= 0:
            token = place
            if short:
                token = tl.load(listed_ids + place)
    tl.store(drawn + row, token.to(tl.int64))

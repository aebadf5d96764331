// Drawing the token of each row of logits, by the rule of `kernels/sampling.py`: the same token, to the last bit.
//
// A row that must be ranked is ranked in a list of its likely tokens, of which there are enough for the filters, else
// of all that weigh anything. Invariant: a cut is found with numbers that are exact; what is only near chooses what is
// looked at.
#include "sampling.h"

#include <algorithm>
#include <cmath>

#include "team.h"
#include "weights.h"

static const int64_t ALL = (int64_t)1 << 53;  // of a fraction
static const int64_t BLOCK = 1024;            // tokens that are summed, or looked for, together
static const int64_t GROUP = 8;               // vectors of which the largest of each lane is kept
static const int64_t BINS = 256;
static const int64_t FEW = 32;  // tokens that are sorted rather than told apart by bins
static const float WEIGHTLESS = 50.0f;  // powers of two below the largest, where nothing weighs anything
static const int64_t WORTH_SHARING = 1 << 14;  // logits of a part

enum Column { SCALE, SEED, POSITION, TOP_K, TOP_P, MIN_P, COLUMNS };

static int64_t argmax(const float *row, int64_t vocab) {
    float largest = NONE;
    int64_t where = 0;
    for (int64_t block = 0; block < vocab; block += BLOCK) {
        vec most[4] = {splat(NONE), splat(NONE), splat(NONE), splat(NONE)};
        int64_t c = block;
        for (; c + 4 * LANES <= std::min(block + BLOCK, vocab); c += 4 * LANES)
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) most[i] = larger(load(row + c + i * LANES), most[i]);
        vectors(row, c, std::min(block + BLOCK, vocab), [&](int64_t, vec v) { most[0] = larger(v, most[0]); });
        const float found = lanes_max(larger(larger(most[0], most[1]), larger(most[2], most[3])));
        if (found > largest) largest = found, where = block;
    }
    if (largest == NONE) return 0;
    while (row[where] != largest) where++;
    return where;
}

void argmax_rows(const float *logits, int64_t stride, int64_t rows, int64_t vocab, int64_t *tokens, int64_t threads) {
    const int64_t some = std::max<int64_t>(1, WORTH_SHARING / std::max<int64_t>(vocab, 1));
    parts((rows + some - 1) / some, threads, [&](int64_t part) {
        for (int64_t row = part * some; row < std::min(rows, (part + 1) * some); row++)
            tokens[row] = argmax(logits + row * stride, vocab);
    });
}

// Tokens of a row in order of id. Behind the last one is room for a vector: of its value, with no weight.
struct List {
    float *values, *weights;
    int32_t *ids;
    int64_t count, mass;

    void put(int64_t at, const List &from, int64_t index) {
        values[at] = from.values[index], weights[at] = from.weights[index], ids[at] = from.ids[index];
    }

    void fill_up() {
        for (int lane = 0; lane < LANES; lane++) values[count + lane] = count ? values[count - 1] : NONE;
        for (int lane = 0; lane < LANES; lane++) weights[count + lane] = 0;
    }
};

// What one thread works in.
struct Room {
    List list, part;
    int32_t *bins;
    float *maxima, *weighed;  // of each lane of each group, and what they weigh
    int64_t *blocks;          // sums

    static int64_t width(int64_t vocab) { return (vocab + GROUP * LANES) / (GROUP * LANES) * (GROUP * LANES) + LANES; }

    static int64_t floats(int64_t vocab) { return 7 * width(vocab) + 2 * width(vocab) / GROUP + 2 * (vocab / BLOCK + 1); }

    Room(float *at, int64_t vocab) {
        const int64_t wide = width(vocab);
        blocks = (int64_t *)at, at += 2 * (vocab / BLOCK + 1);
        for (List *one : {&list, &part})
            one->values = at, one->weights = at + wide, one->ids = (int32_t *)(at + 2 * wide), at += 3 * wide;
        bins = (int32_t *)at, maxima = at + wide, weighed = maxima + wide / GROUP;
    }
};

// One row, and how its token is drawn.
struct Row {
    const float *logits;
    int64_t vocab;
    Softmax softmax;
    int64_t top_k, top_p, uniform;
    float least;  // weight
    Room &room;

    int64_t groups() const { return (vocab + GROUP * LANES - 1) / (GROUP * LANES); }
};

// The ranking up to the token `id`, whose logit is `value`.
struct Cut {
    float value;
    int32_t id;
};

// The largest logit, and of each group those of its lanes.
static float find_maxima(const Row &row) {
    vec largest = splat(NONE);
    for (int64_t group = 0; group < row.groups(); group++) {
        const int64_t begin = group * GROUP * LANES;
        vec most = splat(NONE);
        vectors(row.logits, begin, std::min(row.vocab, begin + GROUP * LANES),
                [&](int64_t, vec v) { most = larger(v, most); });
        store(row.room.maxima + group * LANES, most);
        largest = larger(most, largest);
    }
    return lanes_max(largest);
}

// What all tokens weigh that weigh `least`, and each block of them.
static int64_t weigh_blocks(const Row &row, float least) {
    int64_t total = 0;
    for (int64_t begin = 0; begin < row.vocab; begin += BLOCK) {
        Sum sum;
        vectors(row.logits, begin, std::min(row.vocab, begin + BLOCK), [&](int64_t, vec v) {
            const vec weight = weights(v, row.softmax);
            sum.add(weight >= least ? weight : vec{});
        });
        total += row.room.blocks[begin / BLOCK] = sum.total();
    }
    return total;
}

// A token of all that weigh enough.
static int64_t draw_of_row(const Row &row) {
    int64_t target = portion(row.uniform, weigh_blocks(row, row.least)), block = 0;
    while (target >= row.room.blocks[block]) target -= row.room.blocks[block++];
    float weight[BLOCK + LANES];
    vectors(row.logits, block * BLOCK, std::min(row.vocab, (block + 1) * BLOCK),
            [&](int64_t c, vec v) { store(weight + c - block * BLOCK, weights(v, row.softmax)); });
    for (int64_t c = 0;; c++)
        if (weight[c] >= row.least && (target -= (int64_t)weight[c]) < 0) return block * BLOCK + c;
}

// A logit in [low, largest] that is reached by maxima which come to about `goal`, and not much more; `lowest` if they
// do not. Each counts `amount(place, vector)`.
template <class Amount>
static float guide(const Row &row, float lowest, double goal, Amount amount) {
    const int64_t size = row.groups() * LANES;
    const auto reached = [&](float least) {
        vec sum{};
        for (int64_t at = 0; at < size; at += LANES) sum += load(row.room.maxima + at) >= least ? amount(at) : vec{};
        return lanes_sum(sum) >= goal;
    };
    vec negative = splat(NONE);
    for (int64_t at = 0; at < size; at += LANES) negative = larger(-load(row.room.maxima + at), negative);
    float low = std::max(lowest, -lanes_max(negative)), high = row.softmax.largest;
    if (!reached(low)) return lowest;
    for (int turn = 0; turn < 12; turn++) {
        const float middle = low + (high - low) / 2;
        (reached(middle) ? low : high) = middle;
    }
    return low;
}

// List the tokens whose logits reach `least`, which is a number.
static void gather(const Row &row, float least) {
    List &list = row.room.list;
    int64_t count = 0;
    vectors(row.logits, 0, row.vocab, [&](int64_t c, vec v) {
        uint32_t found = lanes_of(v >= least);
#if LANES == 16
        if (!found) return;
        _mm512_storeu_ps(list.values + count, _mm512_maskz_compress_ps(found, (__m512)v));
        _mm512_storeu_si512(list.ids + count, _mm512_maskz_compress_epi32(found, (__m512i)(iota() + (int32_t)c)));
        count += __builtin_popcount(found);
#else
        for (; found; found &= found - 1) {
            const int lane = __builtin_ctz(found);
            list.values[count] = row.logits[c + lane], list.ids[count++] = c + lane;
        }
#endif
    });
    list.count = count, list.mass = 0;
    list.fill_up();
    for (int64_t begin = 0; begin < count; begin += BLOCK) {
        Sum sum;
        for (int64_t at = begin; at < std::min(count, begin + BLOCK); at += LANES) {
            vec weight = weights(load(list.values + at), row.softmax);
            if (at + LANES > count) weight = iota() < (int32_t)(count - at) ? weight : vec{};
            store(list.weights + at, weight);
            sum.add(weight);
        }
        list.mass += sum.total();
    }
}

INLINE int64_t amount_of(const List &list, int64_t at, bool by_weight) {
    return by_weight ? (int64_t)list.weights[at] : 1;
}

// Leave to `part` those among which the ranking comes to `goal`, and take from it what those before them come to;
// false where that cannot be told. `part` may be `list`.
static bool narrow(const List &list, List &part, int32_t *bins, bool by_weight, int64_t &goal) {
    vec most = splat(NONE), least = splat(NONE);
    for (int64_t at = 0; at < list.count; at += LANES)
        most = larger(load(list.values + at), most), least = larger(-load(list.values + at), least);
    const float high = lanes_max(most), range = high + lanes_max(least);
    if (!(range > 0x1p-100f && range < 0x1p100f)) return false;
    const float steps = (BINS - 1) / range;
    for (int64_t at = 0; at < list.count; at += LANES) {
        const ivec bin = to_ints((high - load(list.values + at)) * steps);
        memcpy(bins + at, &bin, sizeof bin);
    }
    int64_t sums[BINS] = {};
    for (int64_t at = 0; at < list.count; at++) sums[bins[at]] += amount_of(list, at, by_weight);
    int32_t bin = 0;
    while (bin < BINS - 1 && goal > sums[bin]) goal -= sums[bin++];
    int64_t count = 0;
    for (int64_t at = 0; at < list.count; at += LANES) {
        ivec here;
        memcpy(&here, bins + at, sizeof here);
        for (uint32_t found = lanes_of(here == bin); found; found &= found - 1) {
            const int64_t from = at + __builtin_ctz(found);
            if (from < list.count) part.put(count++, list, from);
        }
    }
    part.count = count;
    part.fill_up();
    return true;
}

// The fewest first tokens of the ranking of `list`, one at least, that come to `goal`, in weight or in number; all if
// they do not.
static Cut cut_of(Room &room, bool by_weight, int64_t goal) {
    const List *list = &room.list;
    while (list->count > FEW && narrow(*list, room.part, room.bins, by_weight, goal)) list = &room.part;
    const float *values = list->values;
    int32_t *order = room.bins;
    for (int64_t at = 0; at < list->count; at++) order[at] = at;
    const auto before = [&](int32_t a, int32_t b) { return values[a] > values[b] || (values[a] == values[b] && a < b); };
    if (!std::is_sorted(order, order + list->count, before)) std::sort(order, order + list->count, before);
    for (int64_t rank = 0; rank < list->count; rank++) {
        goal -= amount_of(*list, order[rank], by_weight);
        if (goal <= 0) return {values[order[rank]], list->ids[order[rank]]};
    }
    return {NONE, 0};
}

// Take the weight from the tokens of the list that are behind the cut, or weigh less than `least`.
static void keep(Room &room, Cut last, float least) {
    List &list = room.list;
    list.mass = 0;
    for (int64_t begin = 0; begin < list.count; begin += BLOCK) {
        Sum sum;
        for (int64_t at = begin; at < std::min(list.count, begin + BLOCK); at += LANES) {
            const vec values = load(list.values + at), weight = load(list.weights + at);
            ivec ids;
            memcpy(&ids, list.ids + at, sizeof ids);
            const ivec left = (values > last.value) | ((values == last.value) & (ids <= last.id));
            const vec kept = (vec)((ivec)weight & left & (weight >= least));
            store(list.weights + at, kept);
            sum.add(kept);
        }
        list.mass += room.blocks[begin / BLOCK] = sum.total();
    }
}

// A token of those that top_k and top_p leave.
static int64_t draw_of_ranking(const Row &row) {
    Room &room = row.room;
    List &list = room.list;
    const float lowest = row.softmax.largest - WEIGHTLESS / row.softmax.scale;
    int64_t goal = row.top_k;
    float least;
    if (row.top_k) {
        least = guide(row, lowest, (double)goal, [](int64_t) { return splat(1.0f); });
    } else {
        goal = portion(row.top_p, weigh_blocks(row, 0));
        for (int64_t at = 0; at < row.groups() * LANES; at += LANES)
            store(room.weighed + at, weights(load(room.maxima + at), row.softmax));
        least = guide(row, lowest, (double)goal, [&](int64_t at) { return load(room.weighed + at); });
    }
    gather(row, least);
    if (least > lowest && (row.top_k ? list.count : list.mass) < goal) gather(row, lowest);
    if (row.top_k) {
        keep(room, cut_of(room, false, goal), row.top_p < ALL ? 0 : row.least);
        goal = portion(row.top_p, list.mass);
    }
    if (row.top_p < ALL) keep(room, cut_of(room, true, goal), row.least);
    int64_t target = portion(row.uniform, list.mass), block = 0;
    while (target >= room.blocks[block]) target -= room.blocks[block++];
    int64_t at = block * BLOCK;
    while ((target -= (int64_t)list.weights[at]) >= 0) at++;
    return list.ids[at];
}

static int64_t draw(const float *logits, int64_t vocab, const int64_t *ways, Room &room) {
    float scale, least = (float)ways[MIN_P];
    const int32_t bits = (int32_t)ways[SCALE];
    memcpy(&scale, &bits, sizeof scale);
    if (scale == 0) return argmax(logits, vocab);
    if ((int64_t)least < ways[MIN_P]) least = nextafterf(least, INFINITY);  // weights are floats
    const int64_t uniform = uniform_bits(ways[SEED], ways[POSITION]);
    Row row{logits, vocab, {0, scale}, ways[TOP_K], ways[TOP_P], uniform, least, room};
    row.softmax.largest = find_maxima(row);
    if (!std::isfinite(row.softmax.largest)) return argmax(logits, vocab);
    return row.top_k || row.top_p < ALL ? draw_of_ranking(row) : draw_of_row(row);
}

extern "C" void pando_argmax(const float *logits, int64_t stride, int64_t rows, int64_t vocab, int64_t *tokens,
                             int64_t threads) {
    argmax_rows(logits, stride, rows, vocab, tokens, threads);
}

// `ways[rows, COLUMNS]` are `rows` of Python's `Draws`, `banned[num_banned, 2]` rows and tokens: they become -inf.
// Returns 0, 1 where there is no memory, 2 where a banned token is none of the vocabulary.
extern "C" int pando_sample(float *logits, int64_t stride, const int64_t *ways, int64_t rows, int64_t vocab,
                            const int64_t *banned, int64_t num_banned, int64_t *tokens, int64_t threads) {
    for (int64_t at = 0; at < num_banned; at++) {
        const int64_t row = banned[2 * at], token = banned[2 * at + 1];
        if (row < 0 || row >= rows || token < 0 || token >= vocab) return 2;
        logits[row * stride + token] = NONE;
    }
    bool failed = false;
    parts(rows, rows * vocab < WORTH_SHARING ? 1 : threads, [&](int64_t row) {
        float *own = scratch(Room::floats(vocab));
        if (!own) return __atomic_store_n(&failed, true, __ATOMIC_RELAXED);
        Room room(own, vocab);
        tokens[row] = draw(logits + row * stride, vocab, ways + row * COLUMNS, room);
    });
    return failed;
}

// Causal attention of a step's queries over their paged contexts, in the open: no copy of the cache is made.
//
// Sequences whose tables begin with the same blocks go through these together, so that what they share is read once;
// each row is still summed alone, piece by piece from the first position on, so nothing of it depends on the others.
#include <atomic>
#include <cmath>

#include "ops.h"

static const int64_t KEYS = 128;  // positions looked at together, from a multiple of it on; a multiple of PANEL

// What one thread works in; widths are padded to whole panels. In words: `query[rows][depth]`, `keys` as
// [KEYS / PANEL][depth][PANEL], `values` as [width / PANEL][KEYS / PER_WORD][PANEL], and the weights at the beginning
// of each row of `scores[rows][KEYS]` in place of its scores.
namespace {
struct Room {
    float *query, *keys, *values, *scores, *out, *top, *total, *keep;
};
}  // namespace

// One team at one KV head.
template <class T>
struct Work {
    const float *query;
    int64_t q_stride;
    const T *cache;
    const Teams &teams;
    const Member *members;
    int64_t head;
    const Shape &of;
    const Room &room;

    int64_t group() const { return of.num_heads / of.num_kv_heads; }
    int64_t depth() const { return of.head_dim / PER_WORD<T>; }
    const int32_t *table(int64_t member) const { return teams.tables + members[member].sequence * teams.table_stride; }
};

INLINE int64_t padded(int64_t width) { return (width + PANEL - 1) / PANEL * PANEL; }

INLINE void transpose(vec *rows) {
    const ivec lane = iota();
#pragma GCC unroll 4
    for (int step = 1; step < LANES; step *= 2) {
        const ivec odd = (lane & step) != 0;
        const ivec low = odd ? lane - step + LANES : lane, high = odd ? lane + LANES : lane + step;
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) {
            if (i & step) continue;
            const vec a = rows[i], b = rows[i | step];
            rows[i] = __builtin_shuffle(a, b, low);
            rows[i | step] = __builtin_shuffle(a, b, high);
        }
    }
}

// Keys [key, key + some) of a piece into their column panel, LANES of them at once where all are there.
INLINE void take_keys(const float *const *from, int64_t key, int64_t some, int64_t depth, float *keys) {
    float *into = keys + key / PANEL * depth * PANEL + key % PANEL;
    int64_t k = 0;
    for (; some == LANES && k + LANES <= depth; k += LANES) {
        vec rows[LANES];
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) rows[i] = load(from[key + i] + k);
        transpose(rows);
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) store(into + (k + i) * PANEL, rows[i]);
    }
    for (; k < depth; k++)
        for (int64_t i = 0; i < some; i++) memcpy(into + k * PANEL + i, from[key + i] + k, sizeof(float));
}

// One value of a piece to its row; of bf16, beside the other of its pair, which is 0 until it comes.
INLINE void take_value(const float *value, int64_t key, int64_t, int64_t dim, float *values) {
    float *into = values + key * PANEL;
    int64_t d = 0;
    for (; d + PANEL <= dim; d += PANEL, into += KEYS * PANEL) {
        store(into, load(value + d));
        store(into + LANES, load(value + d + LANES));
    }
    if (d < dim) memcpy(into, value + d, (dim - d) * sizeof(float));
}

INLINE void take_value(const bf16 *value, int64_t key, int64_t begin, int64_t dim, float *values) {
    const bool second = key % 2;
    for (int64_t d = 0; d < dim; d += PANEL) {
        uint32_t words[PANEL];
        float *into = values + d * (KEYS / 2) + key / 2 * PANEL;
        if (second && key > begin) {
            memcpy(words, into, sizeof words);
        } else {
            memset(words, 0, sizeof words);
        }
        const int64_t some = dim - d < PANEL ? dim - d : PANEL;
        for (int64_t i = 0; i < some; i++) words[i] |= (uint32_t)value[d + i].bits << (second ? 16 : 0);
        memcpy(into, words, sizeof words);
    }
}

// Ask ahead for some numbers.
template <class T>
INLINE void fetch(const T *from, int64_t count) {
    for (int64_t at = 0; at < count; at += 64 / (int64_t)sizeof(T)) __builtin_prefetch(from + at, 0, 2);
}

// Keys and values of positions [begin, end) of the piece at `origin`. Those of the piece behind it, before position
// `last`, are asked for.
template <class T>
static void take(const Work<T> &work, const int32_t *table, int64_t origin, int64_t begin, int64_t end, int64_t last) {
    const Shape &of = work.of;
    const int64_t dim = of.head_dim, value = of.num_kv_heads * of.block_size * dim;
    if (work.teams.taken) __atomic_fetch_add(work.teams.taken, end - begin, __ATOMIC_RELAXED);
    const auto key = [&](int64_t position) {
        const int64_t block = table[position / of.block_size];
        return work.cache + block * of.block_stride + (work.head * of.block_size + position % of.block_size) * dim;
    };
    const float *from[KEYS];
    for (int64_t position = begin; position < end; position++) {
        const T *here = key(position);
        if (position + KEYS < last) {
            const T *ahead = key(position + KEYS);
            fetch(ahead, dim);
            fetch(ahead + value, dim);
        }
        from[position - origin] = (const float *)here;
        take_value(here + value, position - origin, begin - origin, dim, work.room.values);
    }
    for (int64_t index = begin - origin; index < end - origin;) {
        const int64_t some = index % LANES == 0 && index + LANES <= end - origin ? LANES : 1;
        take_keys(from, index, some, work.depth(), work.room.keys);
        index += some;
    }
}

// Scores of columns [begin, end) to weights under the running maximum; the others' weights become 0.
template <class T>
INLINE void weigh(float *scores, int64_t begin, int64_t end, float *top, float *total, float *keep) {
    const float none = -INFINITY;
    const bool all = begin <= 0 && end >= KEYS;
    vec most = splat(none);
    for (int64_t c = 0; c < KEYS; c += LANES) {
        vec score = load(scores + c);
        if (!all) {
            const ivec lane = iota() + (int32_t)c;
            const ivec seen = (lane >= (int32_t)begin) & (lane < (int32_t)end);
            store(scores + c, score = seen ? score : splat(none));
        }
        most = larger(most, score);
    }
    const float before = *top, now = fmaxf(before, lanes_max(most));
    if (now == none) {  // nothing seen so far
        memset(scores, 0, KEYS * sizeof(float));
        *keep = 1;
        return;
    }
    vec sum{};
    for (int64_t c = 0; c < KEYS; c += LANES) {
        const vec score = load(scores + c);
        vec weight = power_of_two(score - now);
        if (!all) weight = score > splat(none) ? weight : vec{};
        store((T *)scores + c, weight);  // never past what was read
        sum = sum + weight;
    }
    *keep = before == now ? 1 : before == none ? 0 : power_of_two(splat(before - now))[0];
    *total = *total * *keep + lanes_sum(sum);
    *top = now;
}

// Rows [first, first + rows) over positions [low, high) of the piece at `origin`. The first row's token is at
// `position`, the tokens of those behind it follow; rows of an `alone` member see no further than their own.
template <class T>
static void piece(const Work<T> &work, int64_t first, int64_t rows, int64_t origin, int64_t low, int64_t high,
                  int64_t position, bool alone) {
    const Room &room = work.room;
    const int64_t depth = work.depth(), width = padded(work.of.head_dim), group = work.group();
    const int64_t window = work.of.window, begin = (low - origin) / PER_WORD<T>;
    float *query = room.query + first * depth, *scores = room.scores + first * KEYS, *out = room.out + first * width;
    const auto before = [&](int64_t column) {  // rows that see nothing from this position on
        return alone && column > position ? (column - position) * group : 0;
    };
    for (int64_t c = (low - origin) / PANEL * PANEL; c < high - origin; c += PANEL) {
        const int64_t skipped = before(origin + c);
        tiles<T, false>(rows - skipped, query + skipped * depth, depth, room.keys + c * depth, depth,
                        scores + skipped * KEYS + c, KEYS, nullptr);
    }
    const int64_t skipped = before(origin);
    for (int64_t row = skipped; row < rows; row++) {
        const int64_t at = alone ? position + row / group : high - 1;
        const int64_t from = window && at >= window ? at - window + 1 : 0;
        weigh<T>(scores + row * KEYS, (from > low ? from : low) - origin, (at + 1 < high ? at + 1 : high) - origin,
                 room.top + first + row, room.total + first + row, room.keep + first + row);
    }
    for (int64_t row = skipped; row < rows; row += MOST_ROWS) {
        const int64_t some = rows - row < MOST_ROWS ? rows - row : MOST_ROWS;
        const int64_t last = alone ? position + (row + some - 1) / group + 1 : high;
        const int64_t end = ((last < high ? last : high) - origin + PER_WORD<T> - 1) / PER_WORD<T>;
        for (int64_t c = 0; c < width; c += PANEL)
            tiles<T, false>(some, scores + row * KEYS + begin, KEYS,
                            room.values + c * (KEYS / PER_WORD<T>) + begin * PANEL, end - begin, out + row * width + c,
                            width, room.keep + first + row);
    }
}

// The rest of one member's context, from the piece at `origin` on.
template <class T>
static void finish(const Work<T> &work, int64_t member, int64_t first, int64_t origin) {
    const Member &of = work.members[member];
    const int64_t window = work.of.window, end = of.position + of.rows;
    const int64_t begin = window && of.position >= window ? of.position - window + 1 : 0;
    if (begin > origin) origin = begin / KEYS * KEYS;
    for (; origin < end; origin += KEYS) {
        const int64_t low = begin > origin ? begin : origin, high = end < origin + KEYS ? end : origin + KEYS;
        take(work, work.table(member), origin, low, high, end);
        piece(work, first, of.rows * work.group(), origin, low, high, of.position, true);
    }
}

// Positions, in whole pieces, that two members have in the same blocks and both see in all of their rows.
template <class T>
static int64_t shared(const Work<T> &work, int64_t one, int64_t other) {
    const Member &a = work.members[one], &b = work.members[other];
    const int64_t most = (a.position < b.position ? a.position : b.position) + 1, size = work.of.block_size;
    const int32_t *left = work.table(one), *right = work.table(other);
    int64_t blocks = 0;
    while (blocks * size < most && left[blocks] == right[blocks]) blocks++;
    return (blocks * size < most ? blocks * size : most) / KEYS * KEYS;
}

// Members [begin, end), whose rows start at `first`, from the piece at `origin` on: together as far as all of them
// share it, then in runs that share more. They are in order of their tables, so neighbours share most.
template <class T>
static void walk(const Work<T> &work, int64_t begin, int64_t end, int64_t first, int64_t origin) {
    if (end - begin == 1) return finish(work, begin, first, origin);
    int64_t common = INT64_MAX, rows = 0;
    for (int64_t member = begin; member < end; member++) {
        rows += work.members[member].rows * work.group();
        const int64_t here = member + 1 < end ? shared(work, member, member + 1) : common;
        common = here < common ? here : common;
    }
    const int64_t last = work.members[begin].position + work.members[begin].rows;
    for (; origin < common; origin += KEYS) {
        take(work, work.table(begin), origin, origin, origin + KEYS, last);
        piece(work, first, rows, origin, origin, origin + KEYS, 0, false);
    }
    while (begin < end) {
        int64_t next = begin + 1;
        rows = work.members[begin].rows * work.group();
        for (; next < end && shared(work, next - 1, next) > origin; next++)
            rows += work.members[next].rows * work.group();
        walk(work, begin, next, first, origin);
        first += rows;
        begin = next;
    }
}

template <class T>
static void attend(const Work<T> &work, int64_t num_members, T *out) {
    const Shape &of = work.of;
    const Room &room = work.room;
    const int64_t dim = of.head_dim, width = padded(dim), group = work.group();
    const float scale = of.scale * 1.44269504f;  // weights are powers of two
    T *query = (T *)room.query;
    int64_t row = 0;
    for (int64_t member = 0; member < num_members; member++)
        for (int64_t token = 0; token < work.members[member].rows; token++, row += group) {
            const float *from = work.query + (work.members[member].first_row + token) * work.q_stride;
            for (int64_t i = 0; i < group * dim; i++) put(query + row * dim + i, from[work.head * group * dim + i] * scale);
        }
    for (int64_t i = 0; i < row; i++) room.top[i] = -INFINITY, room.total[i] = 0;
    memset(room.out, 0, row * width * sizeof(float));
    if (of.window) {  // members see from different positions on
        for (int64_t member = 0, first = 0; member < num_members; first += work.members[member++].rows * group)
            finish(work, member, first, 0);
    } else {
        walk(work, 0, num_members, 0, 0);
    }
    row = 0;
    for (int64_t member = 0; member < num_members; member++)
        for (int64_t i = 0; i < work.members[member].rows * group; i++, row++) {
            const int64_t token = work.members[member].first_row + i / group;
            T *into = out + (token * of.num_heads + work.head * group + i % group) * dim;
            const float share = 1 / room.total[row];
            for (int64_t d = 0; d < dim; d++) put(into + d, room.out[row * width + d] * share);
        }
}

INLINE float *part(float **from, int64_t count) {
    float *here = *from;
    *from += (count + 15) / 16 * 16;
    return here;
}

template <class T>
bool attention(const float *query, int64_t q_stride, const T *cache, const Teams &teams, const Shape &of, T *out,
               int64_t threads) {
    const int64_t rows = teams.most_rows * (of.num_heads / of.num_kv_heads), width = padded(of.head_dim);
    const int64_t size = rows * (of.head_dim + KEYS + width + 3) + KEYS * (of.head_dim + width) + 8 * 16;
    std::atomic<bool> failed{false};
    parts(of.num_kv_heads * teams.num_teams, threads, [&](int64_t index) {
        float *memory = scratch(size);  // what pads the values is multiplied: nothing comes of it but in columns that pad
        if (!memory) {
            failed = true;
            return;
        }
        const Room room{part(&memory, rows * of.head_dim), part(&memory, KEYS * of.head_dim),
                        part(&memory, KEYS * width),       part(&memory, rows * KEYS),
                        part(&memory, rows * width),       part(&memory, rows),
                        part(&memory, rows),               part(&memory, rows)};
        const int64_t team = index % teams.num_teams, head = index / teams.num_teams;
        attend<T>({query, q_stride, cache, teams, teams.members + teams.teams[team], head, of, room},
                  teams.teams[team + 1] - teams.teams[team], out);
    });
    return !failed;
}

template bool attention<float>(const float *, int64_t, const float *, const Teams &, const Shape &, float *, int64_t);
#if HAS_BF16
template bool attention<bf16>(const float *, int64_t, const bf16 *, const Teams &, const Shape &, bf16 *, int64_t);
#endif

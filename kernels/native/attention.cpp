// Causal attention of a step's queries over their paged contexts, in the open: no copy of the cache is made.
#include <cmath>
#include <cstdlib>

#include "tile.h"

static const int64_t KEYS = 64;  // positions looked at together; a multiple of PANEL

struct Shape {
    int64_t num_heads, num_kv_heads, head_dim, block_size, q_stride, block_stride, table_stride, window;
    float scale;
};

// Some tokens of one sequence: their rows among the step's tokens, and the position of the first.
struct Task {
    int64_t sequence, first_row, rows, position;
};

// What one thread works in. Widths are padded to whole panels.
struct Room {
    float *query, *keys, *values, *scores, *out, *top, *total, *keep;
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

// Keys of positions [begin, end) as columns of `room.keys[head_dim][KEYS]`, values as rows of `room.values`.
static void take(const float *cache, const int32_t *table, int64_t head, int64_t origin, int64_t begin, int64_t end,
                 const Shape &of, const Room &room) {
    const int64_t dim = of.head_dim, width = padded(dim);
    const float *from[KEYS];
    for (int64_t position = begin; position < end; position++) {
        const int64_t block = table[position / of.block_size];
        from[position - origin] =
            cache + block * of.block_stride + (head * of.block_size + position % of.block_size) * dim;
    }
    const int64_t value = of.num_kv_heads * of.block_size * dim;
    for (int64_t key = begin - origin; key < end - origin; key++)
        memcpy(room.values + key * width, from[key] + value, dim * sizeof(float));
    int64_t key = begin - origin;
    while (key < end - origin) {
        const bool whole = key % LANES == 0 && key + LANES <= end - origin;
        int64_t d = 0;
        for (; whole && d + LANES <= dim; d += LANES) {
            vec rows[LANES];
#pragma GCC unroll 16
            for (int i = 0; i < LANES; i++) rows[i] = load(from[key + i] + d);
            transpose(rows);
#pragma GCC unroll 16
            for (int i = 0; i < LANES; i++) store(room.keys + (d + i) * KEYS + key, rows[i]);
        }
        const int64_t some = whole ? LANES : 1;
        for (; d < dim; d++)
            for (int64_t i = 0; i < some; i++) room.keys[d * KEYS + key + i] = from[key + i][d];
        key += some;
    }
}

// Scores of columns [begin, end) to weights under the running maximum; the others' weights become 0.
INLINE void weigh(float *scores, int64_t begin, int64_t end, float *top, float *total, float *keep) {
    const float none = -INFINITY;
    vec most = splat(none);
    for (int64_t c = 0; c < KEYS; c += LANES) {
        const ivec lane = iota() + (int32_t)c;
        const ivec seen = (lane >= (int32_t)begin) & (lane < (int32_t)end);
        const vec score = seen ? load(scores + c) : splat(none);
        store(scores + c, score);
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
        const vec weight = score > splat(none) ? exponential(score - now) : vec{};
        store(scores + c, weight);
        sum = sum + weight;
    }
    *keep = before == now ? 1 : before == none ? 0 : exponential(splat(before - now))[0];
    *total = *total * *keep + lanes_sum(sum);
    *top = now;
}

static void attend(const float *query, const float *cache, const int32_t *table, const Task &task, int64_t head,
                   const Shape &of, const Room &room, float *out) {
    const int64_t dim = of.head_dim, width = padded(dim), group = of.num_heads / of.num_kv_heads;
    const int64_t rows = task.rows * group, end = task.position + task.rows;
    const int64_t begin = of.window && task.position >= of.window ? task.position - of.window + 1 : 0;
    for (int64_t row = 0; row < rows; row++) {
        const float *from = query + (task.first_row + row / group) * of.q_stride + (head * group + row % group) * dim;
        for (int64_t d = 0; d < dim; d++) room.query[row * dim + d] = from[d] * of.scale;
        room.top[row] = -INFINITY;
        room.total[row] = 0;
    }
    memset(room.out, 0, rows * width * sizeof(float));
    // Pieces begin at multiples of KEYS whatever the window and the task, so a row is summed in one order always.
    for (int64_t origin = begin / KEYS * KEYS; origin < end; origin += KEYS) {
        const int64_t low = begin > origin ? begin : origin, high = end < origin + KEYS ? end : origin + KEYS;
        take(cache, table, head, origin, low, high, of, room);
        // Rows whose position is before this piece see nothing of it.
        const int64_t skipped = origin > task.position ? (origin - task.position) * group : 0, left = rows - skipped;
        float *scores = room.scores + skipped * KEYS;
        for (int64_t c = 0; c < high - origin; c += PANEL)
            tiles(left, room.query + skipped * dim, dim, room.keys + c, KEYS, dim, scores + c, KEYS, nullptr);
        for (int64_t row = skipped; row < rows; row++) {
            const int64_t position = task.position + row / group;
            const int64_t first = of.window && position >= of.window ? position - of.window + 1 : 0;
            weigh(room.scores + row * KEYS, (first > low ? first : low) - origin,
                  (position + 1 < high ? position + 1 : high) - origin, room.top + row, room.total + row,
                  room.keep + row);
        }
        for (int64_t c = 0; c < width; c += PANEL)
            tiles(left, scores + low - origin, KEYS, room.values + (low - origin) * width + c, width, high - low,
                  room.out + skipped * width + c, width, room.keep + skipped);
    }
    for (int64_t row = 0; row < rows; row++) {
        float *into = out + ((task.first_row + row / group) * of.num_heads + head * group + row % group) * dim;
        const float share = 1 / room.total[row];
        for (int64_t d = 0; d < dim; d++) into[d] = room.out[row * width + d] * share;
    }
}

INLINE float *part(float **from, int64_t count) {
    float *here = *from;
    *from += (count + 15) / 16 * 16;
    return here;
}

// Returns 0, or 1 where there is no memory. `cache` is the layer's first element; `most_rows` the longest task.
extern "C" int pando_attention(const float *query, const float *cache, const int32_t *tables, const Task *tasks,
                               int64_t num_tasks, int64_t most_rows, const Shape *of, float *out, int64_t threads) {
    const int64_t rows = most_rows * (of->num_heads / of->num_kv_heads), width = padded(of->head_dim);
    const int64_t size = rows * (of->head_dim + KEYS + width + 3) + KEYS * (of->head_dim + width) + 8 * 16;
    int failed = 0;
#pragma omp parallel num_threads(threads)
    {
        float *memory = (float *)aligned_alloc(64, (size * sizeof(float) + 63) / 64 * 64), *rest = memory;
        if (!memory) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp barrier
        if (!failed) {
            Room room;
            room.query = part(&rest, rows * of->head_dim);
            room.keys = part(&rest, KEYS * of->head_dim);
            room.values = part(&rest, KEYS * width);
            room.scores = part(&rest, rows * KEYS);
            room.out = part(&rest, rows * width);
            room.top = part(&rest, rows);
            room.total = part(&rest, rows);
            room.keep = part(&rest, rows);
            memset(room.values, 0, KEYS * width * sizeof(float));
#pragma omp for collapse(2) schedule(dynamic)
            for (int64_t head = 0; head < of->num_kv_heads; head++)
                for (int64_t task = 0; task < num_tasks; task++)
                    attend(query, cache, tables + tasks[task].sequence * of->table_stride, tasks[task], head, *of,
                           room, out);
        }
        free(memory);
    }
    return failed;
}

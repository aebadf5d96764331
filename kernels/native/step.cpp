// A whole step in one call: planned, its layers run, and after the tokens wanted the logits and the most likely next ones.
#include <cstring>
#include <new>
#include <vector>

#include "layers.h"
#include "sampling.h"

// One array after the other: query_lens[num_seqs], context_lens[num_seqs], wanted[num_wanted], token_ids[num_tokens],
// tables[num_seqs][width]. `wanted` are sequences, in order, after whose last token something is drawn.
struct Step {
    const int64_t *numbers;
    int64_t num_seqs, num_wanted, num_tokens, width;
    const int64_t *windows;
    int64_t num_windows, most_tokens, most_sequences;
    int64_t *spent;

    const int64_t *query_lens() const { return numbers; }
    const int64_t *context_lens() const { return query_lens() + num_seqs; }
    const int64_t *wanted() const { return context_lens() + num_seqs; }
    const int64_t *token_ids() const { return wanted() + num_wanted; }
    const int64_t *tables() const { return token_ids() + num_tokens; }
};

// A plan with the memory it is in.
struct Planned {
    std::vector<int64_t> slots, teams;
    std::vector<int32_t> tables;
    std::vector<Member> members;
    Answer answer;

    Verdict make(const Order &order) {
        const int64_t room = most_members(order);
        slots.resize(order.num_tokens), teams.resize(room + 1), members.resize(room);
        tables.resize(order.num_seqs * order.stride);
        answer = {slots.data(), tables.data(), members.data(), teams.data(), 0, 0};
        return plan(order, answer);
    }

    Teams found(int64_t stride) const {
        return {tables.data(), members.data(), teams.data(), answer.num_teams, answer.most_rows, stride, nullptr};
    }
};

// The last tokens of the sequences wanted, as a step of their own.
struct Last {
    std::vector<int64_t> rows, ones, contexts, tables;
    Planned planned;

    Verdict make(const Step &step, Order order, const std::vector<int64_t> &ends) {
        for (int64_t index = 0; index < step.num_wanted; index++) {
            const int64_t sequence = step.wanted()[index], *table = step.tables() + sequence * step.width;
            rows.push_back(ends[sequence] - 1);
            ones.push_back(1);
            contexts.push_back(step.context_lens()[sequence]);
            tables.insert(tables.end(), table, table + step.width);
        }
        order.query_lens = ones.data(), order.context_lens = contexts.data(), order.tables = tables.data();
        order.num_seqs = order.num_tokens = step.num_wanted;
        return planned.make(order);
    }
};

// `logits[rows, columns]` of the head, in bf16 rounded to it.
template <class T>
static void head_logits(const void *hidden, const Packed &head, float *logits, int64_t rows, int64_t threads) {
    linear<T>((const float *)hidden, head.depth, head, logits, rows, threads);
    for (int64_t i = 0; sizeof(T) == 2 && i < rows * head.columns; i++) {
        T near;
        put(&near, logits[i]);
        logits[i] = as_float(near);
    }
}

// Whether they are sequences of the step, in order, each once.
static bool wanted_are_good(const Step &step) {
    int64_t before = -1;
    for (int64_t index = 0; index < step.num_wanted; before = step.wanted()[index++])
        if (step.wanted()[index] <= before || step.wanted()[index] >= step.num_seqs) return false;
    return true;
}

static Verdict run(const Stack &stack, const Step &step, void *const *caches, float *logits, int64_t *best,
                   int64_t threads, bool half) {
    const Shape &shape = stack.shape;
    const Order order{step.query_lens(), step.context_lens(), step.tables(), step.num_seqs, step.num_tokens, step.width,
                      shape.block_size, step.windows, step.num_windows, step.most_tokens, step.most_sequences,
                      shape.num_kv_heads, threads};
    if (!wanted_are_good(step)) return BAD_LENGTHS;
    Watch watch{step.spent};
    Planned whole;
    Verdict verdict = whole.make(order);
    if (verdict != GOOD) return verdict;
    std::vector<int64_t> positions, ends;
    for (int64_t sequence = 0; sequence < step.num_seqs; sequence++) {
        const int64_t context = step.context_lens()[sequence];
        for (int64_t left = step.query_lens()[sequence]; left > 0; left--) positions.push_back(context - left);
        ends.push_back((int64_t)positions.size());
    }
    Tokens tokens{step.num_tokens, step.token_ids(), positions.data(), whole.slots.data(), whole.found(step.width),
                  nullptr, 0, {}, step.spent};
    Last last;
    const int64_t none = 0;
    if (step.num_wanted < step.num_tokens) {
        if (step.num_wanted && (verdict = last.make(step, order, ends)) != GOOD) return verdict;
        tokens.last = step.num_wanted ? last.rows.data() : &none;
        tokens.num_last = step.num_wanted;
        tokens.last_teams = last.planned.found(step.width);
    }
    std::vector<float> hidden(step.num_wanted * stack.hidden_size);
    watch.was(PLANNING);
    verdict = run_layers(stack, tokens, caches, hidden.data(), threads, half);
    if (verdict != GOOD) return verdict;
    watch = Watch{step.spent};
#if HAS_BF16
    if (half) head_logits<bf16>(hidden.data(), stack.head, logits, step.num_wanted, threads);
#endif
    if (!half) head_logits<float>(hidden.data(), stack.head, logits, step.num_wanted, threads);
    watch.was(HEAD);
    if (best) argmax_rows(logits, stack.head.columns, step.num_wanted, stack.head.columns, best, threads);
    watch.was(SAMPLING);
    return GOOD;
}

// `logits[num_wanted, vocab_size]`, and where `best[num_wanted]` is not null the most likely tokens.
extern "C" int64_t pando_step(const Stack *stack, const Step *step, void *const *caches, float *logits, int64_t *best,
                              int64_t threads, int64_t half) {
    try {
        return run(*stack, *step, caches, logits, best, threads, half);
    } catch (const std::bad_alloc &) {
        return NO_MEMORY;
    }
}

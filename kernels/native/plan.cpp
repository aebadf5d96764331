// Whose queries of a step go through the cache together: pieces of prompts alone, sequences that decode in teams of those
// that begin with the same block.
#include "plan.h"

#include <algorithm>
#include <cstring>
#include <new>
#include <vector>

// Before anything is written: there is room for as many tokens as were said.
static bool lengths_are_good(const Order &order) {
    int64_t left = order.num_tokens;
    for (int64_t sequence = 0; sequence < order.num_seqs; sequence++) {
        const int64_t count = order.query_lens[sequence];
        if (count < 1 || order.context_lens[sequence] < count || count > left) return false;
        left -= count;
    }
    return left == 0;
}

// One sequence's table and slots, checked: nothing may be followed that is no block.
static Verdict check(const Order &order, int64_t sequence, int64_t first_row, const Answer &answer) {
    const int64_t count = order.query_lens[sequence], context = order.context_lens[sequence], size = order.block_size;
    if (context > order.stride * size) return SHORT_TABLE;
    const int64_t *table = order.tables + sequence * order.stride;
    for (int64_t column = 0; column < order.stride; column++) {
        if (table[column] > INT32_MAX) return HOLE_READ;
        answer.tables[sequence * order.stride + column] = table[column] < 0 ? -1 : (int32_t)table[column];
    }
    const int64_t start = context - count, blocks = (context + size - 1) / size;
    for (int64_t index = 0; index < order.num_windows; index++) {
        const int64_t window = order.windows[index], first = window && start >= window ? start - window + 1 : 0;
        if (std::any_of(table + first / size, table + blocks, [](int64_t block) { return block < 0; }))
            return HOLE_READ;
    }
    for (int64_t token = 0; token < count; token++) {
        const int64_t position = start + token, block = table[position / size];
        if (block < 0) return HOLE_WRITTEN;
        answer.slots[first_row + token] = block * size + position % size;
    }
    return GOOD;
}

typedef std::vector<std::vector<Member>> Grouped;

// Those that compute one token, in order of their tables, with whom they go.
static void decode_teams(const Order &order, const Answer &answer, std::vector<Member> &single, Grouped &teams) {
    const auto table = [&](const Member &of) { return answer.tables + of.sequence * order.stride; };
    const size_t bytes = order.stride * sizeof(int32_t);
    std::stable_sort(single.begin(), single.end(), [&](const Member &one, const Member &other) {
        return memcmp(table(one), table(other), bytes) < 0;
    });
    // No thread is left without a team.
    const int64_t fair = ((int64_t)single.size() * order.num_kv_heads + order.threads - 1) / order.threads;
    const int64_t most = std::min(order.most_sequences, fair);
    const Member *before = nullptr;
    for (const Member &member : single) {
        const bool joins = before && *table(*before) == *table(member) && (int64_t)teams.back().size() < most;
        if (!joins) teams.emplace_back();
        teams.back().push_back(member);
        before = &member;
    }
}

// The longest work first, so that no thread is left with it at the end.
static void write(Grouped &teams, Answer &answer) {
    const auto work = [](const std::vector<Member> &team) {
        int64_t sum = 0;
        for (const Member &of : team) sum += of.rows * (of.position + of.rows);
        return sum;
    };
    std::stable_sort(teams.begin(), teams.end(), [&](const auto &one, const auto &other) { return work(one) > work(other); });
    Member *next = answer.members;
    answer.num_teams = answer.most_rows = answer.teams[0] = 0;
    for (const std::vector<Member> &team : teams) {
        int64_t rows = 0;
        for (const Member &of : team) rows += of.rows;
        next = std::copy(team.begin(), team.end(), next);
        answer.most_rows = std::max(answer.most_rows, rows);
        answer.teams[++answer.num_teams] = next - answer.members;
    }
}

static Verdict planned(const Order &order, Answer &answer) {
    if (!lengths_are_good(order)) return BAD_LENGTHS;
    Grouped teams;
    std::vector<Member> single;
    int64_t row = 0;
    for (int64_t sequence = 0; sequence < order.num_seqs; sequence++) {
        const Verdict verdict = check(order, sequence, row, answer);
        if (verdict != GOOD) return verdict;
        const int64_t count = order.query_lens[sequence], start = order.context_lens[sequence] - count;
        if (count == 1) single.push_back({sequence, row, 1, start});
        for (int64_t begin = 0; count > 1 && begin < count; begin += order.most_tokens)
            teams.push_back({{sequence, row + begin, std::min(count - begin, order.most_tokens), start + begin}});
        row += count;
    }
    decode_teams(order, answer, single, teams);
    write(teams, answer);
    return GOOD;
}

Verdict plan(const Order &order, Answer &answer) {
    try {
        return planned(order, answer);
    } catch (const std::bad_alloc &) {
        return NO_MEMORY;
    }
}

extern "C" int64_t pando_plan(const Order *order, Answer *answer) { return plan(*order, *answer); }

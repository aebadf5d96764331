// Weights of tokens, and the numbers that draw one: what `kernels/sampling.py` says of them, to the last bit.
//
// A weight is a whole number that a float holds exactly, and is kept as one; sums are of integers.
#pragma once
#include <cmath>

#include "tile.h"
#if defined(__AVX__)
#include <immintrin.h>
#endif

static const float NONE = -INFINITY;

// `a * b`, rounded before anything is added to it: no compiler sees through this.
INLINE vec product(vec a, vec b) {
    vec found = a * b;
#if defined(__AVX__)
    asm("" : "+v"(found));
#else
    asm("" : "+m"(found));
#endif
    return found;
}

INLINE vec to_floats(ivec x) { return __builtin_convertvector(x, vec); }
INLINE ivec to_ints(vec x) { return __builtin_convertvector(x, ivec); }

// A bit for each lane of a comparison.
INLINE uint32_t lanes_of(ivec mask) {
#if LANES == 16
    return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask);
#elif defined(__AVX__)
    return _mm256_movemask_ps((__m256)mask);
#else
    uint32_t found = 0;
    for (int lane = 0; lane < LANES; lane++) found |= (mask[lane] & 1u) << lane;
    return found;
#endif
}

// `each(column, logits from it on)`, filled up with -inf.
template <class Each>
INLINE void vectors(const float *row, int64_t begin, int64_t end, Each each) {
    for (int64_t c = begin; c < end; c += LANES) {
        vec values;
        if (c + LANES <= end) {
            values = load(row + c);
        } else {
            values = splat(NONE);
            memcpy(&values, row + c, (end - c) * sizeof(float));
        }
        each(c, values);
    }
}

struct Softmax {
    float largest, scale;
};

// floor(2^40 * 2^x) as floats, with each product and each sum rounded once.
INLINE vec weights(vec values, Softmax of) {
    vec x = product(values - of.largest, splat(of.scale));
    x = x > -64.0f ? x : splat(-64.0f);
    ivec whole = to_ints(x);
    whole += to_floats(whole) > x;  // down, not to zero
    x = x - to_floats(whole);
    vec power = product(splat(0x1.eca6fp-10f), x) + 0x1.269deep-7f;
    power = product(power, x) + 0x1.c9444p-5f;
    power = product(power, x) + 0x1.ebd8ap-3f;
    power = product(power, x) + 0x1.62e4c8p-1f;
    power = product(power, x) + 1.0f;
    power = (vec)((ivec)power + ((whole + 40) << 23));
    return power < 0x1p24f ? to_floats(to_ints(power)) : power;  // from there on a float is whole
}

// A sum of weights, in two words a lane: of 1,024 vectors at most.
struct Sum {
    ivec high{}, low{};

    void add(vec weight) {
        const ivec upper = to_ints(weight * 0x1p-20f);
        high += upper;
        low += to_ints(weight - product(to_floats(upper), splat(0x1p20f)));  // exact
    }

    int64_t total() const {
        int64_t above = 0, below = 0;
        for (int lane = 0; lane < LANES; lane++) above += high[lane], below += low[lane];
        return (above << 20) + below;
    }
};

// floor(fraction * total / 2^53).
static inline int64_t portion(int64_t fraction, int64_t total) { return (int64_t)((__int128)fraction * total >> 53); }

// 53 bits of Philox4x32-10.
static inline int64_t uniform_bits(uint64_t seed, uint64_t position) {
    uint32_t counter[4] = {(uint32_t)position, (uint32_t)(position >> 32), 0, 0};
    uint32_t key[2] = {(uint32_t)seed, (uint32_t)(seed >> 32)};
    for (int round = 0; round < 10; round++) {
        const uint64_t first = (uint64_t)0xD2511F53 * counter[0], second = (uint64_t)0xCD9E8D57 * counter[2];
        counter[0] = (uint32_t)(second >> 32) ^ counter[1] ^ key[0];
        counter[1] = (uint32_t)second;
        counter[2] = (uint32_t)(first >> 32) ^ counter[3] ^ key[1];
        counter[3] = (uint32_t)first;
        key[0] += 0x9E3779B9, key[1] += 0xBB67AE85;
    }
    return (int64_t)counter[0] << 21 | counter[1] >> 11;
}

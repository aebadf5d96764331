// Threads that share out the parts of a loop.
//
// The caller does parts too and waits for parts alone, never for threads: one that is late, or has lost its core to
// another process, costs no more than the part it is in. Helpers that find nothing to do look for it for a moment, then sleep.
#pragma once
#include <cstdint>

// Does part `index` of a loop.
typedef void (*Part)(void *loop, int64_t index);

// Every part in [0, count) once, by up to `threads` threads, the caller among them; returns when all are done. Called
// by several threads at once it works too, then some do their loops alone.
void share_out(int64_t count, int64_t threads, Part part, void *loop);

template <class Body>
static inline void parts(int64_t count, int64_t threads, Body body) {
    share_out(count, threads, [](void *loop, int64_t index) { (*(Body *)loop)(index); }, &body);
}

// Some floats of the calling thread's own, aligned, zero at first: valid until the thread asks again. Null where there
// is no memory.
float *scratch(int64_t count);

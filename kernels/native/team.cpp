#include "team.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <system_error>
#include <thread>
#include <unistd.h>

static const int MOST_HELPERS = 255;
static const int LOOKS = 4000;  // for work or for an end, before one sleeps: some tens of microseconds

static inline void breathe() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#endif
}

// The loop that is open, if any. A part is claimed by counting up `claims`, whose upper half is the loop's number: a
// helper that read of an older loop cannot claim in a newer one.
struct Team {
    std::mutex caller;
    std::atomic<uint64_t> claims{0};
    std::atomic<int64_t> count{0}, threads{0};
    std::atomic<Part> part{nullptr};
    std::atomic<void *> loop{nullptr};
    std::atomic<uint32_t> done{0};
    std::atomic<uint32_t> opened{0};  // loops so far: what helpers sleep on
    int64_t helpers = 0;
    pid_t process = 0;

    // Claim a part of the open loop and do it; whether there was one.
    bool work(int64_t thread) {
        uint64_t claim = claims.load(std::memory_order_acquire);
        const Part what = part.load(std::memory_order_relaxed);
        void *with = loop.load(std::memory_order_relaxed);
        const int64_t parts = count.load(std::memory_order_relaxed), wanted = threads.load(std::memory_order_relaxed);
        const uint64_t number = claim >> 32;
        while (thread < wanted && (int64_t)(uint32_t)claim < parts) {
            if (!claims.compare_exchange_weak(claim, claim + 1, std::memory_order_acq_rel)) {
                if (claim >> 32 != number) return true;  // another loop: look again
                continue;
            }
            what(with, (uint32_t)claim);
            if (done.fetch_add(1, std::memory_order_acq_rel) + 1 == (uint32_t)parts) done.notify_all();
            return true;
        }
        return false;
    }

    void help(int64_t thread) {
        for (;;) {
            const uint32_t seen = opened.load(std::memory_order_acquire);
            while (work(thread)) {}
            for (int look = 0; look < LOOKS && opened.load(std::memory_order_acquire) == seen; look++) breathe();
            opened.wait(seen, std::memory_order_acquire);
        }
    }

    void hire(int64_t wanted) {
        if (process != getpid()) helpers = 0, process = getpid();  // threads do not come along with a fork
        for (; helpers < wanted && helpers < MOST_HELPERS; helpers++) {
            const int64_t thread = helpers + 1;
            try {
                std::thread([this, thread] { help(thread); }).detach();
            } catch (const std::system_error &) {  // no more threads to be had: fewer do it
                return;
            }
        }
    }

    void run(int64_t parts, int64_t wanted, Part what, void *with) {
        hire(wanted - 1);
        const uint64_t number = (claims.load(std::memory_order_relaxed) >> 32) + 1;
        // Closed while it is written: nobody claims of a loop that has as many parts as are claimed.
        claims.store(number << 32 | 0xffffffffu, std::memory_order_release);
        part.store(what, std::memory_order_relaxed);
        loop.store(with, std::memory_order_relaxed);
        count.store(parts, std::memory_order_relaxed);
        threads.store(wanted, std::memory_order_relaxed);
        done.store(0, std::memory_order_relaxed);
        claims.store((number + 1) << 32, std::memory_order_release);
        opened.fetch_add(1, std::memory_order_release);
        opened.notify_all();
        while (work(0)) {}
        uint32_t ended;
        for (int look = 0; look < LOOKS && (int64_t)done.load(std::memory_order_acquire) < parts; look++) breathe();
        while ((int64_t)(ended = done.load(std::memory_order_acquire)) < parts) done.wait(ended);
    }
};

static Team &team() {
    static Team *one = new Team;  // never ended: helpers use it to the end of the process
    return *one;
}

void share_out(int64_t count, int64_t threads, Part part, void *loop) {
    if (count > 1 && threads > 1 && count < 0xffffffff) {
        std::unique_lock<std::mutex> here(team().caller, std::try_to_lock);
        if (here.owns_lock()) return team().run(count, threads < count ? threads : count, part, loop);
    }
    for (int64_t index = 0; index < count; index++) part(loop, index);
}

float *scratch(int64_t count) {
    struct Own {
        float *floats = nullptr;
        int64_t count = 0;
        ~Own() { free(floats); }
    };
    static thread_local Own own;
    if (own.count < count) {
        free(own.floats);
        const int64_t bytes = (count * (int64_t)sizeof(float) + 63) / 64 * 64;
        own.floats = (float *)aligned_alloc(64, bytes);
        own.count = own.floats ? count : 0;
        if (own.floats) memset(own.floats, 0, bytes);
    }
    return own.floats;
}

// Work shared among threads, and memory that each of them keeps between calls.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <new>

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

#include "simd.h"

namespace foveate {

// In its scope results too small for a normal number are 0: weights far below the greatest would else be such numbers,
// which some processors compute with a hundred times slower.
class FlushToZero {
  public:
#if defined(__SSE__)
    FlushToZero() : before_(_mm_getcsr()) { _mm_setcsr(before_ | _MM_FLUSH_ZERO_ON); }
    ~FlushToZero() { _mm_setcsr(before_); }

  private:
    const unsigned before_;
#else
    FlushToZero() {}
#endif
};

// The most threads that any part of the calls from this thread has run on since somebody asked.
inline thread_local int64_t threads_used = 0;

// Calls work(thread) on as many threads; false where memory ran out. One thread runs in the caller's: OpenMP's
// do not survive a fork.
template <class Work> static bool on_threads(int64_t threads, Work work) {
    std::atomic<bool> done{true};
    const auto guarded = [&](int64_t thread) {
        const FlushToZero quick;
        try {
            work(thread);
        } catch (const std::bad_alloc&) {
            done = false;
        }
    };
    threads_used = std::max(threads_used, std::max<int64_t>(threads, 1));
    if (threads <= 1) {
        guarded(0);
        return done;
    }
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int64_t thread = 0; thread < threads; ++thread) guarded(thread);
    return done;
}

// Threads worth waking for so many multiply-adds and bytes of memory, of `most`. Waking one takes a few millionths of a
// second where a core waits for it, and thousands where none does: it must have far more to do than that. The same
// sizes always have the same number.
inline int64_t worthwhile_threads(double multiply_adds, double bytes, int64_t most) {
    constexpr double SECONDS_OF_THREAD = 50e-6, BYTES_PER_SECOND = 20e9, MULTIPLY_ADDS_PER_SECOND = 50e9;
    const double seconds = bytes / BYTES_PER_SECOND + multiply_adds / MULTIPLY_ADDS_PER_SECOND;
    return (int64_t)std::max(std::min(seconds / SECONDS_OF_THREAD, (double)most), 1.0);
}

// Hands out the numbers 0 .. count - 1, `grain` at a time.
class Queue {
  public:
    explicit Queue(int64_t count, int64_t grain = 1) : count_(count), grain_(grain) {}
    template <class Work> void run(Work work) {
        for (int64_t first; (first = next_.fetch_add(grain_, std::memory_order_relaxed)) < count_;)
            for (int64_t i = first; i < std::min(first + grain_, count_); ++i) work(i);
    }

  private:
    std::atomic<int64_t> next_{0};
    const int64_t count_, grain_;
};

FOVEATE_INLINE void* allocate(int64_t bytes) {
    void* memory = std::aligned_alloc(64, (size_t)(bytes + 63) / 64 * 64);
    if (!memory) throw std::bad_alloc();
    return memory;
}

// Memory aligned to cache lines, freed at the end of a scope.
template <class T> class Buffer {
  public:
    explicit Buffer(int64_t count) : data_(count > 0 ? (T*)allocate(count * (int64_t)sizeof(T)) : nullptr) {}
    ~Buffer() { std::free(data_); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    T* get() const { return data_; }

  private:
    T* data_;
};

// Cuts pieces off a block of memory, or (from null) counts what they need.
class Arena {
  public:
    explicit Arena(char* memory) : memory_(memory) {}
    template <class T> T* take(int64_t count) {
        T* piece = (T*)(memory_ + used_);
        used_ += (count * (int64_t)sizeof(T) + 63) / 64 * 64;
        return piece;
    }
    int64_t used() const { return used_; }

  private:
    char* memory_;
    int64_t used_ = 0;
};

// A thread's Workspace, a class made from (Arena&, sizes...), in memory that stays for the thread's next call.
template <class Workspace, class... Sizes> static Workspace scratch(const Sizes&... sizes) {
    struct Memory {
        char* data = nullptr;
        int64_t bytes = 0;
        ~Memory() { std::free(data); }
    };
    static thread_local Memory memory;
    Arena count(nullptr);
    Workspace(count, sizes...);
    if (count.used() > memory.bytes) {
        std::free(memory.data);
        memory.data = nullptr;
        memory.bytes = 0;
        memory.data = (char*)allocate(count.used());
        memory.bytes = count.used();
    }
    Arena arena(memory.data);
    return Workspace(arena, sizes...);
}

}  // namespace foveate

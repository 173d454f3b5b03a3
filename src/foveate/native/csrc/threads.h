// Work shared among threads, and memory that each of them keeps between calls.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <new>

#include "simd.h"

namespace foveate {

// Calls work(thread) on as many threads; false where memory ran out. One thread runs in the caller's: OpenMP's
// do not survive a fork.
template <class Work> static bool on_threads(int64_t threads, Work work) {
    std::atomic<bool> done{true};
    const auto guarded = [&](int64_t thread) {
        try {
            work(thread);
        } catch (const std::bad_alloc&) {
            done = false;
        }
    };
    if (threads <= 1) {
        guarded(0);
        return done;
    }
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int64_t thread = 0; thread < threads; ++thread) guarded(thread);
    return done;
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

// Rows of any length and alignment, read by a block through shared memory while the next parts are on their way.
#pragma once
#include "common.cuh"

namespace ttl {

constexpr int AHEAD = 4;  // 16-byte copies of a thread that are on their way at once

// A row in memory: `head` elements before the first 16-byte boundary, vectors, `tail` elements after the last.
template <typename T>
struct Row {
    static constexpr int N = Vector<T>::size;
    int head, vectors, tail;

    __device__ __forceinline__ Row(const T* begin, int columns) {
        head = min(columns, static_cast<int>((16 - reinterpret_cast<uintptr_t>(begin) % 16) % 16 / sizeof(T)));
        vectors = (columns - head) / N;
        tail = columns - head - vectors * N;
    }

    // Column of the one element of the ragged ends that is this thread's, -1 if none is.
    __device__ __forceinline__ int edge() const {
        const int thread = static_cast<int>(threadIdx.x), behind = thread - N;
        if (thread < head) return thread;
        return behind >= 0 && behind < tail ? head + vectors * N + behind : -1;
    }
};

// Copy 16 bytes to shared memory without waiting for them, and without a register that holds them on the way.
__device__ __forceinline__ void start_copy(uint4* shared, const void* place) {
#ifdef TTL_EMULATED
    emulator::start_copy(shared, place);
#else
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(static_cast<unsigned>(__cvta_generic_to_shared(shared))),
                 "l"(__cvta_generic_to_global(place)) : "memory");
#endif
}

// End a group of copies; wait until all but the last AHEAD - 1 groups of this thread have arrived.
__device__ __forceinline__ void end_group() {
#ifdef TTL_EMULATED
    emulator::end_group();
#else
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

__device__ __forceinline__ void wait_for_oldest_group() {
#ifdef TTL_EMULATED
    emulator::wait_for_groups(AHEAD - 1);
#else
    asm volatile("cp.async.wait_group %0;" ::"n"(AHEAD - 1) : "memory");
#endif
}

template <typename T>
__device__ __forceinline__ Vector<T> load_shared(const uint4* place) {
    uint4 raw = *place;
#ifdef __CUDA_ARCH__
    asm volatile("" : "+r"(raw.x), "+r"(raw.y), "+r"(raw.z), "+r"(raw.w));  // or it is taken apart into loads of elements
#endif
    Vector<T> vector;
    memcpy(&vector, &raw, sizeof(vector));
    return vector;
}

// Call function(i, vector) for every blockDim.x-th vector, while the next ones are on their way to shared memory: with KEEP
// each to its own place, where it stays, otherwise in turn to AHEAD places of each thread. No thread reads another's.
template <typename T, bool KEEP, typename Function>
__device__ __forceinline__ void for_each_vector(const T* middle, int vectors, uint4* shared, Function function) {
    const int thread = static_cast<int>(threadIdx.x), step = static_cast<int>(blockDim.x);
    const auto fetch = [&](int i, uint4* slot) {
        if (i < vectors) start_copy(slot, middle + static_cast<int64_t>(i) * Vector<T>::size);
        end_group();
    };
#pragma unroll
    for (int k = 0; k < AHEAD; ++k) fetch(thread + k * step, shared + thread + k * step);
    for (int i = thread, k = 0; i < vectors; i += step, ++k) {
        uint4* slot = shared + (KEEP ? i : thread + k % AHEAD * step);
        wait_for_oldest_group();
        function(i, load_shared<T>(slot));
        fetch(i + AHEAD * step, KEEP ? slot + AHEAD * step : slot);
    }
}

}  // namespace ttl

// CUDA on the host, as far as this project's kernels need it, so that their very sources run and are tested without a GPU.
//
// Every thread of a block is a fiber with a stack of its own; the blocks of a grid run one after the other. Fibers change
// only where threads wait for each other: __syncthreads, __syncwarp, shuffles and votes. Tests run everything in two
// orders (ttl_emulator_order): where a barrier is missing the results differ. A block whose threads wait for each other
// for ever ends its launch with cudaErrorLaunchFailure. Shared memory and what a kernel does not write is poisoned: shared
// memory by NaN here, outputs by the tests.
//
// Not emulated: speed, caches, memory models, occupancy. The device has EMULATED_MULTIPROCESSORS multiprocessors, few, so
// that small inputs fill a persistent grid.
#pragma once
#include <algorithm>
#include <cfloat>
#include <climits>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <mutex>
#include <type_traits>
#include <vector>

#define __host__
#define __device__
#define __global__
#define __constant__ static
#define __shared__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)
#define __grid_constant__

struct uint3 { unsigned x, y, z; };
struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9, cudaErrorLaunchFailure = 719 };
using cudaStream_t = void*;

inline const char* cudaGetErrorString(cudaError_t code) {
    switch (code) {
        case cudaSuccess: return "no error";
        case cudaErrorInvalidValue: return "invalid argument";
        case cudaErrorInvalidConfiguration: return "invalid configuration argument";
        default: return "unspecified launch failure (emulated: threads wait for each other for ever)";
    }
}

constexpr int EMULATED_MULTIPROCESSORS = 3;
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16, cudaDevAttrMaxSharedMemoryPerBlockOptin = 97 };
inline cudaError_t cudaGetDevice(int* device) { *device = 0; return cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
    *value = which == cudaDevAttrMultiProcessorCount ? EMULATED_MULTIPROCESSORS : 99 << 10;
    return cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaPeekAtLastError() { return cudaSuccess; }
inline cudaError_t cudaMemsetAsync(void* place, int value, size_t bytes, cudaStream_t) {
    std::memset(place, value, bytes);
    return cudaSuccess;
}
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8, cudaFuncAttributePreferredSharedMemoryCarveout = 9 };
constexpr int cudaSharedmemCarveoutMaxShared = 100;
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int) { return cudaSuccess; }
template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel*, int, size_t) {
    *blocks = 2;
    return cudaSuccess;
}

// What a kernel reads to know where it is; the scheduler writes them before it goes on with a fiber.
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace emulator {

constexpr size_t STACK_BYTES = 128 << 10;
constexpr int WARP = 32;

// Saves the registers that a call must keep on the running stack, and goes on on another one.
extern "C" void ttl_emulator_switch(void** from, void* to);
#if defined(__x86_64__)
asm(R"(
.text
.weak ttl_emulator_switch
.type ttl_emulator_switch, @function
ttl_emulator_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");
#elif defined(__aarch64__)
asm(R"(
.text
.weak ttl_emulator_switch
.type ttl_emulator_switch, %function
ttl_emulator_switch:
    sub sp, sp, #160
    stp x19, x20, [sp, #0]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp, #0]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
)");
#else
#error "the emulator switches stacks on x86-64 and 64-bit Arm"
#endif

struct Warp {
    unsigned arrived = 0;       // lanes that wait at the present barrier
    unsigned long passed = 0;   // barriers that were passed
    alignas(16) unsigned char slots[2][WARP][16];  // what lanes show each other, for this exchange and the last one
};

struct Copy { void* to; const void* from; unsigned group; };

struct Fiber {
    uint3 thread{};
    int lane = 0;
    Warp* warp = nullptr;
    void* stack_pointer = nullptr;
    bool finished = false;
    unsigned exchanges = 0;
    std::vector<Copy> copies;  // cp.async: on their way
    unsigned groups = 0;       // cp.async.commit_group: how many
};

struct Block {
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    std::vector<unsigned char> stacks, shared;
    std::function<void()> body;
    void* scheduler = nullptr;
    Fiber* current = nullptr;
    unsigned waiting = 0, alive = 0;
    unsigned long passed = 0;     // __syncthreads that were passed
    bool moved = false;           // whether anything happened since the scheduler looked last
    bool backwards = false;
};

inline Block& block() { static Block only; return only; }
inline Fiber& fiber() { return *block().current; }

inline void yield() {
    Block& b = block();
    ttl_emulator_switch(&b.current->stack_pointer, b.scheduler);
}

inline void sync_block() {
    Block& b = block();
    b.moved = true;
    unsigned long before = b.passed;
    if (++b.waiting == b.alive) { b.waiting = 0; ++b.passed; return; }
    while (b.passed == before) yield();
}

inline void sync_warp(unsigned mask) {
    Fiber& f = fiber();
    Warp& w = *f.warp;
    block().moved = true;
    unsigned long before = w.passed;
    w.arrived |= 1u << f.lane;
    if ((w.arrived & mask) == mask) { w.arrived &= ~mask; ++w.passed; return; }
    while (w.passed == before) yield();
}

template <typename T>
T exchange(unsigned mask, T value, int source) {
    static_assert(sizeof(T) <= 16, "a shuffle moves at most 16 bytes");
    Fiber& f = fiber();
    auto& slots = f.warp->slots[f.exchanges++ & 1];  // the former exchange's slots may still be read
    std::memcpy(slots[f.lane], &value, sizeof(T));
    sync_warp(mask);
    T result;
    std::memcpy(&result, slots[source], sizeof(T));
    return result;
}

// cp.async: copies of 16 bytes arrive when they are waited for, and not before; in the other order of threads, at once.
inline void start_copy(void* to, const void* from) {
    if (reinterpret_cast<uintptr_t>(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16) std::abort();
    if (block().backwards) std::memcpy(to, from, 16);
    else fiber().copies.push_back({to, from, fiber().groups});
}
inline void end_group() { ++fiber().groups; }
inline void wait_for_groups(unsigned but_the_last) {
    Fiber& f = fiber();
    size_t waiting = 0;
    for (const Copy& copy : f.copies)
        if (copy.group + but_the_last < f.groups) std::memcpy(copy.to, copy.from, 16);
        else f.copies[waiting++] = copy;
    f.copies.resize(waiting);
}

inline void enter() {  // the first function on every fiber's stack
    Block& b = block();
    b.body();
    b.current->finished = true;
    b.moved = true;
    --b.alive;
    if (b.alive && b.waiting == b.alive) { b.waiting = 0; ++b.passed; }  // those that wait are all that are left
    yield();
    std::abort();
}

inline void prepare(Fiber& f, unsigned char* stack) {
    auto top = (reinterpret_cast<uintptr_t>(stack) + STACK_BYTES) & ~uintptr_t{15};
#if defined(__x86_64__)
    auto* sp = reinterpret_cast<void**>(top) - 8;  // six registers, the address to return to, alignment as after a call
    for (int i = 0; i < 8; ++i) sp[i] = nullptr;
    sp[6] = reinterpret_cast<void*>(&enter);
#else
    auto* sp = reinterpret_cast<void**>(top) - 20;
    for (int i = 0; i < 20; ++i) sp[i] = nullptr;
    sp[11] = reinterpret_cast<void*>(&enter);
#endif
    f.stack_pointer = sp;
}

// Run one block; false if its threads wait for each other for ever.
inline bool run_block() {
    Block& b = block();
    unsigned count = blockDim.x * blockDim.y * blockDim.z;
    b.fibers.assign(count, Fiber{});
    b.warps.assign((count + WARP - 1) / WARP, Warp{});
    if (b.stacks.size() < count * STACK_BYTES) b.stacks.resize(count * STACK_BYTES);
    std::fill(b.shared.begin(), b.shared.end(), 0xff);
    b.alive = count;
    b.waiting = 0;
    for (unsigned i = 0; i < count; ++i) {
        Fiber& f = b.fibers[i];
        f.thread = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
        f.lane = static_cast<int>(i % WARP);
        f.warp = &b.warps[i / WARP];
        prepare(f, b.stacks.data() + i * STACK_BYTES);
    }
    while (b.alive) {
        b.moved = false;
        for (unsigned k = 0; k < count; ++k) {
            Fiber& f = b.fibers[b.backwards ? count - 1 - k : k];
            if (f.finished) continue;
            b.current = &f;
            threadIdx = f.thread;
            ttl_emulator_switch(&b.scheduler, f.stack_pointer);
        }
        if (!b.moved) return false;
    }
    return true;
}

inline std::mutex& one_launch() { static std::mutex lock; return lock; }

}  // namespace emulator

// Whether threads and blocks are taken from the last to the first: a kernel's result must not depend on it.
extern "C" inline __attribute__((used, visibility("default"))) int ttl_emulator_order(int64_t backwards) {
    emulator::block().backwards = backwards != 0;
    return 0;
}

constexpr int warpSize = 32;

inline void __syncthreads() { emulator::sync_block(); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { emulator::sync_warp(mask); }
inline void __threadfence() {}
template <typename T> T __shfl_sync(unsigned mask, T value, int lane) { return emulator::exchange(mask, value, lane & 31); }
template <typename T> T __shfl_xor_sync(unsigned mask, T value, int lanes) {
    return emulator::exchange(mask, value, emulator::fiber().lane ^ lanes);
}
template <typename T> T __shfl_down_sync(unsigned mask, T value, unsigned lanes) {
    int source = emulator::fiber().lane + static_cast<int>(lanes);
    return emulator::exchange(mask, value, source < 32 ? source : emulator::fiber().lane);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
    unsigned votes = 0;
    int own = predicate != 0;
    for (int lane = 0; lane < 32; ++lane)
        if (mask >> lane & 1u) votes |= static_cast<unsigned>(emulator::exchange(mask, own, lane)) << lane;
    return votes;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }

template <typename T> T atomicAdd(T* place, T value) { T before = *place; *place = before + value; return before; }
inline unsigned atomicInc(unsigned* place, unsigned limit) {
    unsigned before = *place;
    *place = before >= limit ? 0 : before + 1;
    return before;
}
template <typename T> T atomicMax(T* place, T value) { T before = *place; *place = std::max(before, value); return before; }

template <typename T> T __ldg(const T* place) { return *place; }
template <typename T> T __ldcs(const T* place) { return *place; }
template <typename T> void __stcs(T* place, T value) { *place = value; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fadd_rn(float x, float y) { return x + y; }
using std::isfinite;
using std::isnan;
using std::max;
using std::min;

struct cudaLaunchAttribute {};
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes = 0;
    cudaStream_t stream = nullptr;
    cudaLaunchAttribute* attrs = nullptr;
    unsigned numAttrs = 0;
};

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments... arguments) {
    const dim3 grid = config->gridDim, size = config->blockDim;
    unsigned threads = size.x * size.y * size.z;
    if (!threads || threads > 1024 || !grid.x || !grid.y || !grid.z || grid.y > 65535 || grid.z > 65535)
        return cudaErrorInvalidConfiguration;
    if (config->dynamicSmemBytes > (99u << 10)) return cudaErrorInvalidValue;
    std::lock_guard<std::mutex> only(emulator::one_launch());
    emulator::Block& b = emulator::block();
    blockDim = size;
    gridDim = grid;
    b.shared.assign(config->dynamicSmemBytes + 16, 0);
    b.body = [=] { kernel(arguments...); };
    unsigned long blocks = 1ul * grid.x * grid.y * grid.z;
    for (unsigned long k = 0; k < blocks; ++k) {
        unsigned long i = b.backwards ? blocks - 1 - k : k;
        blockIdx = {static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
                   static_cast<unsigned>(i / grid.x / grid.y)};
        if (!emulator::run_block()) return cudaErrorLaunchFailure;
    }
    return cudaSuccess;
}

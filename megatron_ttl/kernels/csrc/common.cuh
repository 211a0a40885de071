// What every kernel here needs: number formats, 16-byte accesses, reductions, launches.
//
// The interface of each file is plain C: pointers, int64_t and float, the stream last, and the cudaError_t of the launch as
// the result. No header of PyTorch is needed, so a file compiles in seconds and the library loads without a GPU. Launches
// go through `launch` and shared memory through `dynamic_shared`, so that the same sources run on the host, where
// tests/kernels/cuda_emulator stands in for the CUDA runtime.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

namespace ttl {

constexpr int WARP = 32;
constexpr unsigned ALL_LANES = 0xffffffffu;

// Number formats, as Python numbers them.
constexpr int64_t FP32 = 0, BF16 = 1, FP16 = 2;

__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ float widen(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float widen(__half value) { return __half2float(value); }

template <typename T> __device__ __forceinline__ T narrow(float value);
template <> __device__ __forceinline__ float narrow<float>(float value) { return value; }
template <> __device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(float value) { return __float2bfloat16_rn(value); }
template <> __device__ __forceinline__ __half narrow<__half>(float value) { return __float2half_rn(value); }

// 16 bytes of elements: one load or store of a thread.
template <typename T>
struct alignas(16) Vector {
    static constexpr int size = 16 / sizeof(T);
    T element[size];
};

// Whether a row that begins here may be read by vectors.
template <typename T>
__host__ __device__ __forceinline__ bool aligned(const T* place) {
    return reinterpret_cast<uintptr_t>(place) % 16 == 0;
}

template <typename T>
__device__ __forceinline__ Vector<T> load(const T* place) {
#ifdef TTL_EMULATED
    if (!aligned(place)) std::abort();
#endif
    const uint4 raw = *reinterpret_cast<const uint4*>(place);
    Vector<T> vector;
    memcpy(&vector, &raw, sizeof(raw));
    return vector;
}

template <typename T>
__device__ __forceinline__ void store(T* place, const Vector<T>& vector) {
#ifdef TTL_EMULATED
    if (!aligned(place)) std::abort();
#endif
    uint4 raw;
    memcpy(&raw, &vector, sizeof(raw));
#ifdef __CUDA_ARCH__
    // An assignment may be taken apart into stores of 4 bytes.
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};"
                 ::"l"(__cvta_generic_to_global(place)), "r"(raw.x), "r"(raw.y), "r"(raw.z), "r"(raw.w) : "memory");
#else
    *reinterpret_cast<uint4*>(place) = raw;
#endif
}

// A vector as four registers, zeros where `here` is false; for kernels that keep many vectors. A `Vector` that is kept over
// a branch or a reduction may take a register for every element.
template <typename T>
__device__ __forceinline__ uint4 load_packed(const T* place, bool here) {
    uint4 raw = {0, 0, 0, 0};
    if (!here) return raw;
#ifdef TTL_EMULATED
    if (!aligned(place)) std::abort();
#endif
    return *reinterpret_cast<const uint4*>(place);
}

template <typename T>
__device__ __forceinline__ Vector<T> unpacked(const uint4& raw) {
    Vector<T> vector;
    memcpy(&vector, &raw, sizeof(raw));
    return vector;
}

template <typename T>
__device__ __forceinline__ uint4 packed(const Vector<T>& vector) {
    uint4 raw;
    memcpy(&raw, &vector, sizeof(raw));
    return raw;
}

// Have the compiler forget what it computed from these registers: it would keep the widened elements.
__device__ __forceinline__ void keep_packed(uint4& raw) {
#ifdef __CUDA_ARCH__
    asm volatile("" : "+r"(raw.x), "+r"(raw.y), "+r"(raw.z), "+r"(raw.w));
#else
    (void)raw;
#endif
}

__device__ __forceinline__ float warp_sum(float value) {
    for (int lanes = WARP / 2; lanes > 0; lanes /= 2) value += __shfl_xor_sync(ALL_LANES, value, lanes);
    return value;
}

__device__ __forceinline__ float warp_max(float value) {
    for (int lanes = WARP / 2; lanes > 0; lanes /= 2) value = fmaxf(value, __shfl_xor_sync(ALL_LANES, value, lanes));
    return value;
}

// Shared memory whose size the launch says.
template <typename T>
__device__ __forceinline__ T* dynamic_shared() {
#ifdef TTL_EMULATED
    auto place = reinterpret_cast<uintptr_t>(emulator::block().shared.data());
    return reinterpret_cast<T*>((place + 15) / 16 * 16);
#else
    extern __shared__ uint4 memory[];
    return reinterpret_cast<T*>(memory);
#endif
}

// Start a kernel; an empty grid is no error.
template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void* stream,
                   Arguments... arguments) {
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) return cudaSuccess;
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = static_cast<cudaStream_t>(stream);
    return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

// Multiprocessors of the current device, 0 on an error.
inline int multiprocessors() {
    int device = 0, count = 0;
    if (cudaGetDevice(&device) != cudaSuccess) return 0;
    if (cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) return 0;
    return count;
}

// Call `function(T{})` with the type of a number format.
template <typename Function>
int with_dtype(int64_t dtype, Function function) {
    switch (dtype) {
        case FP32: return static_cast<int>(function(float{}));
        case BF16: return static_cast<int>(function(__nv_bfloat16{}));
        case FP16: return static_cast<int>(function(__half{}));
        default: return static_cast<int>(cudaErrorInvalidValue);
    }
}

inline int64_t divide_up(int64_t value, int64_t by) { return (value + by - 1) / by; }

}  // namespace ttl

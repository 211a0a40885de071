// The optimizer over flat buffers: gradients are added up in fp32, their squares summed, and AdamW applied, with learning
// rate, number of the update and norm read from the device.
//
// All three only move bytes. Per element: accumulate 6 (first) or 10 with bf16 gradients, squares 4, adamw 30 with bf16
// weights. Threads take four elements at a time: 16 bytes of fp32, 8 of bf16 and fp16, neighbouring in a warp.
#include <cmath>
#include <type_traits>

#include "common.cuh"

namespace {

using namespace ttl;

constexpr int QUAD = 4;
constexpr int THREADS = 256;
constexpr int64_t STRETCH = 8192;  // elements of one block; kernels/adamw.py knows it too

// Four elements, read and written at once.
template <typename T>
struct alignas(QUAD * sizeof(T)) Quad {
    T element[QUAD];
};

template <typename T>
__host__ __device__ __forceinline__ bool quads_at(const T* place) {
    return reinterpret_cast<uintptr_t>(place) % sizeof(Quad<T>) == 0;
}

// How many bytes a load or store of a quad moves, as one access.
template <size_t bytes> struct Raw;
template <> struct Raw<16> { using Type = uint4; };
template <> struct Raw<8> { using Type = uint2; };

template <typename T>
__device__ __forceinline__ Quad<T> load_quad(const T* place) {
#ifdef TTL_EMULATED
    if (!quads_at(place)) std::abort();
#endif
    const auto raw = *reinterpret_cast<const typename Raw<sizeof(Quad<T>)>::Type*>(place);
    Quad<T> quad;
    memcpy(&quad, &raw, sizeof(raw));
    return quad;
}

// One access for certain, where an assignment may be taken apart; and nothing reads the place again soon.
template <typename T>
__device__ __forceinline__ void store_quad(T* place, const Quad<T>& quad) {
#ifdef TTL_EMULATED
    if (!quads_at(place)) std::abort();
#endif
    typename Raw<sizeof(Quad<T>)>::Type raw;
    memcpy(&raw, &quad, sizeof(raw));
    __stcs(reinterpret_cast<typename Raw<sizeof(Quad<T>)>::Type*>(place), raw);
}

// Elements before the first one of a buffer at which a quad begins.
int64_t head_of(const float* buffer) {
    return (QUAD - static_cast<int64_t>(reinterpret_cast<uintptr_t>(buffer) / sizeof(float) % QUAD)) % QUAD;
}

// A block's part of a buffer: quads from element `head` on, and single elements, which are before and after them; all of
// them single where head is the size.
template <int UNROLL, typename ForQuad, typename ForElement>
__device__ __forceinline__ void for_stretch(int64_t size, int64_t head, ForQuad for_quad, ForElement for_element) {
    const int64_t quads = (size - head) / QUAD, single = size - quads * QUAD;
    const int64_t begin = static_cast<int64_t>(blockIdx.x) * STRETCH, end = begin + STRETCH;
    const int64_t quad_end = end / QUAD < quads ? end / QUAD : quads, single_end = end < single ? end : single;
#pragma unroll UNROLL
    for (int64_t i = begin / QUAD + threadIdx.x; i < quad_end; i += THREADS) for_quad(head + i * QUAD);
    for (int64_t i = begin + threadIdx.x; i < single_end; i += THREADS) for_element(i < head ? i : i + quads * QUAD);
}

inline unsigned blocks_for(int64_t elements) { return static_cast<unsigned>(divide_up(elements, STRETCH)); }

// The sum of a block's values in thread 0, in an order that is always the same; takes SUM_BYTES of shared memory.
constexpr size_t SUM_BYTES = WARP * sizeof(double);

__device__ __forceinline__ double block_sum(double value) {
    double* of_warp = dynamic_shared<double>();
    for (int lanes = WARP / 2; lanes > 0; lanes /= 2) value += __shfl_xor_sync(ALL_LANES, value, lanes);
    if (threadIdx.x % WARP == 0) of_warp[threadIdx.x / WARP] = value;
    __syncthreads();
    double sum = 0.0;
    if (threadIdx.x == 0)
        for (unsigned warp = 0; warp < blockDim.x / WARP; ++warp) sum += of_warp[warp];
    return sum;
}

__device__ __forceinline__ double squared(float value) { return static_cast<double>(value) * static_cast<double>(value); }

// ---- accumulate

constexpr int RANGES = 124;
constexpr int IN_FLIGHT = 4;  // quads that a thread reads before it writes

struct Range {
    const void* gradient;
    int64_t offset, size;
    unsigned first_block;
    unsigned dtype;
};

// By value among a kernel's parameters, which a captured graph keeps; 4096 bytes are the most.
struct Ranges {
    float* flat;
    double* partial;  // one sum of squares for each block, or null
    int count;
    Range range[RANGES];
};
static_assert(sizeof(Ranges) <= 4096, "too many ranges for the parameters of a kernel");

template <bool ADD, bool SQUARE, typename T>
__device__ __forceinline__ double accumulate_range(float* __restrict__ flat, const T* __restrict__ gradient, int64_t size) {
    double squares = 0.0;
    int64_t done = 0;
    if (quads_at(flat) && quads_at(gradient)) {
        done = size / QUAD * QUAD;
        for (int64_t begin = threadIdx.x * QUAD; begin < done; begin += THREADS * QUAD * IN_FLIGHT) {
            Quad<T> from[IN_FLIGHT];
            Quad<float> sum[IN_FLIGHT] = {};
#pragma unroll
            for (int n = 0; n < IN_FLIGHT; ++n) {
                const int64_t i = begin + n * THREADS * QUAD;
                if (i < done) from[n] = load_quad(gradient + i);
                if (ADD && i < done) sum[n] = load_quad(flat + i);
            }
#pragma unroll
            for (int n = 0; n < IN_FLIGHT; ++n) {
                const int64_t i = begin + n * THREADS * QUAD;
                if (i >= done) break;
                for (int k = 0; k < QUAD; ++k) {
                    sum[n].element[k] = ADD ? sum[n].element[k] + widen(from[n].element[k]) : widen(from[n].element[k]);
                    if (SQUARE) squares += squared(sum[n].element[k]);
                }
                store_quad(flat + i, sum[n]);
            }
        }
    }
    for (int64_t i = done + threadIdx.x; i < size; i += THREADS) {
        const float sum = ADD ? flat[i] + widen(gradient[i]) : widen(gradient[i]);
        if (SQUARE) squares += squared(sum);
        flat[i] = sum;
    }
    return squares;
}

template <bool ADD, bool SQUARE>
__global__ void __launch_bounds__(THREADS) accumulate(const __grid_constant__ Ranges ranges) {
    int low = 0, high = ranges.count - 1;  // the last range that begins at this block or before
    while (low < high) {
        const int middle = (low + high + 1) / 2;
        if (ranges.range[middle].first_block <= blockIdx.x) low = middle; else high = middle - 1;
    }
    const Range& range = ranges.range[low];
    const int64_t begin = (blockIdx.x - range.first_block) * STRETCH;
    const int64_t size = range.size - begin < STRETCH ? range.size - begin : STRETCH;
    float* flat = ranges.flat + range.offset + begin;
    double squares;
    switch (range.dtype) {
        case BF16: {
            squares = accumulate_range<ADD, SQUARE>(flat, static_cast<const __nv_bfloat16*>(range.gradient) + begin, size);
            break;
        }
        case FP16: {
            squares = accumulate_range<ADD, SQUARE>(flat, static_cast<const __half*>(range.gradient) + begin, size);
            break;
        }
        default: squares = accumulate_range<ADD, SQUARE>(flat, static_cast<const float*>(range.gradient) + begin, size);
    }
    if (SQUARE) {
        const double total = block_sum(squares);
        if (threadIdx.x == 0) ranges.partial[blockIdx.x] = total;
    }
}

template <bool ADD>
int launch_accumulate(const Ranges& ranges, int64_t blocks, void* stream) {
    const dim3 grid(static_cast<unsigned>(blocks)), block(THREADS);
    if (ranges.partial == nullptr) return launch(accumulate<ADD, false>, grid, block, 0, stream, ranges);
    return launch(accumulate<ADD, true>, grid, block, SUM_BYTES, stream, ranges);
}

// ---- sum of squares

__global__ void __launch_bounds__(THREADS) partial_squares(const float* __restrict__ flat, int64_t size, int64_t head,
                                                           double* __restrict__ partial) {
    double sum = 0.0;
    for_stretch<4>(size, head, [&](int64_t i) {
        const Quad<float> values = load_quad(flat + i);
        for (int k = 0; k < QUAD; ++k) sum += squared(values.element[k]);
    }, [&](int64_t i) { sum += squared(flat[i]); });
    const double total = block_sum(sum);
    if (threadIdx.x == 0) partial[blockIdx.x] = total;
}

__global__ void __launch_bounds__(1024) sum_partials(const double* __restrict__ partial, int64_t count,
                                                     float* __restrict__ result) {
    double sum = 0.0;
#pragma unroll 8
    for (int64_t i = threadIdx.x; i < count; i += 1024) sum += partial[i];
    const double total = block_sum(sum);
    if (threadIdx.x == 0) *result = static_cast<float>(total);
}

int launch_sum(const double* partial, int64_t count, float* result, void* stream) {
    return launch(sum_partials, dim3(1), dim3(1024), SUM_BYTES, stream, partial, count, result);
}

// ---- AdamW

struct Settings {  // as kernels/adamw.py lists them
    double beta1, beta2, eps, weight_decay, clipping;
    double log_beta1, log_beta2;  // made here
};

// What all elements of an update have in common.
struct Update {
    float factor, shrink, step_size, correction;  // of the gradient; of the masters; sqrt(1 - beta2^step)
    float gain1, beta2, gain2, eps;               // gains are 1 - beta
};

__device__ Update update_of(const Settings& settings, float lr, float step, float squares) {
    const double rate = lr;
    Update update;
    update.factor = settings.clipping > 0.0
        ? fminf(1.0f, static_cast<float>(settings.clipping) / (sqrtf(squares) + 1e-6f)) : 1.0f;
    update.shrink = static_cast<float>(1.0 - rate * settings.weight_decay);
    update.step_size = static_cast<float>(rate / -expm1(step * settings.log_beta1));
    update.correction = static_cast<float>(sqrt(-expm1(step * settings.log_beta2)));
    update.gain1 = static_cast<float>(1.0 - settings.beta1);
    update.beta2 = static_cast<float>(settings.beta2);
    update.gain2 = static_cast<float>(1.0 - settings.beta2);
    update.eps = static_cast<float>(settings.eps);
    return update;
}

// average += (1 - beta1) (g - average); square = beta2 square + (1 - beta2) g^2;
// master = (1 - lr decay) master - lr / (1 - beta1^step) average / (sqrt(square) / sqrt(1 - beta2^step) + eps).
__device__ __forceinline__ void step_element(const Update& update, float gradient, float& master, float& average,
                                             float& square) {
    const float scaled = gradient * update.factor;
    average += update.gain1 * (scaled - average);
    square = square * update.beta2 + update.gain2 * scaled * scaled;
    const float divisor = sqrtf(square) / update.correction + update.eps;
    master = master * update.shrink - update.step_size * average / divisor;
}

// Weights of type T; fp32 masters are the weights themselves.
template <typename T>
struct Buffers {
    static constexpr bool HAS_WEIGHTS = !std::is_same<T, float>::value;
    float *master, *gradient, *average, *square;
    T* weights;

    __host__ bool quads_from(int64_t head) const {
        return quads_at(master + head) && quads_at(gradient + head) && quads_at(average + head) &&
               quads_at(square + head) && (!HAS_WEIGHTS || quads_at(weights + head));
    }

    __device__ __forceinline__ void step_element_at(const Update& update, int64_t i) const {
        float own = master[i], first = average[i], second = square[i];
        step_element(update, gradient[i], own, first, second);
        master[i] = own;
        average[i] = first;
        square[i] = second;
        if (HAS_WEIGHTS) weights[i] = narrow<T>(own);
    }

    __device__ __forceinline__ void step_quad_at(const Update& update, int64_t i) const {
        const Quad<float> from = load_quad(gradient + i);
        Quad<float> own = load_quad(master + i), first = load_quad(average + i), second = load_quad(square + i);
        Quad<T> rounded;
        for (int k = 0; k < QUAD; ++k) {
            step_element(update, from.element[k], own.element[k], first.element[k], second.element[k]);
            rounded.element[k] = narrow<T>(own.element[k]);
        }
        store_quad(master + i, own);
        store_quad(average + i, first);
        store_quad(square + i, second);
        if (HAS_WEIGHTS) store_quad(weights + i, rounded);
    }
};

template <typename T>
__global__ void __launch_bounds__(THREADS) adamw(Buffers<T> buffers, int64_t size, int64_t head, bool zero,
                                                 const float* lr, const float* step, const float* squared_norm,
                                                 Settings settings) {
    Update* shared = dynamic_shared<Update>();
    const float squares = *squared_norm;
    const bool finite = isfinite(squares);
    if (!finite && !zero) return;
    if (threadIdx.x == 0) *shared = update_of(settings, *lr, *step, squares);
    __syncthreads();
    const Update update = *shared;
    for_stretch<1>(size, head, [&](int64_t i) {
        if (finite) buffers.step_quad_at(update, i);
        if (zero) store_quad(buffers.gradient + i, Quad<float>{});
    }, [&](int64_t i) {
        if (finite) buffers.step_element_at(update, i);
        if (zero) buffers.gradient[i] = 0.0f;
    });
}

}  // namespace

// flat [N] fp32; table [count, 4] on the host: address, first element in flat, elements, dtype of each gradient.
// With the squared norm of all ranges afterwards: partial [partials] fp64, one for each stretch of a gradient, result [1]
// fp32; else null.
extern "C" int ttl_accumulate(float* flat, const int64_t* table, int64_t count, int64_t add, double* partial,
                              int64_t partials, float* result, void* stream) {
    int64_t done = 0;
    for (int64_t begin = 0; begin < count;) {
        Ranges ranges = {};
        ranges.flat = flat;
        ranges.partial = partial == nullptr ? nullptr : partial + done;
        int64_t blocks = 0;
        for (; begin < count && ranges.count < RANGES; ++begin) {
            const int64_t* row = table + begin * 4;
            if (row[3] < FP32 || row[3] > FP16) return cudaErrorInvalidValue;
            if (row[2] == 0) continue;
            ranges.range[ranges.count++] = {reinterpret_cast<const void*>(row[0]), row[1], row[2],
                                            static_cast<unsigned>(blocks), static_cast<unsigned>(row[3])};
            blocks += blocks_for(row[2]);
        }
        done += blocks;
        if (result != nullptr && done > partials) return cudaErrorInvalidValue;
        const int code = add ? launch_accumulate<true>(ranges, blocks, stream)
                             : launch_accumulate<false>(ranges, blocks, stream);
        if (code) return code;
    }
    if (result == nullptr) return cudaSuccess;
    return done == partials ? launch_sum(partial, partials, result, stream) : static_cast<int>(cudaErrorInvalidValue);
}

// flat [size] fp32, partial [partials] fp64, one for each stretch, result [1] fp32.
extern "C" int ttl_squared_norm(const float* flat, int64_t size, double* partial, int64_t partials, float* result,
                                void* stream) {
    if (blocks_for(size) != partials) return cudaErrorInvalidValue;
    const int code = launch(partial_squares, dim3(blocks_for(size)), dim3(THREADS), SUM_BYTES, stream, flat, size,
                            head_of(flat), partial);
    return code ? code : launch_sum(partial, partials, result, stream);
}

// Flat buffers [size] fp32; weights [size] bf16 or fp16, or null and dtype fp32; lr, step, squared_norm: fp32 scalars on
// the device; numbers [5] fp64 on the host: beta1, beta2, eps, weight decay, clipping (0: none).
extern "C" int ttl_adamw(float* master, float* gradient, float* exp_avg, float* exp_avg_sq, void* weights, int64_t dtype,
                         int64_t size, int64_t zero, const float* lr, const float* step, const float* squared_norm,
                         const double* numbers, void* stream) {
    if (size > 0 && (weights == nullptr) != (dtype == FP32)) return cudaErrorInvalidValue;
    const Settings settings{numbers[0], numbers[1], numbers[2], numbers[3], numbers[4], std::log(numbers[0]),
                            std::log(numbers[1])};
    return with_dtype(dtype, [&](auto kind) {
        using T = decltype(kind);
        const Buffers<T> buffers{master, gradient, exp_avg, exp_avg_sq, static_cast<T*>(weights)};
        const int64_t head = head_of(master);
        return launch(adamw<T>, dim3(blocks_for(size)), dim3(THREADS), sizeof(Update), stream, buffers, size,
                      buffers.quads_from(head) ? head : size, zero != 0, lr, step, squared_norm, settings);
    });
}

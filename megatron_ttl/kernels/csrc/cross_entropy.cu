// Cross-entropy: loss = log(sum exp(x)) - x[label] of each row, and its gradient (softmax(x) - onehot) * scale.
//
// One block takes a row and keeps it in shared memory: the row is read once and, where a gradient is wanted, written once,
// over the logits. A row that would not leave room for a second block on the multiprocessor is read again instead, mostly
// from L2. Rows need not begin at 16 bytes: their ragged ends go element by element.
//
// Labels: 0 .. columns - 1; IGNORED_LABEL costs nothing and has gradient zero, its row is not read; any other label makes
// the row's loss and gradient NaN, so that the step is seen to be not finite, and nothing outside of the row is touched.
#include "row_stream.cuh"

namespace {

using namespace ttl;

constexpr int MAX_THREADS = 512;
constexpr int BLOCKS = 3;  // that fit on a multiprocessor: 3 rows of 64 kB in 227 kB, at most 42 registers a thread
constexpr int VECTORS = 8;  // of a row for each thread, while there are more threads to be had
constexpr int64_t IGNORED_LABEL = -100;

// A factor: a number, times one on the device if there is one.
struct Scale {
    const float* place;
    float value;
    __device__ __forceinline__ float get() const { return place ? *place * value : value; }
};

// One over the number of tokens would leave nothing of most gradients in fp16: there the backward pass multiplies it in.
Scale scale_at_once(Scale scale, int64_t dtype) { return dtype == FP16 ? Scale{nullptr, 1.0f} : scale; }
Scale scale_later(Scale scale, int64_t dtype) { return dtype == FP16 ? scale : Scale{nullptr, 1.0f}; }

// exp(x), x <= 0: fp32 to the last digit; for 16-bit logits the hardware's power of two with log2(e) in two parts.
template <typename T>
__device__ __forceinline__ float exponential(float x) {
    if constexpr (sizeof(T) == 4) return expf(x);
    const float power = fmaf(x, 1.44269502f, x * 1.92596303e-8f);
#ifdef __CUDA_ARCH__
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(power));
    return result;
#else
    return exp2f(power);
#endif
}

// What is known of the numbers seen so far: their maximum, and the sum of exp(x - maximum). The sum is fp64, one addition
// for a vector: in fp32 the many steps of the reduction would show in the last digit of an fp32 gradient.
struct Softmax {
    float largest = -INFINITY;
    double total = 0.0;

    // What exponents are taken relative to: with nothing but -inf so far, -inf - -inf would be no number.
    static __device__ __forceinline__ float base(float largest) { return largest == -INFINITY ? 0.0f : largest; }
    __device__ __forceinline__ double total_at(float other) const { return total * expf(largest - base(other)); }

    template <typename T, int COUNT>
    __device__ __forceinline__ void add(const T (&element)[COUNT]) {
        float most = largest;
#pragma unroll
        for (int e = 0; e < COUNT; ++e) most = fmaxf(most, widen(element[e]));
        if (most > largest) {
            total = total_at(most);
            largest = most;
        }
        const float from = base(largest);
        float sum = 0.0f;
#pragma unroll
        for (int e = 0; e < COUNT; ++e) sum += exponential<T>(widen(element[e]) - from);
        total += sum;
    }
};

// The gradient of a row: exp(x - largest) * factor, less `scale` in the column `label` (-1: in none).
template <typename T>
struct Gradient {
    static constexpr int N = Vector<T>::size;
    float largest, factor, scale;
    int head, label_vector, label_element;

    __device__ __forceinline__ Gradient(float largest_, float factor_, float scale_, int head_, int label)
        : largest(largest_), factor(factor_), scale(scale_), head(head_) {
        label_vector = label < head ? -1 : (label - head) / N;
        label_element = (label - head) % N;
    }

    __device__ __forceinline__ float of(T x) const { return exponential<T>(widen(x) - largest) * factor; }

    __device__ __forceinline__ void write_vector(T* middle, int i, const Vector<T>& x) const {
        float value[N];
#pragma unroll
        for (int e = 0; e < N; ++e) value[e] = of(x.element[e]);
        if (i == label_vector) {
#pragma unroll
            for (int e = 0; e < N; ++e)
                if (e == label_element) value[e] -= scale;
        }
        Vector<T> out;
#pragma unroll
        for (int e = 0; e < N; ++e) out.element[e] = narrow<T>(value[e]);
        store(middle + static_cast<int64_t>(i) * N, out);
    }

    // The whole row from `begin`, which may be `out`.
    __device__ __forceinline__ void write_row(const T* begin, T* out, const Row<T>& row, int label, uint4* shared) const {
        for_each_vector<T, false>(begin + head, row.vectors, shared,
                                  [&](int i, const Vector<T>& x) { write_vector(out + head, i, x); });
        write_edge(begin, out, row.edge(), label);
    }

    __device__ __forceinline__ void write_edge(const T* begin, T* out, int edge, int label) const {
        if (edge >= 0) out[edge] = narrow<T>(of(begin[edge]) - (edge == label ? scale : 0.0f));
    }
};

template <typename T>
__device__ __forceinline__ void write_zeros(T* begin, int columns) {
    const Row<T> row(begin, columns);
    Vector<T> zeros;
#pragma unroll
    for (int e = 0; e < Vector<T>::size; ++e) zeros.element[e] = narrow<T>(0.0f);
    for (int i = static_cast<int>(threadIdx.x); i < row.vectors; i += static_cast<int>(blockDim.x))
        store(begin + row.head + static_cast<int64_t>(i) * Vector<T>::size, zeros);
    if (row.edge() >= 0) begin[row.edge()] = narrow<T>(0.0f);
}

__device__ __forceinline__ double warp_sum_fp64(double value) {
    for (int lanes = WARP / 2; lanes > 0; lanes /= 2) value += __shfl_xor_sync(ALL_LANES, value, lanes);
    return value;
}

// Bring together what the threads of a warp know, then what the warps know; every thread gets the result.
__device__ __forceinline__ Softmax reduce_warp(const Softmax& mine) {
    Softmax result;
    result.largest = warp_max(mine.largest);
    result.total = warp_sum_fp64(mine.total_at(result.largest));
    return result;
}

__device__ __forceinline__ Softmax reduce_block(const Softmax& mine) {
    __shared__ float largest[WARP];
    __shared__ double total[WARP];
    const int lane = static_cast<int>(threadIdx.x) % WARP, warps = static_cast<int>(blockDim.x) / WARP;
    const Softmax warp = reduce_warp(mine);
    if (lane == 0) {
        largest[threadIdx.x / WARP] = warp.largest;
        total[threadIdx.x / WARP] = warp.total;
    }
    __syncthreads();
    Softmax part;
    if (lane < warps) {
        part.largest = largest[lane];
        part.total = total[lane];
    }
    return reduce_warp(part);
}

// scale / total, exactly rounded for fp32 logits.
template <typename T>
__device__ __forceinline__ float divided(float scale, double total) {
    return sizeof(T) == 4 ? static_cast<float>(scale / total) : scale / static_cast<float>(total);
}

// Read a row; with KEEP its vectors stay in shared memory. No thread returns before all have read.
template <typename T, bool KEEP>
__device__ __forceinline__ Softmax read_row(const T* begin, const Row<T>& row, uint4* shared) {
    Softmax softmax;
    for_each_vector<T, KEEP>(begin + row.head, row.vectors, shared,
                             [&](int, const Vector<T>& x) { softmax.add(x.element); });
    if (row.edge() >= 0) softmax.add<T, 1>({begin[row.edge()]});
    return reduce_block(softmax);
}

// Loss of each row; with GRADIENT, its gradient in `gradient`, which may be `logits`.
template <typename T, bool GRADIENT, bool KEEP>
__global__ void __launch_bounds__(MAX_THREADS, BLOCKS)
    whole_rows(const T* logits, T* gradient, const int64_t* __restrict__ labels, float* __restrict__ losses,
               Scale scale_of_step, int columns) {
    const int64_t number = blockIdx.x, label = labels[number];
    const T* begin = logits + number * columns;
    T* out = gradient + number * columns;
    if (label == IGNORED_LABEL) {
        if (threadIdx.x == 0) losses[number] = 0.0f;
        if constexpr (GRADIENT) write_zeros(out, columns);
        return;
    }
    const int column = label >= 0 && label < columns ? static_cast<int>(label) : -1;
    const Row<T> row(begin, columns);
    uint4* shared = dynamic_shared<uint4>();
    const float picked = threadIdx.x == 0 && column >= 0 ? widen(begin[column]) : NAN;  // before it is overwritten
    const Softmax softmax = read_row<T, KEEP>(begin, row, shared);
    if (threadIdx.x == 0) losses[number] = logf(static_cast<float>(softmax.total)) - (picked - softmax.largest);
    if constexpr (GRADIENT) {
        const float scale = column >= 0 ? scale_of_step.get() : NAN;
        const Gradient<T> gradients(softmax.largest, divided<T>(scale, softmax.total), scale, row.head, column);
        if constexpr (KEEP) {
            for (int i = static_cast<int>(threadIdx.x); i < row.vectors; i += static_cast<int>(blockDim.x))
                gradients.write_vector(out + row.head, i, load_shared<T>(shared + i));
            gradients.write_edge(begin, out, row.edge(), column);
        } else {
            gradients.write_row(begin, out, row, column, shared);
        }
    }
}

// What this part of the columns knows of each row: the columns from `first` on, of which the memory has `columns`, and then
// filler up to `stride`. A label of another part picks 0.
template <typename T>
__global__ void __launch_bounds__(MAX_THREADS, BLOCKS)
    partial_rows(const T* logits, const int64_t* __restrict__ labels, float* __restrict__ largest,
                 float* __restrict__ total, float* __restrict__ picked, int64_t first, int columns, int stride) {
    const int64_t number = blockIdx.x, label = labels[number], column = label - first;
    const T* begin = logits + number * stride;
    Softmax softmax;
    if (label == IGNORED_LABEL) {
        softmax.largest = 0.0f;
        softmax.total = 1.0;
    } else {
        softmax = read_row<T, false>(begin, Row<T>(begin, columns), dynamic_shared<uint4>());
    }
    if (threadIdx.x > 0) return;
    largest[number] = softmax.largest;
    total[number] = static_cast<float>(softmax.total);
    picked[number] = label >= 0 && column >= 0 && column < columns ? widen(begin[column]) : 0.0f;
}

// Put the gradient in the place of each row, given maximum and sum over all parts.
template <typename T>
__global__ void __launch_bounds__(MAX_THREADS, BLOCKS)
    finish_rows(T* logits, const int64_t* __restrict__ labels, const float* __restrict__ largest,
                const float* __restrict__ total, Scale scale_of_step, int64_t first, int columns, int stride) {
    const int64_t number = blockIdx.x, label = labels[number];
    T* begin = logits + number * stride;
    if (label == IGNORED_LABEL) {
        write_zeros(begin, stride);
        return;
    }
    write_zeros(begin + columns, stride - columns);
    const Row<T> row(begin, columns);
    const int column = label >= first && label < first + columns ? static_cast<int>(label - first) : -1;
    const float scale = scale_of_step.get();
    const Gradient<T> gradients(largest[number], scale / total[number], scale, row.head, column);
    gradients.write_row(begin, begin, row, column, dynamic_shared<uint4>());
}

// Sum in fp64 and in one order, times the scale.
__global__ void sum_losses(const float* __restrict__ losses, float* __restrict__ result, Scale scale, int64_t rows) {
    __shared__ double sums[WARP];
    double sum = 0.0;
#pragma unroll 8
    for (int64_t i = threadIdx.x; i < rows; i += blockDim.x) sum += losses[i];
    sum = warp_sum_fp64(sum);
    if (threadIdx.x % WARP == 0) sums[threadIdx.x / WARP] = sum;
    __syncthreads();
    if (threadIdx.x > 0) return;
    for (unsigned warp = 1; warp < blockDim.x / WARP; ++warp) sum += sums[warp];
    *result = static_cast<float>(sum * scale.get());
}

// Multiply by the gradient that comes in; nothing is read where that is 1, as after loss.backward().
template <typename T>
__global__ void multiply(T* values, const float* __restrict__ incoming, Scale scale, int64_t count) {
    const float factor = *incoming * scale.get();
    if (factor == 1.0f) return;
    constexpr int N = Vector<T>::size;
    const int64_t head = min(count, static_cast<int64_t>((16 - reinterpret_cast<uintptr_t>(values) % 16) % 16 / sizeof(T)));
    const int64_t vectors = (count - head) / N, behind = head + vectors * N;
    const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
    for (int64_t i = thread; i < vectors; i += threads) {
        Vector<T> vector = load(values + head + i * N);
#pragma unroll
        for (int e = 0; e < N; ++e) vector.element[e] = narrow<T>(widen(vector.element[e]) * factor);
        store(values + head + i * N, vector);
    }
    if (thread < head) values[thread] = narrow<T>(widen(values[thread]) * factor);
    if (thread < count - behind) values[behind + thread] = narrow<T>(widen(values[behind + thread]) * factor);
}

// Threads for a row, in whole warps.
template <typename T>
dim3 threads_for(int64_t columns) {
    const int64_t warps = divide_up(columns, Vector<T>::size * VECTORS * WARP), most = MAX_THREADS / WARP;
    return dim3(static_cast<unsigned>(WARP * (warps < 1 ? 1 : warps < most ? warps : most)));
}

bool fits(int64_t rows, int64_t columns, int64_t stride) {
    return rows >= 0 && rows <= INT32_MAX && columns >= 0 && columns <= stride && stride <= INT32_MAX / 2;
}

// Launch a kernel that keeps no rows, one block for each row.
template <typename T, typename... Parameters, typename... Arguments>
cudaError_t launch_rows(void (*kernel)(Parameters...), int64_t rows, int64_t columns, void* stream, Arguments... arguments) {
    const dim3 block = threads_for<T>(columns);
    return launch(kernel, dim3(static_cast<unsigned>(rows)), block, AHEAD * sizeof(uint4) * block.x, stream, arguments...);
}

// Launch the kernel that keeps its rows where two of them fit on a multiprocessor, the one that reads again elsewhere.
template <typename T>
cudaError_t launch_with_gradient(const T* logits, T* gradient, const int64_t* labels, float* losses, Scale scale,
                                 int64_t rows, int columns, void* stream) {
    int device = 0, most = 0;
    cudaError_t code = cudaGetDevice(&device);
    if (code == cudaSuccess) code = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (code != cudaSuccess) return code;
    const int64_t bytes = divide_up(columns * static_cast<int64_t>(sizeof(T)), 16) * 16;
    if (bytes > most / 2 - 1024)
        return launch_rows<T>(whole_rows<T, true, false>, rows, columns, stream, logits, gradient, labels, losses, scale,
                              columns);
    const auto kernel = whole_rows<T, true, true>;
    code = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
    if (code == cudaSuccess)
        code = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
    if (code != cudaSuccess) return code;
    return launch(kernel, dim3(static_cast<unsigned>(rows)), threads_for<T>(columns), static_cast<size_t>(bytes), stream,
                  logits, gradient, labels, losses, scale, columns);
}

}  // namespace

// logits, gradient [rows, columns] (gradient: the logits' own memory, or other memory alike to 16 bytes, or null: no
// gradient), labels [rows] int64, losses [rows] fp32, result one fp32: scale * sum(losses). `scale` one fp32 or null: 1.
extern "C" int ttl_cross_entropy(const void* logits, void* gradient, const int64_t* labels, float* losses, float* result,
                                 const float* scale, float scale_value, int64_t rows, int64_t columns, int64_t dtype,
                                 void* stream) {
    const bool alike = (reinterpret_cast<uintptr_t>(logits) - reinterpret_cast<uintptr_t>(gradient)) % 16 == 0;
    if (!fits(rows, columns, columns) || (gradient && !alike)) return static_cast<int>(cudaErrorInvalidValue);
    const Scale factor{scale, scale_value};
    const int width = static_cast<int>(columns), code = with_dtype(dtype, [&](auto zero) {
        using T = decltype(zero);
        const auto* from = static_cast<const T*>(logits);
        auto* to = static_cast<T*>(gradient);
        const Scale within = scale_at_once(factor, dtype);
        if (gradient) return launch_with_gradient<T>(from, to, labels, losses, within, rows, width, stream);
        return launch_rows<T>(whole_rows<T, false, false>, rows, columns, stream, from, to, labels, losses, factor, width);
    });
    if (code) return code;
    return static_cast<int>(launch(sum_losses, dim3(1), dim3(1024), 0, stream, losses, result, factor, rows));
}

// A part of the columns: logits [rows, stride], of which `columns` count; largest, total, picked [rows] fp32.
extern "C" int ttl_cross_entropy_partial(const void* logits, const int64_t* labels, float* largest, float* total,
                                         float* picked, int64_t rows, int64_t first, int64_t columns, int64_t stride,
                                         int64_t dtype, void* stream) {
    if (!fits(rows, columns, stride)) return static_cast<int>(cudaErrorInvalidValue);
    return with_dtype(dtype, [&](auto zero) {
        using T = decltype(zero);
        return launch_rows<T>(partial_rows<T>, rows, columns, stream, static_cast<const T*>(logits), labels, largest, total,
                              picked, first, static_cast<int>(columns), static_cast<int>(stride));
    });
}

// The gradient in the place of the logits, zero in the filler; largest and total of all parts.
extern "C" int ttl_cross_entropy_finish(void* logits, const int64_t* labels, const float* largest, const float* total,
                                        const float* scale, float scale_value, int64_t rows, int64_t first, int64_t columns,
                                        int64_t stride, int64_t dtype, void* stream) {
    if (!fits(rows, columns, stride)) return static_cast<int>(cudaErrorInvalidValue);
    return with_dtype(dtype, [&](auto zero) {
        using T = decltype(zero);
        return launch_rows<T>(finish_rows<T>, rows, columns, stream, static_cast<T*>(logits), labels, largest, total,
                              scale_at_once({scale, scale_value}, dtype), first, static_cast<int>(columns),
                              static_cast<int>(stride));
    });
}

// values [count] times incoming (one fp32), in place; the scale is that of the forward pass.
extern "C" int ttl_cross_entropy_backward(void* values, const float* incoming, const float* scale, float scale_value,
                                          int64_t count, int64_t dtype, void* stream) {
    return with_dtype(dtype, [&](auto zero) {
        using T = decltype(zero);
        constexpr int64_t THREADS = 256;
        const int64_t wanted = divide_up(divide_up(count, Vector<T>::size), THREADS), most = 8 * multiprocessors();
        return launch(multiply<T>, dim3(static_cast<unsigned>(wanted < most ? wanted : most)), dim3(THREADS), 0, stream,
                      static_cast<T*>(values), incoming, scale_later({scale, scale_value}, dtype), count);
    });
}

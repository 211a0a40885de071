// RMSNorm: y = x / sqrt(mean(x^2) + eps) * weight, alone and after a residual addition; statistics in fp32.
//
// Bytes that must move, per row of h elements of e bytes: forward 2he, with the addition 4he; backward 3he, with the
// gradient of the sum 4he; 4 more for 1/rms. So every row is read once: each thread holds up to four 16-byte vectors of it
// in registers, all loads are issued before the first use, and as many warps share a row as that takes (one up to h = 1024
// in bf16, two up to 2048). The backward pass runs on a grid that stays, adds up the gradient of the weight in registers
// over all rows of a thread, and leaves one partial sum per block to a second, small kernel: no atomics, so the same
// numbers every time.
#include "common.cuh"

namespace {

using namespace ttl;

constexpr int MOST_VECTORS = 4;       // of a thread in each operand
constexpr int MOST_ROW_WARPS = 16;    // 512 threads of at most 128 registers fill the registers of a multiprocessor
constexpr int FORWARD_WARPS = 4, BACKWARD_WARPS = 8;  // of a block, while rows are no wider
constexpr int SUM_ROWS = 16;

// How a block is laid over rows: `row_warps` warps side by side, `vectors` vectors of each thread; 0 where rows do not fit.
struct Shape {
    int vectors, row_warps;
    dim3 block(int warps) const {
        const int rows = row_warps < warps ? warps / row_warps : 1;
        return dim3(static_cast<unsigned>(row_warps * WARP), static_cast<unsigned>(rows));
    }
};

template <typename T>
Shape shape_of(int64_t width, bool all_aligned) {
    if (!all_aligned || width % Vector<T>::size != 0) return {0, 0};
    for (int row_warps = 1; row_warps <= MOST_ROW_WARPS; row_warps *= 2) {
        const int64_t vectors = divide_up(width / Vector<T>::size, row_warps * WARP);
        if (vectors <= MOST_VECTORS) return {static_cast<int>(vectors), row_warps};
    }
    return {0, 0};
}

// Sum over the threads of a row. All threads of a block must call; `turn` counts the calls, for two take turns in memory.
__device__ __forceinline__ float row_sum(float value, int turn) {
    value = warp_sum(value);
    if (blockDim.x == WARP) return value;
    __shared__ float sums[2][32];
    const int row_warps = blockDim.x / WARP, first = threadIdx.y * row_warps;
    if (threadIdx.x % WARP == 0) sums[turn % 2][first + threadIdx.x / WARP] = value;
    __syncthreads();
    value = 0.0f;
    for (int warp = 0; warp < row_warps; ++warp) value += sums[turn % 2][first + warp];
    return value;
}

template <typename T, int VECTORS>
__global__ void __launch_bounds__(MOST_ROW_WARPS * WARP, 1)
    forward_vectors(const T* __restrict__ x, const T* __restrict__ delta, const T* __restrict__ weight,
                    T* __restrict__ total, T* __restrict__ y, float* __restrict__ rstd, int64_t rows, int64_t width,
                    float eps) {
    constexpr int SIZE = Vector<T>::size;
    const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y, from = row * width;
    const int stride = blockDim.x * SIZE, first = threadIdx.x * SIZE;
    const bool row_is_there = row < rows, add = delta != nullptr;
    uint4 kept[VECTORS], added[VECTORS], scales[VECTORS];
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
        const int column = first + v * stride;
        const bool here = row_is_there && column < width;
        kept[v] = load_packed(x + from + column, here);
        added[v] = load_packed(delta + from + column, here && add);
        scales[v] = load_packed(weight + column, here);
    }
    float squares = 0.0f;
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
        const int column = first + v * stride;
        Vector<T> values = unpacked<T>(kept[v]);
        if (add) {
            const Vector<T> more = unpacked<T>(added[v]);
#pragma unroll
            for (int i = 0; i < SIZE; ++i) values.element[i] = narrow<T>(widen(values.element[i]) + widen(more.element[i]));
            kept[v] = packed(values);
            if (row_is_there && column < width) store(total + from + column, values);
        }
#pragma unroll
        for (int i = 0; i < SIZE; ++i) squares += widen(values.element[i]) * widen(values.element[i]);
        keep_packed(kept[v]);
    }
    const float scale = rsqrtf(row_sum(squares, 0) / static_cast<float>(width) + eps);
    if (!row_is_there) return;
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
        const int column = first + v * stride;
        Vector<T> values = unpacked<T>(kept[v]);
        const Vector<T> factors = unpacked<T>(scales[v]);
#pragma unroll
        for (int i = 0; i < SIZE; ++i)
            values.element[i] = narrow<T>(widen(values.element[i]) * scale * widen(factors.element[i]));
        if (column < width) store(y + from + column, values);
    }
    if (threadIdx.x == 0) rstd[row] = scale;
}

// With g = dy * weight: dx = rstd * (g - x * rstd^2 * mean(g * x)), plus the gradient of the sum where there is one.
// partials [blocks, width], or none: sums of dy * x * rstd over the rows of a block.
template <typename T, int VECTORS>
__global__ void __launch_bounds__(MOST_ROW_WARPS * WARP, 1)
    backward_vectors(const T* __restrict__ dy, const T* __restrict__ dtotal, const T* __restrict__ x,
                     const T* __restrict__ weight, const float* __restrict__ rstd, T* __restrict__ dx,
                     float* __restrict__ partials, int64_t rows, int64_t width) {
    constexpr int SIZE = Vector<T>::size;
    const int stride = blockDim.x * SIZE, first = threadIdx.x * SIZE;
    const bool add = dtotal != nullptr;
    float sums[VECTORS][SIZE];
#pragma unroll
    for (int v = 0; v < VECTORS; ++v)
#pragma unroll
        for (int i = 0; i < SIZE; ++i) sums[v][i] = 0.0f;
    const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.y;
    int turn = 0;
    for (int64_t top = static_cast<int64_t>(blockIdx.x) * blockDim.y; top < rows; top += step, ++turn) {
        const int64_t row = top + threadIdx.y, from = row * width;
        const bool row_is_there = row < rows;
        uint4 gradients[VECTORS], kept[VECTORS], passed_on[VECTORS], scales[VECTORS];
#pragma unroll
        for (int v = 0; v < VECTORS; ++v) {
            const int column = first + v * stride;
            const bool here = row_is_there && column < width;
            gradients[v] = load_packed(dy + from + column, here);
            kept[v] = load_packed(x + from + column, here);
            passed_on[v] = load_packed(dtotal + from + column, here && add);
            scales[v] = load_packed(weight + column, here);  // from the cache: there are no registers left to keep it
        }
        const float scale = row_is_there ? rstd[row] : 0.0f;
        float products = 0.0f;
#pragma unroll
        for (int v = 0; v < VECTORS; ++v) {
            const Vector<T> slopes = unpacked<T>(gradients[v]), values = unpacked<T>(kept[v]);
            const Vector<T> factors = unpacked<T>(scales[v]);
#pragma unroll
            for (int i = 0; i < SIZE; ++i)
                products += widen(slopes.element[i]) * widen(factors.element[i]) * widen(values.element[i]);
            keep_packed(gradients[v]);
            keep_packed(kept[v]);
            keep_packed(scales[v]);
        }
        const float along = row_sum(products, turn) / static_cast<float>(width) * scale * scale;
#pragma unroll
        for (int v = 0; v < VECTORS; ++v) {
            const int column = first + v * stride;
            const Vector<T> slopes = unpacked<T>(gradients[v]), values = unpacked<T>(kept[v]);
            const Vector<T> factors = unpacked<T>(scales[v]);
            Vector<T> result = unpacked<T>(passed_on[v]);
#pragma unroll
            for (int i = 0; i < SIZE; ++i) {
                const float slope = widen(slopes.element[i]), value = widen(values.element[i]);
                sums[v][i] += slope * (value * scale);
                const float through = scale * (slope * widen(factors.element[i]) - value * along);
                result.element[i] = narrow<T>(through + widen(result.element[i]));
            }
            if (row_is_there && column < width) store(dx + from + column, result);
        }
    }
    if (partials == nullptr) return;
    float* shared = dynamic_shared<float>();  // [blockDim.y, width]
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
        const int column = first + v * stride;
        if (column < width)
#pragma unroll
            for (int i = 0; i < SIZE; ++i) shared[threadIdx.y * width + column + i] = sums[v][i];
    }
    __syncthreads();
    for (int64_t column = threadIdx.y * blockDim.x + threadIdx.x; column < width; column += blockDim.x * blockDim.y) {
        float sum = 0.0f;
        for (unsigned row = 0; row < blockDim.y; ++row) sum += shared[row * width + column];
        partials[blockIdx.x * width + column] = sum;
    }
}

// Rows of any width and alignment, one element at a time, a warp to a row; they are read twice.
template <typename T>
__global__ void forward_any_width(const T* __restrict__ x, const T* __restrict__ delta, const T* __restrict__ weight,
                                  T* __restrict__ total, T* __restrict__ y, float* __restrict__ rstd, int64_t rows,
                                  int64_t width, float eps) {
    const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y, from = row * width;
    if (row >= rows) return;
    const bool add = delta != nullptr;
    const T* kept = add ? total + from : x + from;
    float squares = 0.0f;
    for (int64_t i = threadIdx.x; i < width; i += WARP) {
        T value = x[from + i];
        if (add) total[from + i] = value = narrow<T>(widen(value) + widen(delta[from + i]));
        squares += widen(value) * widen(value);
    }
    const float scale = rsqrtf(warp_sum(squares) / static_cast<float>(width) + eps);
    for (int64_t i = threadIdx.x; i < width; i += WARP)  // what this very thread has written
        y[from + i] = narrow<T>(widen(kept[i]) * scale * widen(weight[i]));
    if (threadIdx.x == 0) rstd[row] = scale;
}

template <typename T>
__global__ void backward_any_width(const T* __restrict__ dy, const T* __restrict__ dtotal, const T* __restrict__ x,
                                   const T* __restrict__ weight, const float* __restrict__ rstd, T* __restrict__ dx,
                                   int64_t rows, int64_t width) {
    const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y, from = row * width;
    if (row >= rows) return;
    float products = 0.0f;
    for (int64_t i = threadIdx.x; i < width; i += WARP)
        products += widen(dy[from + i]) * widen(weight[i]) * widen(x[from + i]);
    const float scale = rstd[row];
    const float along = warp_sum(products) / static_cast<float>(width) * scale * scale;
    for (int64_t i = threadIdx.x; i < width; i += WARP) {
        float result = scale * (widen(dy[from + i]) * widen(weight[i]) - widen(x[from + i]) * along);
        if (dtotal != nullptr) result += widen(dtotal[from + i]);
        dx[from + i] = narrow<T>(result);
    }
}

// partials [gridDim.y, width]: a thread goes down a column through the rows of its part.
template <typename T>
__global__ void weight_gradient_any_width(const T* __restrict__ dy, const T* __restrict__ x, const float* __restrict__ rstd,
                                          float* __restrict__ partials, int64_t rows, int64_t width) {
    const int64_t column = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (column >= width) return;
    float sum = 0.0f;
    for (int64_t row = blockIdx.y; row < rows; row += gridDim.y)
        sum += widen(dy[row * width + column]) * (widen(x[row * width + column]) * rstd[row]);
    partials[blockIdx.y * width + column] = sum;
}

// dweight [width] = the sum of partials [count, width], in the same order every time.
template <typename T>
__global__ void sum_partials(const float* __restrict__ partials, T* __restrict__ dweight, int64_t count,
                                       int64_t width) {
    __shared__ float sums[SUM_ROWS][WARP];
    const int64_t column = static_cast<int64_t>(blockIdx.x) * WARP + threadIdx.x;
    float sum = 0.0f;
    if (column < width)
#pragma unroll 4
        for (int64_t row = threadIdx.y; row < count; row += SUM_ROWS) sum += partials[row * width + column];
    sums[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y != 0 || column >= width) return;
    for (int row = 1; row < SUM_ROWS; ++row) sum += sums[row][threadIdx.x];
    dweight[column] = narrow<T>(sum);
}

// Call `function(std::integral_constant<int, vectors>{})`.
template <typename Function>
cudaError_t with_vectors(int vectors, Function function) {
    switch (vectors) {
        case 1:
        case 2: return function(std::integral_constant<int, 2>{});
        case 3: return function(std::integral_constant<int, 3>{});
        default: return function(std::integral_constant<int, MOST_VECTORS>{});
    }
}

template <typename T>
cudaError_t forward(const T* x, const T* delta, const T* weight, T* total, T* y, float* rstd, int64_t rows, int64_t width,
                    float eps, void* stream) {
    const bool all_aligned = aligned(x) && aligned(delta) && aligned(weight) && aligned(total) && aligned(y);
    const Shape shape = shape_of<T>(width, all_aligned);
    const dim3 block = shape.vectors ? shape.block(FORWARD_WARPS) : dim3(WARP, FORWARD_WARPS);
    const dim3 grid(static_cast<unsigned>(divide_up(rows, block.y)));
    if (shape.vectors == 0)
        return launch(forward_any_width<T>, grid, block, 0, stream, x, delta, weight, total, y, rstd, rows, width, eps);
    return with_vectors(shape.vectors, [&](auto vectors) {
        return launch(forward_vectors<T, vectors()>, grid, block, 0, stream, x, delta, weight, total, y, rstd, rows,
                      width, eps);
    });
}

template <typename T>
cudaError_t backward(const T* dy, const T* dtotal, const T* x, const T* weight, const float* rstd, T* dx, float* partials,
                     T* dweight, int64_t rows, int64_t width, int64_t blocks, void* stream) {
    const bool all_aligned = aligned(dy) && aligned(dtotal) && aligned(x) && aligned(weight) && aligned(dx);
    const Shape shape = shape_of<T>(width, all_aligned);
    const dim3 block = shape.vectors ? shape.block(BACKWARD_WARPS) : dim3(WARP, BACKWARD_WARPS);
    const int64_t needed = divide_up(rows, block.y), count = blocks < needed ? blocks : needed;
    cudaError_t code;
    if (shape.vectors) {
        const size_t shared_bytes = partials == nullptr ? 0 : block.y * static_cast<size_t>(width) * sizeof(float);
        code = with_vectors(shape.vectors, [&](auto vectors) {
            return launch(backward_vectors<T, vectors()>, dim3(static_cast<unsigned>(count)), block, shared_bytes, stream,
                          dy, dtotal, x, weight, rstd, dx, partials, rows, width);
        });
    } else {
        code = launch(backward_any_width<T>, dim3(static_cast<unsigned>(needed)), block, 0, stream, dy, dtotal, x,
                      weight, rstd, dx, rows, width);
        if (code == cudaSuccess && partials != nullptr)
            code = launch(weight_gradient_any_width<T>,
                          dim3(static_cast<unsigned>(divide_up(width, 4 * WARP)), static_cast<unsigned>(count)),
                          dim3(4 * WARP), 0, stream, dy, x, rstd, partials, rows, width);
    }
    if (code != cudaSuccess || partials == nullptr) return code;
    return launch(sum_partials<T>, dim3(static_cast<unsigned>(divide_up(width, WARP))), dim3(WARP, SUM_ROWS), 0,
                  stream, partials, dweight, count, width);
}

}  // namespace

// x, y [rows, width], weight [width], rstd [rows] fp32. With `delta`: total = x + delta, rounded, and y its norm.
extern "C" int ttl_rms_norm_forward(const void* x, const void* delta, const void* weight, void* total, void* y, float* rstd,
                                    int64_t rows, int64_t width, float eps, int64_t dtype, void* stream) {
    return with_dtype(dtype, [&](auto zero) {
        using T = decltype(zero);
        return forward(static_cast<const T*>(x), static_cast<const T*>(delta), static_cast<const T*>(weight),
                       static_cast<T*>(total), static_cast<T*>(y), rstd, rows, width, eps, stream);
    });
}

// dy, x, dx [rows, width]; dtotal likewise, or none: the gradient of x beside that through the norm. partials [blocks,
// width] fp32, memory to work in, and dweight [width]; none for both: that gradient is not wanted.
extern "C" int ttl_rms_norm_backward(const void* dy, const void* dtotal, const void* x, const void* weight,
                                     const float* rstd, void* dx, float* partials, void* dweight, int64_t rows,
                                     int64_t width, int64_t blocks, int64_t dtype, void* stream) {
    return with_dtype(dtype, [&](auto zero) {
        using T = decltype(zero);
        return backward(static_cast<const T*>(dy), static_cast<const T*>(dtotal), static_cast<const T*>(x),
                        static_cast<const T*>(weight), rstd, static_cast<T*>(dx), partials, static_cast<T*>(dweight), rows,
                        width, blocks, stream);
    });
}

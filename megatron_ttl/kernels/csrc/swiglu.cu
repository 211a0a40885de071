// SwiGLU on a packed projection: y = gate * sigmoid(gate) * up, and its gradient; fp32 inside, rounded once.
//
// A thread takes the same columns of a few rows: several independent loads, and no division to find a place. The blocks of
// a row stand side by side in the grid, so that what runs at a time reads whole rows.
#include "common.cuh"

namespace {

using namespace ttl;

constexpr int COLUMNS = 64, LANES = 4;  // a block: 64 vectors of a row, 4 rows at a time
constexpr int ROWS = 2;  // of a thread: four loads of 16 bytes forward, six backward

// value * sigmoid(x). Formats of 16 bits take the fast functions, whose errors lie far below their rounding.
template <typename T>
__device__ __forceinline__ float times_sigmoid(float value, float x) {
    if constexpr (sizeof(T) == 2) return __fdividef(value, 1.0f + __expf(-x));
    else return value / (1.0f + expf(-x));
}

template <typename T>
__device__ __forceinline__ T gated(T gate, T up) {
    const float x = widen(gate);
    return narrow<T>(times_sigmoid<T>(x, x) * widen(up));
}

// A few rows, LANES apart. No condition stands between the loads: the compiler would put them behind it, row by row.
template <int COUNT, typename T, typename Group>
__device__ __forceinline__ void forward_rows(const T* gate_up, T* y, int64_t row, int64_t width, int64_t column) {
    Group gate[COUNT], up[COUNT];
#pragma unroll
    for (int r = 0; r < COUNT; ++r) {
        const T* from = gate_up + (row + r * LANES) * 2 * width + column;
        gate[r] = load_as<Group>(from);
        up[r] = load_as<Group>(from + width);
    }
#pragma unroll
    for (int r = 0; r < COUNT; ++r) {
#pragma unroll
        for (int i = 0; i < Group::size; ++i) {
            gate[r].element[i] = gated(gate[r].element[i], up[r].element[i]);
        }
        store(y + (row + r * LANES) * width + column, gate[r]);
    }
}

// AGAIN writes what the forward pass wrote as well; `y` may be the memory of `dy`.
template <int COUNT, bool AGAIN, typename T, typename Group>
__device__ __forceinline__ void backward_rows(const T* dy, const T* gate_up, T* gradient, T* y, int64_t row, int64_t width,
                                              int64_t column) {
    Group slope[COUNT], gate[COUNT], up[COUNT];
#pragma unroll
    for (int r = 0; r < COUNT; ++r) {
        const T* from = gate_up + (row + r * LANES) * 2 * width + column;
        slope[r] = load_as<Group>(dy + (row + r * LANES) * width + column);
        gate[r] = load_as<Group>(from);
        up[r] = load_as<Group>(from + width);
    }
#pragma unroll
    for (int r = 0; r < COUNT; ++r) {
#pragma unroll
        for (int i = 0; i < Group::size; ++i) {
            const float x = widen(gate[r].element[i]), d = widen(slope[r].element[i]), s = times_sigmoid<T>(1.0f, x);
            if constexpr (AGAIN) slope[r].element[i] = gated(gate[r].element[i], up[r].element[i]);
            gate[r].element[i] = narrow<T>(d * widen(up[r].element[i]) * s * (1.0f + x * (1.0f - s)));
            up[r].element[i] = narrow<T>(d * x * s);
        }
        T* to = gradient + (row + r * LANES) * 2 * width + column;
        store(to, gate[r]);
        store(to + width, up[r]);
        if constexpr (AGAIN) store(y + (row + r * LANES) * width + column, slope[r]);
    }
}

// Call `some` for all whole tiles of ROWS rows that are this thread's, and `one` for each row of the last, ragged one.
template <typename Some, typename One>
__device__ __forceinline__ void for_rows(int64_t rows, Some some, One one) {
    const int64_t tile = LANES * ROWS, step = gridDim.y * tile;
    for (int64_t row = blockIdx.y * tile + threadIdx.y; row < rows; row += step) {
        if (row + (ROWS - 1) * LANES < rows) {
            some(row);
        } else {
#pragma unroll 1
            for (int64_t last = row; last < rows; last += LANES) one(last);
        }
    }
}

template <typename T, typename Group>
__global__ void __launch_bounds__(COLUMNS * LANES) forward(const T* gate_up, T* y, int64_t rows, int64_t width) {
    const int64_t column = (static_cast<int64_t>(blockIdx.x) * COLUMNS + threadIdx.x) * Group::size;
    if (column >= width) return;
    for_rows(
        rows, [&](int64_t row) { forward_rows<ROWS, T, Group>(gate_up, y, row, width, column); },
        [&](int64_t row) { forward_rows<1, T, Group>(gate_up, y, row, width, column); });
}

template <bool AGAIN, typename T, typename Group>
__global__ void __launch_bounds__(COLUMNS * LANES)
    backward(const T* dy, const T* gate_up, T* gradient, T* y, int64_t rows, int64_t width) {
    const int64_t column = (static_cast<int64_t>(blockIdx.x) * COLUMNS + threadIdx.x) * Group::size;
    if (column >= width) return;
    // Divisions in fp32 are calls, over which the registers of several rows would be too many.
    constexpr int AT_ONCE = AGAIN && sizeof(T) == 4 ? 1 : ROWS;
    for_rows(
        rows,
        [&](int64_t row) {
#pragma unroll
            for (int r = 0; r < ROWS; r += AT_ONCE)
                backward_rows<AT_ONCE, AGAIN, T, Group>(dy, gate_up, gradient, y, row + r * LANES, width, column);
        },
        [&](int64_t row) { backward_rows<1, AGAIN, T, Group>(dy, gate_up, gradient, y, row, width, column); });
}

dim3 grid(int64_t rows, int64_t width, int group) {
    const int64_t columns = divide_up(width, COLUMNS * group), tiles = divide_up(rows, LANES * ROWS);
    return dim3(static_cast<unsigned>(columns), static_cast<unsigned>(tiles < 65535 ? tiles : 65535));
}

}  // namespace

// gate_up [rows, 2 width], y [rows, width].
extern "C" int ttl_swiglu_forward(const void* gate_up, void* y, int64_t rows, int64_t width, int64_t dtype, void* stream) {
    return with_dtype(dtype, [&](auto zero) {
        using T = decltype(zero);
        const auto* from = static_cast<const T*>(gate_up);
        auto* to = static_cast<T*>(y);
        const bool vectors = width % Vector<T>::size == 0 && aligned(from) && aligned(to);
        const dim3 blocks = grid(rows, width, vectors ? Vector<T>::size : 1);
        return launch(vectors ? forward<T, Vector<T>> : forward<T, Single<T>>, blocks, dim3(COLUMNS, LANES), 0, stream, from,
                      to, rows, width);
    });
}

// dy [rows, width], gate_up and gradient [rows, 2 width]; y [rows, width] or null: also what forward makes of gate_up, bit
// for bit, in memory of its own or in dy's.
extern "C" int ttl_swiglu_backward(const void* dy, const void* gate_up, void* gradient, void* y, int64_t rows, int64_t width,
                                   int64_t dtype, void* stream) {
    return with_dtype(dtype, [&](auto zero) {
        using T = decltype(zero);
        const auto *slope = static_cast<const T*>(dy), *from = static_cast<const T*>(gate_up);
        auto *to = static_cast<T*>(gradient), *again = static_cast<T*>(y);
        const bool vectors =
            width % Vector<T>::size == 0 && aligned(slope) && aligned(from) && aligned(to) && aligned(again);
        const dim3 blocks = grid(rows, width, vectors ? Vector<T>::size : 1);
        const auto plain = vectors ? backward<false, T, Vector<T>> : backward<false, T, Single<T>>;
        const auto writing = vectors ? backward<true, T, Vector<T>> : backward<true, T, Single<T>>;
        return launch(again ? writing : plain, blocks, dim3(COLUMNS, LANES), 0, stream, slope, from, to, again, rows, width);
    });
}

// RMSNorm: y = x / sqrt(mean(x^2) + eps) * weight, alone and after a residual addition; statistics in fp32.
//
// One warp takes a row and keeps it in registers; a row is read once.
#include "common.cuh"

namespace {

using namespace ttl;

// Rows of `width` elements, any width: no vectors, the row is read twice.
template <typename T>
__global__ void forward_any_width(const T* __restrict__ x, const T* __restrict__ weight, T* __restrict__ y,
                                  float* __restrict__ rstd, int64_t rows, int64_t width, float eps) {
    const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
    if (row >= rows) return;
    const T* from = x + row * width;
    float squares = 0.0f;
    for (int64_t i = threadIdx.x; i < width; i += WARP) {
        const float value = widen(from[i]);
        squares += value * value;
    }
    const float scale = rsqrtf(warp_sum(squares) / static_cast<float>(width) + eps);
    for (int64_t i = threadIdx.x; i < width; i += WARP)
        y[row * width + i] = narrow<T>(widen(from[i]) * scale * widen(weight[i]));
    if (threadIdx.x == 0) rstd[row] = scale;
}

}  // namespace

// x, y [rows, width], weight [width], rstd [rows] fp32.
extern "C" int ttl_rms_norm_forward(const void* x, const void* weight, void* y, float* rstd, int64_t rows, int64_t width,
                                    float eps, int64_t dtype, void* stream) {
    return with_dtype(dtype, [&](auto zero) {
        using T = decltype(zero);
        const dim3 block(WARP, 4);
        return launch(forward_any_width<T>, dim3(static_cast<unsigned>(divide_up(rows, block.y))), block, 0, stream,
                      static_cast<const T*>(x), static_cast<const T*>(weight), static_cast<T*>(y), rstd, rows, width, eps);
    });
}

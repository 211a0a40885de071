// Rotary position embedding on a packed projection, half-rotation form: channel i turns together with channel i + d/2.
//
// Forward turns queries and keys where they lie; backward gathers three gradients of any strides into one packed one and
// turns them back on the way. A thread takes the same channels of a few heads of one position: cosine and sine are read
// once for all of them.
#include "common.cuh"

#include <algorithm>
#include <type_traits>

namespace {

using namespace ttl;

constexpr int THREADS = 256, HEADS = 4;  // of a block, of a thread

// Heads of one kind: strides in elements; the channels of a head lie side by side.
template <typename T>
struct Heads {
    T* place;
    int64_t batch, head, position;
};

template <typename T>
struct QueryKeyValue {
    Heads<T> query, key, value;
};

struct Sizes {
    int64_t batches, length;
    int64_t table_batch;  // elements of the tables from one sample to the next; 0 if all samples share them
    int query_heads, kv_heads;
    int heads;  // how many are read and written, from the first query on
    int half;   // of the channels of a head
};

Sizes make_sizes(int64_t batches, int64_t length, int64_t table_batch, int64_t query_heads, int64_t kv_heads, int64_t heads,
                 int64_t channels) {
    return {batches, length, table_batch, static_cast<int>(query_heads), static_cast<int>(kv_heads),
            static_cast<int>(heads), static_cast<int>(channels / 2)};
}

template <typename T>
__device__ __forceinline__ T* find(const QueryKeyValue<T>& all, const Sizes& sizes, int64_t batch, int head,
                                   int64_t position) {
    const int keys = sizes.query_heads, values = keys + sizes.kv_heads;
    const Heads<T>& kind = head < keys ? all.query : head < values ? all.key : all.value;
    return kind.place + batch * kind.batch + (head - (head < keys ? 0 : head < values ? keys : values)) * kind.head +
           position * kind.position;
}

template <int count>
__device__ __forceinline__ void load_angles(const float* place, float (&angles)[count]) {
    if constexpr (count == 1) {
        angles[0] = *place;
    } else {
#pragma unroll
        for (int i = 0; i < count; i += Vector<float>::size) {
            const Vector<float> four = load(place + i);
#pragma unroll
            for (int j = 0; j < Vector<float>::size; ++j) angles[i + j] = four.element[j];
        }
    }
}

// `from` and `to` may be the same memory: every element is read and written by one thread, and read before.
template <typename T, typename Group>
__global__ void __launch_bounds__(THREADS, 3)
    turn(const QueryKeyValue<const T> from, const QueryKeyValue<T> to, const float* __restrict__ cos_table,
         const float* __restrict__ sin_table, const Sizes sizes, float direction) {
    const int64_t position = static_cast<int64_t>(blockIdx.x) * blockDim.z + threadIdx.z;
    if (position >= sizes.length) return;
    const int turned = sizes.query_heads + sizes.kv_heads, step = static_cast<int>(blockDim.y);
    for (int64_t batch = blockIdx.y; batch < sizes.batches; batch += gridDim.y)
        for (int channel = threadIdx.x * Group::size; channel < sizes.half; channel += blockDim.x * Group::size) {
            float cos[Group::size], sin[Group::size];
            const int64_t angle = batch * sizes.table_batch + position * sizes.half + channel;
            load_angles(cos_table + angle, cos);
            load_angles(sin_table + angle, sin);
            for (int begin = threadIdx.y; begin < sizes.heads; begin += HEADS * step) {
                Group first[HEADS], second[HEADS];
#pragma unroll
                for (int h = 0; h < HEADS; ++h) {
                    const int head = begin + h * step < sizes.heads ? begin + h * step : begin;
                    const T* place = find(from, sizes, batch, head, position) + channel;
                    first[h] = load_as<Group>(place);
                    second[h] = load_as<Group>(place + sizes.half);
                }
#pragma unroll
                for (int h = 0; h < HEADS; ++h) {
                    const int head = begin + h * step;
                    if (head >= sizes.heads) break;
                    if (head < turned) {
#pragma unroll
                        for (int i = 0; i < Group::size; ++i) {
                            const float a = widen(first[h].element[i]), b = widen(second[h].element[i]);
                            const float s = direction * sin[i];
                            first[h].element[i] = narrow<T>(a * cos[i] - b * s);
                            second[h].element[i] = narrow<T>(b * cos[i] + a * s);
                        }
                    }
                    T* place = find(to, sizes, batch, head, position) + channel;
                    store(place, first[h]);
                    store(place + sizes.half, second[h]);
                }
            }
        }
}

// The three kinds of heads in one packed projection [batches, length, heads of all kinds, channels].
template <typename T>
QueryKeyValue<T> packed_heads(T* place, const Sizes& sizes) {
    const int64_t channels = 2 * sizes.half, all = sizes.query_heads + 2 * sizes.kv_heads;
    const int64_t batch = sizes.length * all * channels, position = all * channels;
    T *keys = place + sizes.query_heads * channels, *values = keys + sizes.kv_heads * channels;
    return {{place, batch, channels, position}, {keys, batch, channels, position}, {values, batch, channels, position}};
}

// One kind alone, [batches, length, heads, channels].
template <typename T>
Heads<T> heads_alone(void* place, int64_t heads, const Sizes& sizes) {
    const int64_t channels = 2 * sizes.half;
    return {static_cast<T*>(place), sizes.length * heads * channels, channels, heads * channels};
}

template <typename T>
bool by_vectors(const Heads<T>& heads) {
    constexpr int64_t size = Vector<std::remove_const_t<T>>::size;
    return aligned(heads.place) && heads.batch % size == 0 && heads.head % size == 0 && heads.position % size == 0;
}

template <typename T>
bool by_vectors(const QueryKeyValue<T>& all) {
    return by_vectors(all.query) && by_vectors(all.key) && by_vectors(all.value);
}

template <typename T>
cudaError_t launch_turn(const QueryKeyValue<const T>& from, const QueryKeyValue<T>& to, const float* cos, const float* sin,
                        const Sizes& sizes, float direction, void* stream) {
    if (sizes.batches == 0 || sizes.length == 0 || sizes.heads == 0 || sizes.half == 0) return cudaSuccess;
    const bool vectors = sizes.half % Vector<T>::size == 0 && by_vectors(from) && by_vectors(to) && aligned(cos) &&
                         aligned(sin) && sizes.table_batch % Vector<float>::size == 0;
    // A block: channels of half a head, heads (all of them if they are not many), positions (at most 64 by CUDA's limit).
    const int64_t x = std::min<int64_t>(sizes.half / (vectors ? Vector<T>::size : 1), WARP);
    const int64_t y = std::min<int64_t>(divide_up(sizes.heads, HEADS), THREADS / x);
    const int64_t z = std::min<int64_t>({THREADS / (x * y), 64, sizes.length});
    const dim3 block(static_cast<unsigned>(x), static_cast<unsigned>(y), static_cast<unsigned>(z));
    const dim3 grid(static_cast<unsigned>(divide_up(sizes.length, z)),
                    static_cast<unsigned>(std::min<int64_t>(sizes.batches, 65535)));
    return launch(vectors ? turn<T, Vector<T>> : turn<T, Single<T>>, grid, block, 0, stream, from, to, cos, sin, sizes,
                  direction);
}

}  // namespace

// packed [batches, length, query_heads + 2 kv_heads, channels]; cos, sin [length, channels / 2] fp32, or a table a sample.
extern "C" int ttl_rotary_in_place(void* packed, const float* cos, const float* sin, int64_t table_batch, int64_t batches,
                                   int64_t length, int64_t query_heads, int64_t kv_heads, int64_t channels, int64_t dtype,
                                   void* stream) {
    const int64_t heads = query_heads + kv_heads;
    const Sizes sizes = make_sizes(batches, length, table_batch, query_heads, kv_heads, heads, channels);
    return with_dtype(dtype, [&](auto zero) {
        using T = decltype(zero);
        auto* place = static_cast<T*>(packed);
        const auto from = packed_heads<const T>(place, sizes);
        return launch_turn<T>(from, packed_heads(place, sizes), cos, sin, sizes, 1.0f, stream);
    });
}

// The same into memory of its own: query [batches, length, query_heads, channels], key and value with kv_heads.
extern "C" int ttl_rotary_apart(const void* packed, void* query, void* key, void* value, const float* cos, const float* sin,
                                int64_t table_batch, int64_t batches, int64_t length, int64_t query_heads, int64_t kv_heads,
                                int64_t channels, int64_t dtype, void* stream) {
    const int64_t heads = query_heads + 2 * kv_heads;
    const Sizes sizes = make_sizes(batches, length, table_batch, query_heads, kv_heads, heads, channels);
    return with_dtype(dtype, [&](auto zero) {
        using T = decltype(zero);
        const QueryKeyValue<T> to = {heads_alone<T>(query, query_heads, sizes), heads_alone<T>(key, kv_heads, sizes),
                                     heads_alone<T>(value, kv_heads, sizes)};
        return launch_turn<T>(packed_heads(static_cast<const T*>(packed), sizes), to, cos, sin, sizes, 1.0f, stream);
    });
}

// Gradients of query, key and value by strides of batch, head and position, in elements; gradient is packed.
extern "C" int ttl_rotary_backward(const void* dquery, int64_t q_batch, int64_t q_head, int64_t q_position, const void* dkey,
                                   int64_t k_batch, int64_t k_head, int64_t k_position, const void* dvalue, int64_t v_batch,
                                   int64_t v_head, int64_t v_position, void* gradient, const float* cos, const float* sin,
                                   int64_t table_batch, int64_t batches, int64_t length, int64_t query_heads,
                                   int64_t kv_heads, int64_t channels, int64_t dtype, void* stream) {
    const int64_t heads = query_heads + 2 * kv_heads;
    const Sizes sizes = make_sizes(batches, length, table_batch, query_heads, kv_heads, heads, channels);
    return with_dtype(dtype, [&](auto zero) {
        using T = decltype(zero);
        const QueryKeyValue<const T> from = {{static_cast<const T*>(dquery), q_batch, q_head, q_position},
                                             {static_cast<const T*>(dkey), k_batch, k_head, k_position},
                                             {static_cast<const T*>(dvalue), v_batch, v_head, v_position}};
        return launch_turn<T>(from, packed_heads(static_cast<T*>(gradient), sizes), cos, sin, sizes, -1.0f, stream);
    });
}

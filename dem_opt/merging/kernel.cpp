// The merge kernel's pass over memory:  out_i = cast( round( sum_n weight_n scale_n[row of i] values_n[i] ) ) .
//
// kernel.py compiles it with floating-point contraction off: every product and every sum is rounded to float32 on its
// own, in the order of the terms, so a value's bits depend on nothing but its terms.  Each stored value is read once
// and each result written once, past the caches where the processor can do that.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <exception>
#include <thread>
#include <type_traits>
#include <vector>
#ifdef __SSE2__
#include <emmintrin.h>
#endif

struct Term {
    const void* values;
    const float* scale;  // of each row; null where values stand for themselves
    int64_t type;        // one of the four below
    float weight;
};

namespace {

enum { FLOAT32, BFLOAT16, INT8, FLOAT16 };

struct BFloat16 {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};

constexpr int64_t STRIP = 16;       // elements that are summed in registers
constexpr int64_t CHUNK = 1024;     // elements whose sums stay in the first cache
constexpr int64_t TILE = 1 << 20;   // elements that a thread takes at once
constexpr int MOST = 8;             // terms that are read side by side

uint32_t bits_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

float float_of(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

float widen(float value) { return value; }
float widen(int8_t value) { return value; }
float widen(BFloat16 value) { return float_of(uint32_t(value.bits) << 16); }

// Exponent and fraction are moved to their places, and 112 added to the exponent.  Of the smallest numbers, which have
// none, the fraction is set behind 0.5, whose last place is theirs, and 0.5 taken away.
float widen(Float16 value) {
    const uint32_t bits = value.bits & 0x7fff, sign = uint32_t(value.bits & 0x8000) << 16;
    const uint32_t small = bits_of(float_of(0x3f000000 + bits) - 0.5f), normal = (bits << 13) + 0x38000000;
    const uint32_t finite = bits < 0x0400 ? small : normal;
    return float_of(sign | (bits < 0x7c00 ? finite : bits << 13 | 0x7f800000));
}

// To the nearest, ties to even.
template <class X>
X narrow(float value);

template <>
BFloat16 narrow(float value) {
    const uint32_t bits = bits_of(value), rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return {uint16_t((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded)};
}

// Below 2^-14 a sum with 0.5 rounds to multiples of the smallest float16; from 65520 on what is finite is infinite.
template <>
Float16 narrow(float value) {
    const uint32_t bits = bits_of(value), magnitude = bits & 0x7fffffff;
    const uint32_t normal = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
    const uint32_t small = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000;
    const uint32_t finite = magnitude < 0x38800000 ? small : normal;
    const uint32_t large = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;
    return {uint16_t((bits >> 16 & 0x8000) | (magnitude < 0x477ff000 ? finite : large))};
}

// Past the caches, which then need not read what is overwritten; `out` is a multiple of 16 bytes.
template <class X>
void store(X* out, const X* strip) {
#ifdef __SSE2__
    constexpr int64_t PART = 16 / sizeof(X);
    for (int64_t i = 0; i < STRIP; i += PART)
        _mm_stream_si128(reinterpret_cast<__m128i*>(out + i), _mm_loadu_si128(reinterpret_cast<const __m128i*>(strip + i)));
#else
    std::copy(strip, strip + STRIP, out);
#endif
}

// What becomes of a sum: rounded to the stored dtype, then cast to the live one.  SHORT where one of them is float16.
struct Float {
    using Live = float;
    static constexpr bool SHORT = false;
    static float of(float sum) { return sum; }
};
template <class Stored>
struct RoundedFloat {
    using Live = float;
    static constexpr bool SHORT = std::is_same<Stored, Float16>::value;
    static float of(float sum) { return widen(narrow<Stored>(sum)); }
};
template <class X>
struct Narrow {
    using Live = X;
    static constexpr bool SHORT = std::is_same<X, Float16>::value;
    static X of(float sum) { return narrow<X>(sum); }
};

// out_i = Out( sum(i) )  for start <= i < end, in strips where `out` allows it.
template <class Out, class Sum>
void write(typename Out::Live* out, int64_t start, int64_t end, Sum sum) {
    for (; start < end && (reinterpret_cast<uintptr_t>(out + start) & 15); start++) out[start] = Out::of(sum(start));
    for (; start + STRIP <= end; start += STRIP) {
        typename Out::Live strip[STRIP];
        for (int64_t i = 0; i < STRIP; i++) strip[i] = Out::of(sum(start + i));
        store(out + start, strip);
    }
    for (; start < end; start++) out[start] = Out::of(sum(start));
}

// weight_0 x_0 + weight_1 x_1 + ...  of each element for N terms of one type, from the left.
template <class X, class Out, int N>
void sum(const Term* terms, void* out, int64_t start, int64_t end) {
    const X* values[N];
    float weight[N];
    for (int n = 0; n < N; n++) values[n] = static_cast<const X*>(terms[n].values), weight[n] = terms[n].weight;
    write<Out>(static_cast<typename Out::Live*>(out), start, end, [&](int64_t i) {
        float sum = weight[0] * widen(values[0][i]);
        for (int n = 1; n < N; n++) sum += weight[n] * widen(values[n][i]);
        return sum;
    });
}

// The same for as many terms as there are, at most MOST.
template <class X, class Out, int N = 1>
void sum_alike(const Term* terms, int64_t count, void* out, int64_t start, int64_t end) {
    if constexpr (N < MOST)
        if (count > N) return sum_alike<X, Out, N + 1>(terms, count, out, start, end);
    sum<X, Out, N>(terms, out, start, end);
}

// sums_i += weight_n values_n[i]  for N terms of one type.
template <class X, int N>
void add(float* __restrict sums, const Term* terms, const float* weights, int64_t start, int64_t size) {
    const X* values[N];
    float weight[N];
    for (int n = 0; n < N; n++) values[n] = static_cast<const X*>(terms[n].values) + start, weight[n] = weights[n];
    for (int64_t i = 0; i < size; i++) {
        float sum = sums[i];
        for (int n = 0; n < N; n++) sum += weight[n] * widen(values[n][i]);
        sums[i] = sum;
    }
}

template <class X>
void add_alike(float* sums, const Term* terms, const float* weights, int64_t count, int64_t start, int64_t size) {
    int64_t n = 0;
    for (; n + 4 <= count; n += 4) add<X, 4>(sums, terms + n, weights + n, start, size);
    for (; n < count; n++) add<X, 1>(sums, terms + n, weights + n, start, size);
}

struct Merge {
    const Term* terms;
    int64_t count;
    void* out;
    int64_t rounded, live, size;
    const int64_t* rows;  // where each row begins
    int64_t count_rows;

    // Row by row, with  weight_n scale_n[row]  for a weight.
    void add_scaled(float* sums, int64_t first, int64_t last, int64_t start, int64_t size, float* weights) const {
        int64_t row = std::upper_bound(rows, rows + count_rows, start) - rows - 1;
        for (int64_t done = 0, end; done < size; done = end, row++) {
            end = row + 1 < count_rows ? std::min(rows[row + 1] - start, size) : size;
            for (int64_t n = first; n < last; n++) weights[n] = terms[n].weight * terms[n].scale[row];
            add_alike<int8_t>(sums + done, terms + first, weights + first, last - first, start + done, end - done);
        }
    }

    // All terms of a chunk, whatever their types.
    void add_chunk(float* sums, int64_t start, int64_t size, float* weights) const {
        std::fill(sums, sums + size, -0.0f);  // what leaves every first summand as it is, zeros too
        for (int64_t first = 0, last; first < count; first = last) {
            const Term* alike = terms + first;
            for (last = first + 1; last < count && terms[last].type == alike->type;) last++;
            for (int64_t n = first; n < last; n++) weights[n] = terms[n].weight;
            if (alike->type == INT8) add_scaled(sums, first, last, start, size, weights);
            if (alike->type == FLOAT32) add_alike<float>(sums, alike, weights + first, last - first, start, size);
            if (alike->type == BFLOAT16) add_alike<BFloat16>(sums, alike, weights + first, last - first, start, size);
            if (alike->type == FLOAT16) add_alike<Float16>(sums, alike, weights + first, last - first, start, size);
        }
    }

    template <class Out>
    void tile(int64_t start, int64_t end, float* weights) const {
        const auto same = [this](const Term& term) { return term.type == terms->type; };
        const bool alike = count <= MOST && std::all_of(terms, terms + count, same);
        if constexpr (!Out::SHORT) {  // for float16 too it would take twice as long to compile
            if (alike && terms->type == FLOAT32) return sum_alike<float, Out>(terms, count, out, start, end);
            if (alike && terms->type == BFLOAT16) return sum_alike<BFloat16, Out>(terms, count, out, start, end);
        }
        for (int64_t size; start < end; start += size) {
            alignas(64) float sums[CHUNK];
            size = std::min(CHUNK, end - start);
            add_chunk(sums, start, size, weights);
            typename Out::Live live[CHUNK];
            for (int64_t i = 0; i < size; i++) live[i] = Out::of(sums[i]);
            std::copy(live, live + size, static_cast<typename Out::Live*>(out) + start);
        }
    }

    void tile(int64_t start, float* weights) const {
        const int64_t end = std::min(start + TILE, size);
        if (live == BFLOAT16) return tile<Narrow<BFloat16>>(start, end, weights);
        if (live == FLOAT16) return tile<Narrow<Float16>>(start, end, weights);
        if (rounded == BFLOAT16) return tile<RoundedFloat<BFloat16>>(start, end, weights);
        if (rounded == FLOAT16) return tile<RoundedFloat<Float16>>(start, end, weights);
        tile<Float>(start, end, weights);
    }
};

}  // namespace

extern "C" void dem_merge(const Term* terms, int64_t count, void* out, int64_t rounded, int64_t live, int64_t size,
                          const int64_t* rows, int64_t count_rows, int64_t threads) {
    const Merge merge{terms, count, out, rounded, live, size, rows, count_rows};
    std::atomic<int64_t> next{0};
    const auto work = [&] {
        std::vector<float> weights(count);
        for (int64_t start; (start = next.fetch_add(TILE)) < size;) merge.tile(start, weights.data());
#ifdef __SSE2__
        _mm_sfence();
#endif
    };
    std::vector<std::thread> others;
    try {
        for (int64_t n = 1; n < std::min(threads, (size + TILE - 1) / TILE); n++) others.emplace_back(work);
    } catch (const std::exception&) {
        // Fewer threads do the same work.
    }
    work();
    for (auto& other : others) other.join();
}

// The merge kernel, one pass over memory:  out_i = cast( round( sum_n weight_n scale_n[row of i] values_n[i] ) ) .
//
// Runs of neighbouring elements have terms of their own, over the same flat arrays.
//
// compiled.py compiles it with -ffp-contract=off: every product and every sum is rounded to float32 on its own, in the
// order of the terms, so that a value's bits depend only on its terms, and not on its position or on threads.  Each
// stored value is read once and each result written once, with non-temporal stores where the processor has them.

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
    const float* scale;  // of each row, for int8; else null
    int64_t type;        // FLOAT32 ... FLOAT16 below
    float weight;
};

struct Run {
    int64_t end;           // the run begins where the one before it ends
    int64_t first, count;  // its terms; none: the elements are left as they are
};

namespace {

enum { FLOAT32, BFLOAT16, INT8, FLOAT16 };

struct BFloat16 {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};

constexpr int64_t STRIP = 16;       // elements summed in registers
constexpr int64_t CHUNK = 1024;     // elements whose float32 sums (4 kB) stay in the L1 cache
constexpr int64_t TILE = 1 << 20;   // elements that a thread takes at once
constexpr int MOST = 8;             // most terms summed in registers; more are summed chunk by chunk

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

// float16 has 5 exponent bits with bias 15, float32 has 8 with bias 127.  Normal numbers: shift exponent and fraction
// by 13 bits and add 127 - 15 = 112 (0x38000000 is 112 << 23).  Subnormal numbers are multiples of 2^-24, which is the
// last place of 0.5 (0x3f000000): put the fraction there, then subtract 0.5, which is exact.  Infinity and NaN keep
// their fraction under the largest exponent.
float widen(Float16 value) {
    const uint32_t bits = value.bits & 0x7fff, sign = uint32_t(value.bits & 0x8000) << 16;
    const uint32_t small = bits_of(float_of(0x3f000000 + bits) - 0.5f), normal = (bits << 13) + 0x38000000;
    const uint32_t finite = bits < 0x0400 ? small : normal;
    return float_of(sign | (bits < 0x7c00 ? finite : bits << 13 | 0x7f800000));
}

// Round to the nearest, ties to even.
template <class X>
X narrow(float value);

// bfloat16 is the upper half of a float32: add just less than half of its last place, and one more if that place is
// odd.  NaN, whose fraction the addition could carry away, becomes the quiet one.
template <>
BFloat16 narrow(float value) {
    const uint32_t bits = bits_of(value), rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return {uint16_t((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded)};
}

// The inverse of the widening.  Normal: take 112 from the exponent and round off 13 bits as above.  Below 2^-14
// (0x38800000) adding 0.5 rounds to multiples of 2^-24, float16's smallest.  From 65520 (0x477ff000), halfway between
// the largest finite number 65504 and 2^16, results are infinite; NaN becomes the quiet one.
template <>
Float16 narrow(float value) {
    const uint32_t bits = bits_of(value), magnitude = bits & 0x7fffffff;
    const uint32_t normal = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
    const uint32_t small = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000;
    const uint32_t finite = magnitude < 0x38800000 ? small : normal;
    const uint32_t large = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;
    return {uint16_t((bits >> 16 & 0x8000) | (magnitude < 0x477ff000 ? finite : large))};
}

// Stochastic rounding, as in dither.py: a float32 sum becomes one of the two values of the stored dtype beside it, above
// with the probability of the sum's place between them; the threshold is a hash of the element's state.
uint32_t mix(uint32_t state) {
    state = (state ^ state >> 16) * 0x21f0aaad;
    state = (state ^ state >> 15) * 0x735a2d97;
    return state ^ state >> 15;
}

template <class X>
float dithered(float value, uint32_t threshold);

// Add as many random bits as are cut off; infinity has none that could carry.
template <>
float dithered<BFloat16>(float value, uint32_t threshold) {
    const uint32_t bits = bits_of(value), rounded = (bits + (threshold >> 16)) & 0xffff0000;
    return (bits & 0x7fffffff) > 0x7f800000 ? value : float_of(rounded);
}

// Below 2^-14 (0x38800000) results are multiples of 2^-24.
template <>
float dithered<Float16>(float value, uint32_t threshold) {
    const uint32_t bits = bits_of(value), magnitude = bits & 0x7fffffff, random = threshold >> 19;
    const float multiples = float_of(magnitude) * 0x1p24f + float(int32_t(random)) * 0x1p-13f;
    const bool is_small = magnitude < 0x38800000;
    const uint32_t small = bits_of(float(int32_t(is_small ? multiples : 0.0f)) * 0x1p-24f);
    const uint32_t rounded = is_small ? small : (magnitude + random) & ~0x1fffu;
    return magnitude > 0x7f800000 ? value : float_of((bits & 0x80000000) | rounded);
}

// Store 16 elements around the caches, which then need not read the lines that are overwritten (no write-allocate);
// `out` must be aligned to 16 bytes.
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

// Outputs: a float32 sum is rounded to the stored dtype, then cast to the live one.  SHORT if one of them is float16.
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

// out_i = Out( sum(i) )  for start <= i < end: single elements up to an aligned address, strips, then a tail.
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

// weight_0 x_0 + weight_1 x_1 + ...  from the left, for N terms of one type.  N is a template parameter so that the
// compiler unrolls the inner loop and vectorizes over elements; the order of sums is the same either way.
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

// Choose the instance for a number of terms of at most MOST.
template <class X, class Out, int N = 1>
void sum_alike(const Term* terms, int64_t count, void* out, int64_t start, int64_t end) {
    if constexpr (N < MOST)
        if (count > N) return sum_alike<X, Out, N + 1>(terms, count, out, start, end);
    sum<X, Out, N>(terms, out, start, end);
}

// sums_i += weight_n values_n[i]  for N terms of one type, in their order.
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

// The states of elements for stochastic rounding: an element's index plus the shift of the stretch that it lies in.
struct Dither {
    const int64_t* starts;  // first element of each stretch, ascending; null where sums go to the nearest value
    const int64_t* shifts;  // of each stretch, modulo 2^32
    int64_t count;

    template <class X>
    void apply(float* sums, int64_t start, int64_t size) const {
        int64_t stretch = std::upper_bound(starts, starts + count, start) - starts - 1;
        for (int64_t done = 0, end; done < size; done = end, stretch++) {
            end = stretch + 1 < count ? std::min(starts[stretch + 1] - start, size) : size;
            const uint32_t state = uint32_t(start) + uint32_t(shifts[stretch]);
            for (int64_t i = done; i < end; i++) sums[i] = dithered<X>(sums[i], mix(state + uint32_t(i)));
        }
    }
};

struct Merge {
    const Term* terms;
    int64_t count;
    void* out;
    int64_t rounded, live;
    const int64_t* rows;  // first element of each row of int8 terms, ascending; all int8 terms share it
    int64_t count_rows;
    Dither dither;

    // Add int8 terms row by row, with weight_n scale_n[row] rounded to float32 as their weight.
    void add_scaled(float* sums, int64_t first, int64_t last, int64_t start, int64_t size, float* weights) const {
        int64_t row = std::upper_bound(rows, rows + count_rows, start) - rows - 1;
        for (int64_t done = 0, end; done < size; done = end, row++) {
            end = row + 1 < count_rows ? std::min(rows[row + 1] - start, size) : size;
            for (int64_t n = first; n < last; n++) weights[n] = terms[n].weight * terms[n].scale[row];
            add_alike<int8_t>(sums + done, terms + first, weights + first, last - first, start + done, end - done);
        }
    }

    // Sum a chunk of terms of any types: runs of terms of one type at a time, in the order of the terms.
    void add_chunk(float* sums, int64_t start, int64_t size, float* weights) const {
        std::fill(sums, sums + size, -0.0f);  // the neutral element: -0 + x is x for every x, x = +0 and -0 included
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
        const bool alike = count <= MOST && !dither.starts && std::all_of(terms, terms + count, same);
        if constexpr (!Out::SHORT) {  // instances for float16 too would double the time to compile
            if (alike && terms->type == FLOAT32) return sum_alike<float, Out>(terms, count, out, start, end);
            if (alike && terms->type == BFLOAT16) return sum_alike<BFloat16, Out>(terms, count, out, start, end);
        }
        for (int64_t size; start < end; start += size) {
            alignas(64) float sums[CHUNK];
            size = std::min(CHUNK, end - start);
            add_chunk(sums, start, size, weights);
            if (dither.starts && rounded == BFLOAT16) dither.apply<BFloat16>(sums, start, size);
            if (dither.starts && rounded == FLOAT16) dither.apply<Float16>(sums, start, size);
            typename Out::Live live[CHUNK];
            for (int64_t i = 0; i < size; i++) live[i] = Out::of(sums[i]);
            std::copy(live, live + size, static_cast<typename Out::Live*>(out) + start);
        }
    }

    void tile_of_dtype(int64_t start, int64_t end, float* weights) const {
        if (live == BFLOAT16) return tile<Narrow<BFloat16>>(start, end, weights);
        if (live == FLOAT16) return tile<Narrow<Float16>>(start, end, weights);
        if (rounded == BFLOAT16) return tile<RoundedFloat<BFloat16>>(start, end, weights);
        if (rounded == FLOAT16) return tile<RoundedFloat<Float16>>(start, end, weights);
        tile<Float>(start, end, weights);
    }
};

}  // namespace

extern "C" void dem_merge(const Term* terms, const Run* runs, int64_t count_runs, void* out, int64_t rounded,
                          int64_t live, const int64_t* rows, int64_t count_rows, const int64_t* starts,
                          const int64_t* shifts, int64_t count_starts, int64_t threads) {
    const Run* last = runs + count_runs;
    const int64_t size = last[-1].end;
    int64_t most = 0;
    for (const Run* run = runs; run < last; run++) most = std::max(most, run->count);
    std::atomic<int64_t> next{0};
    const auto work = [&] {
        std::vector<float> weights(most);
        for (int64_t start; (start = next.fetch_add(TILE)) < size;) {
            const int64_t end = std::min(start + TILE, size);
            const auto ends_before = [](int64_t element, const Run& run) { return element < run.end; };
            for (const Run* run = std::upper_bound(runs, last, start, ends_before); start < end; run++) {
                const int64_t until = std::min(run->end, end);
                const Merge merge{terms + run->first, run->count, out, rounded, live, rows, count_rows,
                                  {starts, shifts, count_starts}};
                if (run->count) merge.tile_of_dtype(start, until, weights.data());
                start = until;
            }
        }
#ifdef __SSE2__
        _mm_sfence();  // non-temporal stores are weakly ordered: make them visible before the thread is joined
#endif
    };
    std::vector<std::thread> others;
    try {
        for (int64_t n = 1; n < std::min(threads, (size + TILE - 1) / TILE); n++) others.emplace_back(work);
    } catch (const std::exception&) {
        // The system has no more threads: fewer do the same work.
    }
    work();
    for (auto& other : others) other.join();
}

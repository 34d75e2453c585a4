// CUDA's built-ins and the wrappers of kernels/gpu/cuda/device.cuh for one CPU thread, by the same names.
//
// A kernel's source, unchanged, stands behind this header; see fibers.h for how its threads run. Copies to shared
// memory are made as late as they may be, when their group is waited for. Dynamic shared memory is full of 0x7F. Masks
// of collectives are all lanes, and shared memory is dynamic only.
#pragma once

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <type_traits>

#include "fibers.h"

#if !defined(__FLT16_MAX__)
#error "float16 arithmetic needs a compiler that has _Float16"
#endif

// CUDA's 64-bit integers are long long; those of Linux are long, another type to overloads and templates
using simt_int64_t = long long;
using simt_uint64_t = unsigned long long;
#define int64_t simt_int64_t
#define uint64_t simt_uint64_t

#define __device__
#define __host__
#define __global__
#define __constant__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))

#define threadIdx (simt::current->index)
#define blockIdx (simt::block_index)
#define gridDim (simt::grid_size)
#define blockDim (simt::block_size)
#define warpSize 32

constexpr unsigned ALL = 0xffffffffu;

struct alignas(8) int2 {
    int x, y;
};
struct alignas(16) int4 {
    int x, y, z, w;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};

inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// as CUDA's overloads: of int and unsigned the int is converted
template <class A, class B>
using simt_common = std::enable_if_t<std::is_arithmetic_v<A> && std::is_arithmetic_v<B>, std::common_type_t<A, B>>;
template <class A, class B>
inline simt_common<A, B> min(A a, B b) {
    using Common = simt_common<A, B>;
    if constexpr (std::is_floating_point_v<Common>) return std::fmin(static_cast<Common>(a), static_cast<Common>(b));
    return std::min(static_cast<Common>(a), static_cast<Common>(b));
}
template <class A, class B>
inline simt_common<A, B> max(A a, B b) {
    using Common = simt_common<A, B>;
    if constexpr (std::is_floating_point_v<Common>) return std::fmax(static_cast<Common>(a), static_cast<Common>(b));
    return std::max(static_cast<Common>(a), static_cast<Common>(b));
}

template <class To, class From>
inline To simt_bits(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll(x) : 64; }

inline unsigned __float_as_uint(float x) { return simt_bits<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return simt_bits<float>(x); }
inline int __float_as_int(float x) { return simt_bits<int>(x); }
inline float __int_as_float(int x) { return simt_bits<float>(x); }
inline float __int2float_rn(int x) { return static_cast<float>(x); }
inline float __uint2float_rn(unsigned x) { return static_cast<float>(x); }
inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fsub_rn(float x, float y) { return x - y; }
inline float __fdiv_rn(float x, float y) { return x / y; }

// collectives: the line is the caller's, by which lanes that diverge are told from each other
inline simt::Meeting simt_meet(const char* operation, int line, unsigned mask, unsigned value = 0, unsigned high = 0) {
    return simt::meet(operation, line, mask, {{value, high}});
}

inline void __syncthreads() { simt::barrier(); }
inline void __syncwarp(unsigned mask = ALL, int line = __builtin_LINE()) { simt_meet("__syncwarp", line, mask); }

inline unsigned __ballot_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
    const simt::Meeting met = simt_meet("__ballot_sync", line, mask, predicate != 0);
    unsigned votes = 0;
    for (int lane = 0; lane < simt::WARP; ++lane) {
        if (met.lanes >> lane & 1) votes |= met.slots[lane].word[0] << lane;
    }
    return votes;
}
inline int __any_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
    return __ballot_sync(mask, predicate, line) != 0;
}
inline int __all_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
    return __ballot_sync(mask, !predicate, line) == 0;
}

template <class Value>
inline Value simt_shuffle(const char* operation, int line, unsigned mask, Value value, int lane) {
    static_assert(sizeof(Value) == 4 || sizeof(Value) == 8);
    simt::Words words{};
    memcpy(words.word, &value, sizeof value);
    const simt::Meeting met = simt::meet(operation, line, mask, words);
    memcpy(&value, met.of(lane).word, sizeof value);
    return value;
}
template <class Value>
inline Value __shfl_sync(unsigned mask, Value value, int lane, int line = __builtin_LINE()) {
    return simt_shuffle("__shfl_sync", line, mask, value, lane & 31);
}
template <class Value>
inline Value __shfl_xor_sync(unsigned mask, Value value, int lane_mask, int line = __builtin_LINE()) {
    return simt_shuffle("__shfl_xor_sync", line, mask, value, (simt::current->lane ^ lane_mask) & 31);
}
template <class Value>
inline Value __shfl_up_sync(unsigned mask, Value value, unsigned delta, int line = __builtin_LINE()) {
    const int lane = simt::current->lane;
    return simt_shuffle("__shfl_up_sync", line, mask, value, delta > unsigned(lane) ? lane : lane - int(delta));
}
template <class Value>
inline Value __shfl_down_sync(unsigned mask, Value value, unsigned delta, int line = __builtin_LINE()) {
    const int lane = simt::current->lane;
    return simt_shuffle("__shfl_down_sync", line, mask, value, delta > unsigned(31 - lane) ? lane : lane + int(delta));
}
template <class Value>
inline Value __reduce_add_sync(unsigned mask, Value value, int line = __builtin_LINE()) {
    static_assert(std::is_same_v<Value, int> || std::is_same_v<Value, unsigned>);
    const simt::Meeting met = simt_meet("__reduce_add_sync", line, mask, static_cast<unsigned>(value));
    unsigned sum = 0;
    for (int lane = 0; lane < simt::WARP; ++lane) {
        if (met.lanes >> lane & 1) sum += met.slots[lane].word[0];
    }
    return static_cast<Value>(sum);
}

// the wrappers of device.cuh

inline uint8_t* dynamic_shared() { return simt::shared_memory; }

inline void simt_check_aligned(const void* address, size_t bytes, const char* operation) {
    if (reinterpret_cast<uintptr_t>(address) % bytes) {
        simt::fail("%s: %p is no multiple of %zu", operation, address, bytes);
    }
}

inline void simt_copy(void* shared_to, const void* global_from, size_t bytes, const char* operation) {
    auto* to = static_cast<uint8_t*>(shared_to);
    simt_check_aligned(to, bytes, operation);
    simt_check_aligned(global_from, bytes, operation);
    if (to < simt::shared_memory || to + bytes > simt::shared_memory + simt::shared_size) {
        simt::fail("%s: byte %td is outside %zu bytes of shared memory", operation, to - simt::shared_memory,
                   simt::shared_size);
    }
    simt::current->copies.push_back({to, static_cast<const uint8_t*>(global_from), bytes});
    ++simt::current->open_copies;
}
inline void async_copy16(void* to, const void* from) { simt_copy(to, from, 16, "async_copy16"); }
inline void async_copy4(void* to, const void* from) { simt_copy(to, from, 4, "async_copy4"); }

inline void async_commit() {
    simt::current->groups.push_back(simt::current->open_copies);
    simt::current->open_copies = 0;
}

template <int N>
inline void async_wait() {
    simt::Thread& thread = *simt::current;
    if (thread.groups.size() <= N) return;
    const size_t finished = thread.groups.size() - N;
    size_t copies = 0;
    for (size_t group = 0; group < finished; ++group) copies += thread.groups[group];
    for (size_t i = 0; i < copies; ++i) memcpy(thread.copies[i].to, thread.copies[i].from, thread.copies[i].bytes);
    thread.groups.erase(thread.groups.begin(), thread.groups.begin() + finished);
    thread.copies.erase(thread.copies.begin(), thread.copies.begin() + copies);
}

template <class Value>
inline Value simt_load(const void* from, const char* operation) {
    simt_check_aligned(from, sizeof(Value), operation);
    Value value;
    memcpy(&value, from, sizeof value);
    return value;
}
inline uint4 load16(const void* from) { return simt_load<uint4>(from, "load16"); }
inline uint2 load8(const void* from) { return simt_load<uint2>(from, "load8"); }
inline uint32_t load4(const void* from) { return simt_load<uint32_t>(from, "load4"); }
inline uint16_t load2(const void* from) { return simt_load<uint16_t>(from, "load2"); }

inline const uint8_t* ahead(const uint8_t* from, uint32_t x, uint32_t y) { return from + uint64_t(x) * y; }

inline float half_to_float(uint16_t bits) { return static_cast<float>(simt_bits<_Float16>(bits)); }

template <bool FLOAT16>
inline float element_to_float(uint16_t bits) {
    return FLOAT16 ? half_to_float(bits) : __uint_as_float(static_cast<uint32_t>(bits) << 16);
}

inline uint16_t simt_to_float16(double value) {  // one rounding, also from double
    return std::isnan(value) ? 0x7FFF : simt_bits<uint16_t>(static_cast<_Float16>(value));
}
inline uint16_t simt_to_bfloat16(float value) {
    const uint32_t bits = __float_as_uint(value);
    return std::isnan(value) ? 0x7FFF : static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

template <bool FLOAT16>
inline uint32_t pack_half(float low, float high) {
    if constexpr (FLOAT16) return simt_to_float16(low) | static_cast<uint32_t>(simt_to_float16(high)) << 16;
    return simt_to_bfloat16(low) | static_cast<uint32_t>(simt_to_bfloat16(high)) << 16;
}

inline uint32_t multiply_half2(uint32_t x, uint32_t y) {
    uint32_t products = 0;
    for (int shift = 0; shift < 32; shift += 16) {
        const float product = half_to_float(x >> shift & 0xFFFF) * half_to_float(y >> shift & 0xFFFF);  // exact
        products |= static_cast<uint32_t>(simt_to_float16(std::fmin(product, 65504.0f))) << shift;
    }
    return products;
}

inline void mma_codes(int (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1,
                      int line = __builtin_LINE()) {
    const simt::Meeting met = simt::meet("mma_codes", line, ALL, {{a0, a1, a2, a3, b0, b1}});
    const int row = simt::current->lane / 4, part = simt::current->lane % 4;
    for (int i = 0; i < 4; ++i) {
        const int column = 2 * part + i % 2;
        for (int k = 0; k < 4; ++k) {
            const simt::Words& a = met.of(row * 4 + k);
            const simt::Words& b = met.of(column * 4 + k);
            for (int half = 0; half < 2; ++half) {
                for (int shift = 0; shift < 32; shift += 8) {
                    d[i] += static_cast<uint8_t>(a.word[2 * half + i / 2] >> shift) *
                            static_cast<int8_t>(b.word[4 + half] >> shift);
                }
            }
        }
    }
}

template <bool FLOAT16>
inline void mma_half(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1,
                     int line = __builtin_LINE()) {
    const char* operation = FLOAT16 ? "mma_half<true>" : "mma_half<false>";
    const simt::Meeting met = simt::meet(operation, line, ALL, {{a0, a1, a2, a3, b0, b1}});
    const int row = simt::current->lane / 4, part = simt::current->lane % 4;
    for (int i = 0; i < 4; ++i) {
        const int column = 2 * part + i % 2;
        double sum = d[i];  // the hardware's order of summation is nobody's business; this is closer to the truth
        for (int k = 0; k < 4; ++k) {
            const simt::Words& a = met.of(row * 4 + k);
            const simt::Words& b = met.of(column * 4 + k);
            for (int half = 0; half < 2; ++half) {
                for (int shift = 0; shift < 32; shift += 16) {
                    sum += double(element_to_float<FLOAT16>(a.word[2 * half + i / 2] >> shift & 0xFFFF)) *
                           double(element_to_float<FLOAT16>(b.word[4 + half] >> shift & 0xFFFF));
                }
            }
        }
        d[i] = static_cast<float>(sum);
    }
}

inline uint32_t transpose8(uint32_t rows, int line = __builtin_LINE()) {
    const simt::Meeting met = simt_meet("transpose8", line, ALL, rows);
    const int row = simt::current->lane / 4, part = simt::current->lane % 4;
    uint32_t columns = 0;
    for (int i = 0; i < 2; ++i) {
        const uint32_t pair = met.of((2 * part + i) * 4 + row / 2).word[0];
        columns |= (pair >> (row % 2 * 16) & 0xFFFF) << (16 * i);
    }
    return columns;
}

inline uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
    const unsigned long long bytes = static_cast<unsigned long long>(b) << 32 | a;
    uint32_t permuted = 0;
    for (int i = 0; i < 4; ++i) {
        const uint32_t nibble = selector >> (4 * i) & 15;
        uint32_t byte = bytes >> (8 * (nibble & 7)) & 0xFF;
        if (nibble & 8) byte = byte & 0x80 ? 0xFF : 0;
        permuted |= byte << (8 * i);
    }
    return permuted;
}

inline float simt_flush(float x) { return std::fabs(x) < FLT_MIN ? std::copysign(0.0f, x) : x; }
template <class T>
inline void opaque(T&) {}
inline float divide_fast(float x, float y) { return x / y; }
inline float exp2_fast(float x) { return simt_flush(std::exp2(simt_flush(x))); }

// CTAs run one after the other, so whoever came before has ended
inline void wait_for_predecessor() {}
inline void allow_successor() {}

inline void atomic_add(long long* to, long long value) {
    simt_check_aligned(to, 8, "atomic_add");
    *to += value;
}

// What kernels need of the hardware beyond CUDA's built-ins, one PTX instruction each. It stands in front of a kernel's
// source, and NVRTC compiles both without headers. tests/kernels/simt/device.h says the same for CPUs, name by name.
//
// All lanes of a warp call mma_codes, mma_half and transpose8 together. Fragments lie in lanes as the PTX manual draws
// them, with `row = lane / 4` and `part = lane % 4`; a register holds consecutive elements, the first in the low bits.

using int8_t = signed char;
using uint8_t = unsigned char;
using int16_t = short;
using uint16_t = unsigned short;
using int32_t = int;
using uint32_t = unsigned int;
using int64_t = long long;
using uint64_t = unsigned long long;

constexpr unsigned ALL = 0xffffffffu;  // every lane of a warp

// The CTA's dynamic shared memory, at a multiple of 128 bytes.
__device__ __forceinline__ uint8_t* dynamic_shared() {
    extern __shared__ __align__(128) uint8_t simt_shared_memory[];
    return simt_shared_memory;
}

// Copies 16 bytes past the registers and L1. Both addresses are multiples of 16. The bytes are there after the
// async_wait that covers their group, for the thread that copies; for other threads after a barrier behind that wait.
__device__ __forceinline__ void async_copy16(void* shared_to, const void* global_from) {
    const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared_to));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global_from) : "memory");
}

// The same of 4 bytes, between multiples of 4, through L1.
__device__ __forceinline__ void async_copy4(void* shared_to, const void* global_from) {
    const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared_to));
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(global_from) : "memory");
}

// Closes this thread's group of copies, which may be empty.
__device__ __forceinline__ void async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most the N last groups of this thread are under way.
template <int N>
__device__ __forceinline__ void async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// Global memory that nobody writes while the kernel runs; each address is a multiple of the bytes loaded. They are
// volatile, so that none moves in front of wait_for_predecessor: a predecessor may have written what is loaded.
__device__ __forceinline__ uint4 load16(const void* from) {
    uint4 value;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "l"(from));
    return value;
}

__device__ __forceinline__ uint2 load8(const void* from) {
    uint2 value;
    asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(value.x), "=r"(value.y) : "l"(from));
    return value;
}

__device__ __forceinline__ uint32_t load4(const void* from) {
    uint32_t value;
    asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(value) : "l"(from));
    return value;
}

__device__ __forceinline__ uint16_t load2(const void* from) {
    uint16_t value;
    asm volatile("ld.global.nc.u16 %0, [%1];" : "=h"(value) : "l"(from));
    return value;
}

// d[16, 8] int32 += a[16, 32] uint8 @ b[32, 8] int8.
//   a0, a1: rows row, row + 8, columns 4 * part + 0..3; a2, a3: the same rows, columns 16 + 4 * part + 0..3
//   b0, b1: column row, rows 4 * part + 0..3 and 16 + 4 * part + 0..3
//   d[0], d[1]: row row, columns 2 * part + 0, 1; d[2], d[3]: the same of row row + 8
__device__ __forceinline__ void mma_codes(int (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                          uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// d[16, 8] float32 += a[16, 16] @ b[16, 8], both float16 or both bfloat16.
//   a0, a1: rows row, row + 8, columns 2 * part + 0, 1; a2, a3: the same rows, columns 8 + 2 * part + 0, 1
//   b0, b1: column row, rows 2 * part + 0, 1 and 8 + 2 * part + 0, 1
//   d as of mma_codes
template <bool FLOAT16>
__device__ __forceinline__ void mma_half(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                         uint32_t b1) {
    if constexpr (FLOAT16) {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
    } else {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
    }
}

// An 8 x 8 matrix of 16-bit elements, transposed; a lane holds row `row`, columns 2 * part + 0, 1, before and after.
__device__ __forceinline__ uint32_t transpose8(uint32_t rows) {
    uint32_t columns;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(columns) : "r"(rows));
    return columns;
}

// Four of the eight bytes of b:a, by a nibble of the selector each: 0..3 for a's bytes, 4..7 for b's. A nibble's bit 3
// fills the byte with that byte's sign.
__device__ __forceinline__ uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
    uint32_t bytes;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(bytes) : "r"(a), "r"(b), "r"(selector));
    return bytes;
}

// a value that the compiler keeps instead of working it out again
__device__ __forceinline__ void opaque(int& x) { asm volatile("" : "+r"(x)); }
__device__ __forceinline__ void opaque(uint32_t& x) { asm volatile("" : "+r"(x)); }
template <class T>
__device__ __forceinline__ void opaque(T*& x) { asm volatile("" : "+l"(x)); }

// x / y, y in the range of 1 to 2^126
__device__ __forceinline__ float divide_fast(float x, float y) { return __fdividef(x, y); }

// 2 ** x to 2 units in the last place, subnormal numbers as zero.
__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Two floats to the nearest float16 or bfloat16, ties to even; what is too large is infinity.
template <bool FLOAT16>
__device__ __forceinline__ uint32_t pack_half(float low, float high) {
    uint32_t packed;
    if constexpr (FLOAT16) {
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    } else {
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    }
    return packed;
}

// Products of two float16 each, at most the largest float16.
__device__ __forceinline__ uint32_t multiply_half2(uint32_t x, uint32_t y) {
    uint32_t products;
    asm("mul.rn.f16x2 %0, %1, %2;\n    min.f16x2 %0, %0, %3;" : "=&r"(products) : "r"(x), "r"(y), "r"(0x7bff7bffu));
    return products;
}

// from + x * y bytes
__device__ __forceinline__ const uint8_t* ahead(const uint8_t* from, uint32_t x, uint32_t y) {
    const uint8_t* there;
    asm("mad.wide.u32 %0, %1, %2, %3;" : "=l"(there) : "r"(x), "r"(y), "l"(from));
    return there;
}

__device__ __forceinline__ float half_to_float(uint16_t bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

template <bool FLOAT16>
__device__ __forceinline__ float element_to_float(uint16_t bits) {
    if constexpr (FLOAT16) return half_to_float(bits);
    return __uint_as_float(static_cast<uint32_t>(bits) << 16);
}

// Nothing that the kernel before has written is read, and nothing that it reads is written, before this. No effect
// unless the kernel is launched early (`Kernel.launch`), which needs compute capability 9.0.
__device__ __forceinline__ void wait_for_predecessor() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the kernel behind start, once every CTA has said so or ended; it still waits for this one's end before it reads.
__device__ __forceinline__ void allow_successor() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ __forceinline__ void atomic_add(long long* to, long long value) {
    asm volatile("red.relaxed.gpu.global.add.u64 [%0], %1;" ::"l"(to), "l"(value) : "memory");
}

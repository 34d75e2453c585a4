// Sums over the lanes of a warp.

// of the lanes whose numbers differ in bits from `first_bit` on, and below `end_bit`
__device__ __forceinline__ float sum_of(float x, int first_bit, int end_bit = 32) {
    for (int m = first_bit; m < end_bit; m *= 2) x += __shfl_xor_sync(ALL, x, m);
    return x;
}

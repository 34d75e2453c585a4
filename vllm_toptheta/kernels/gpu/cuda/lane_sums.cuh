// Sums over the lanes of a warp.

// of the lanes whose numbers differ in bits from `first_bit` on
__device__ __forceinline__ float sum_of(float x, int first_bit) {
    for (int m = first_bit; m < 32; m *= 2) x += __shfl_xor_sync(ALL, x, m);
    return x;
}

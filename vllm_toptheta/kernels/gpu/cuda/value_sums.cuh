// Sums of weighed values, as products leave them in lanes, and where they stand in shared memory.
//
// COLUMNS, TILES and ACC_QUAD are the kernel's.

// where 4 sums of a block of columns and a tile stand: those of head 8 c + 2 t and of the next, in rows g and g + 8
__device__ __forceinline__ uint32_t sum_index(uint32_t c, uint32_t tile, uint32_t g, uint32_t t) {
    return ((c * TILES + tile) * 8 + g) * ACC_QUAD + t;
}

// Adds channels 64 i to 64 i + 63 of sixteen values, of which a lane has channels 8 g to 8 g + 7 of keys 2 t, 2 t + 1, 8 + 2 t
// and 9 + 2 t. Row g of tile 4 i + j is channel 64 i + 8 g + 2 j, row g + 8 the next one. Where only half of these channels
// are left, a lane has 4 g to 4 g + 3, and the row of a tile is 64 i + 4 g + 2 j.
__device__ __forceinline__ void add_values(
    float (&sums)[COLUMNS][TILES][4], int i, const uint4 (&values)[4], const uint32_t (&weights)[COLUMNS][2]) {
    uint32_t part[4][4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        uint4 v = values[k];
        part[k][0] = v.x, part[k][1] = v.y, part[k][2] = v.z, part[k][3] = v.w;
    }
#pragma unroll
    for (int j = 0; j < min(4, TILES - 4 * i); ++j) {
        uint32_t a0 = permute_bytes(part[0][j], part[1][j], 0x5410), a1 = permute_bytes(part[0][j], part[1][j], 0x7632);
        uint32_t a2 = permute_bytes(part[2][j], part[3][j], 0x5410), a3 = permute_bytes(part[2][j], part[3][j], 0x7632);
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c)
            mma_half<IS_FLOAT16>(sums[c][4 * i + j], a0, a1, a2, a3, weights[c][0], weights[c][1]);
    }
}

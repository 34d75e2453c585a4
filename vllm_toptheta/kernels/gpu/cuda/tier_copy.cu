// Copies of keys and values (copies.py has the format), of all pages that a step's tokens fill.
//
// A program for each kv head, sequence and so many pages, whose warps take tokens in turn. A page's copies depend on the keys
// and values in it and on the first keys of the sequence alone, so whoever writes them writes the same bytes.
//
// What `macros_of` in tier_copy.py names is defined when it is compiled; `device.cuh` stands in front.

#include "lane_sums.cuh"
#include "tier_rows.cuh"

struct Args {
    const uint8_t* kv_cache;
    const int* block_table;
    const int* seq_lens;
    const int* query_start_loc;  // or null, where every sequence has one new token
    uint8_t* codes;
    const float* rotation;
    uint32_t stride_block, stride_head, stride_token;  // bytes
    uint32_t code_stride_block, code_stride_head;
    int table_stride;
};

// the copies of a page's token, by a warp
__device__ __forceinline__ void copy_token(
    const float (&signs)[LANE_CHANNELS], const uint8_t* row, uint8_t* codes, uint32_t token, uint32_t lane, const float (&centre)[LANE_CHANNELS]) {
    uint16_t* steps = reinterpret_cast<uint16_t*>(codes + BLOCK_SIZE * (HALF + QUARTER)) + token;
    float key[LANE_CHANNELS], value[LANE_CHANNELS];
    load_row(row, lane, key);
    load_row(row + 2 * HEAD_SIZE, lane, value);
    uint32_t bytes[LANE_CHANNELS];

#pragma unroll
    for (int i = 0; i < LANE_CHANNELS; ++i) key[i] -= centre[i];
    rotate(signs, key, lane);
    uint16_t key_step = half_of(largest_of(key) / 8.0f);
#pragma unroll
    for (int i = 0; i < LANE_CHANNELS; ++i) {
        uint32_t code = clamp(floorf(__fdiv_rn(key[i], half_to_float(key_step)) + 8.0f), 0.0f, 15.0f);
        bytes[i] = code | __shfl_xor_sync(ALL, code, 16) << 4;
    }
    if (lane < 16) store_bytes(codes + token * HALF + LANE_CHANNELS * lane, bytes);
    if (lane == 0) steps[0] = key_step;

    rotate(signs, value, lane);
    float largest = fmaxf(largest_of(value), LEAST_STEP), square = 0.0f, overlap = 0.0f;
#pragma unroll
    for (int i = 0; i < LANE_CHANNELS; ++i) {
        float level = clamp(floorf(__fdiv_rn(2.0f * value[i], largest) + 2.0f), 0.0f, 3.0f);
        square += value[i] * value[i], overlap += value[i] * (level - 1.5f);
        uint32_t code = uint32_t(level) << lane / 8 * 2;
        code |= __shfl_xor_sync(ALL, code, 8);
        bytes[i] = code | __shfl_xor_sync(ALL, code, 16);
    }
    square = sum_of(square, 1), overlap = sum_of(overlap, 1);
    if (lane < 8) store_bytes(codes + BLOCK_SIZE * HALF + token * QUARTER + LANE_CHANNELS * lane, bytes);
    if (lane == 0) steps[BLOCK_SIZE] = half_of(__fdiv_rn(square, fmaxf(overlap, LEAST_STEP)));
}

// The first kernel of a step: the next reads keys and values at once, because they stood there when this one let it start.
extern "C" __global__ void __launch_bounds__(32 * COPY_WARPS) tier_copy(const __grid_constant__ Args a) {
    uint32_t lane = threadIdx.x & 31, warp = threadIdx.x / 32;
    int kv_head = blockIdx.x, seq = blockIdx.y;
    wait_for_predecessor();
    allow_successor();
    int seq_len = a.seq_lens[seq], num_new = 1;
    if (a.query_start_loc) num_new = a.query_start_loc[seq + 1] - a.query_start_loc[seq];
    int page = max(seq_len - num_new, 0) / BLOCK_SIZE + blockIdx.z, end = seq_len / BLOCK_SIZE;
    if (page >= end) return;
    const int* blocks = a.block_table + (long long)seq * a.table_stride;
    const uint8_t* kv = a.kv_cache + (uint64_t)kv_head * a.stride_head;
    float signs[LANE_CHANNELS], centre[LANE_CHANNELS];
    load_floats(a.rotation, lane, signs);
    load_centre(kv + (uint64_t)uint32_t(blocks[0]) * a.stride_block, a.stride_token, lane, centre);
    for (; page < end; page += gridDim.z) {
        uint32_t block = blocks[page];
        uint8_t* codes = a.codes + (uint64_t)block * a.code_stride_block + (uint64_t)kv_head * a.code_stride_head;
        const uint8_t* rows = kv + (uint64_t)block * a.stride_block;
        for (uint32_t token = warp; token < BLOCK_SIZE; token += COPY_WARPS)
            copy_token(signs, rows + token * a.stride_token, codes, token, lane, centre);
    }
}

// What `split.py` does in Triton, nearer to the limit of the memory: every key is scored, and values of survivors read.
//
// A program has a share of a kv head's keys (`schedule.py`), from all over a sequence (`Spread`), and its warps take stages of
// 16 tokens in turn, so that clustered survivors are everybody's. A warp needs no other until the end of a piece:
//
//   scan    keys arrive in a ring of stages in shared memory. Tokens are the rows of products, heads the columns. Keys
//           that reach the threshold of a head go to a ring of 64, with the scores of the group's heads.
//   gather  sixteen at a time, values of the ring are asked for, straight into the operands of products; they are weighed
//           when the next sixteen are asked for, so nothing waits.
//
// Where a sequence keeps every key, values are asked for before their keys are scored. A product may take channels in any
// order if both sides take the same, so every lane reads 16 bytes in a row. Sums are added in an order that depends on
// lengths, scores and `head_programs` only.
//
// New tokens of a sequence are columns beside each other, and each sees the keys up to its own.
//
// What `macros_of` in value_split.py names is defined when it is compiled; `device.cuh` stands in front.

#include "schedule.cuh"
#include "scores.cuh"
#include "lane_sums.cuh"
#include "value_layout.cuh"
#include "value_sums.cuh"
#include "value_warp.cuh"

__device__ __forceinline__ NewTokens new_tokens(const Args& a, int seq) {
    if (QUERY_LEN == 1) return {seq, 1};
    int first = a.query_start_loc[seq];
    return {first, uint32_t(a.query_start_loc[seq + 1] - first)};
}

__device__ __forceinline__ void load_queries(const Args& a, const NewTokens& tokens, int kv_head) {
    const uint8_t* query =
        a.query + (uint64_t)tokens.first * a.query_stride_seq + (uint64_t)kv_head * QUERY_HEADS * a.query_stride_head;
    for (uint32_t i = threadIdx.x; i < 8 * COLUMNS * CHUNKS; i += 32 * WARPS) {
        uint32_t column = i / CHUNKS, chunk = i % CHUNKS;
        uint32_t at = tokens.number_of(column) * a.query_stride_seq + head_of(column) * a.query_stride_head;
        *reinterpret_cast<uint4*>(dynamic_shared() + QUERY_AT + column * QUERY_STRIDE + 16 * chunk) =
            column < GROUP ? load16(query + at + 16 * chunk) : make_uint4(0, 0, 0, 0);
    }
}

// Ask for what a piece needs first: keys and queries, and its thresholds, which may not be there yet if `is_first`.
__device__ __forceinline__ void begin_piece(const Args& a, Warp& w, const PieceTokens& piece, int kv_head, bool is_first) {
    uint32_t unit = a.schedule.unit;
    NewTokens tokens = new_tokens(a, piece.seq);
    w.is_dense = piece.is_dense, w.seq_len = piece.seq_len;
    w.tokens = tokens;
    // units are tiles, or pages that tiles consist of
    w.unit_bits = __ffs(unit / STAGE_TOKENS) - 1, w.first_stage = piece.start / STAGE_TOKENS;
    w.spread = Spread::of(divide_up(piece.seq_len, unit));
    uint32_t total = divide_up(piece.end, unit) * (unit / STAGE_TOKENS) - w.first_stage;
    w.num_stages = total > w.warp ? divide_up(total - w.warp, WARPS) : 0;
    uint32_t seen = tokens.seen_by(0, piece.seq_len);  // by the first of them
    w.open_start = VALUE_MEAN ? seen / BLOCK_SIZE * BLOCK_SIZE : piece.seq_len;
    w.special_start = VALUE_MEAN ? w.open_start : seen;
    w.blocks = a.block_table + (long long)piece.seq * a.table_stride;
    w.kv_base = a.kv_cache + (uint64_t)kv_head * a.stride_head;
    w.parity ^= 1;
    w.begin();
    load_queries(a, tokens, kv_head);
    if (is_first) wait_for_predecessor();
    if (threadIdx.x < 16) {
        const float* thresholds = a.thresholds + ((long long)tokens.first * a.num_kv_heads + kv_head) * QUERY_HEADS;
        uint32_t at = tokens.number_of(threadIdx.x) * a.num_kv_heads * QUERY_HEADS + head_of(threadIdx.x);
        float threshold = piece.is_dense ? -HIGHEST : threadIdx.x < GROUP ? thresholds[at] : HIGHEST;
        w.thresholds()[threadIdx.x] = threadIdx.x < GROUP ? threshold : HIGHEST;
    }
}

// the sums of a warp, for all of them
__device__ __forceinline__ void share_sums(const Warp& w) {
    float* stats = reinterpret_cast<float*>(dynamic_shared() + STATS_AT) + w.warp * 48;
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c) {
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) {
            const float* v = w.output[c][tile];
            if (w.t < ACC_QUAD)
                reinterpret_cast<float4*>(w.mine() + SUMS_AT)[sum_index(c, tile, w.g, w.t)] = make_float4(v[0], v[1], v[2], v[3]);
        }
        float kept = w.kept[c] + __shfl_xor_sync(ALL, w.kept[c], 1);
        kept += __shfl_xor_sync(ALL, kept, 2);
        if (w.t == 0) stats[8 * c + w.g] = w.maximum[c], stats[16 + 8 * c + w.g] = kept;
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            float lost = sum_of(w.lost[c][e], 4);
            if (w.g == 0) stats[32 + 8 * c + 2 * w.t + e] = lost;
        }
    }
    if (w.lane == 0) reinterpret_cast<uint32_t*>(dynamic_shared() + COUNTS_AT)[w.warp] = w.rows_read;
}

// add up what all warps have, each relative to its own maximum, and write it
__device__ __forceinline__ void write_piece(const Args& a, long long piece, const float* thresholds) {
    const uint8_t* shared = dynamic_shared();
    const float* stats = reinterpret_cast<const float*>(shared + STATS_AT);
    float* output = a.piece_output + piece * GROUP * HEAD_SIZE;
    for (uint32_t i = threadIdx.x; i < COLUMNS * TILES * 8 * ACC_QUAD; i += 32 * WARPS) {
        uint32_t t = i % ACC_QUAD, g = i / ACC_QUAD % 8, tile = i / (8 * ACC_QUAD) % TILES, c = i / (8 * ACC_QUAD * TILES);
        uint32_t head = 8 * c + 2 * t, channel = Warp::channel_of(tile, g);
        float best[2] = {DISCARDED, DISCARDED};
        for (int warp = 0; warp < WARPS; ++warp)
#pragma unroll
            for (int e = 0; e < 2; ++e) best[e] = fmaxf(best[e], stats[warp * 48 + head + e]);
        float4 sum = make_float4(0, 0, 0, 0);
        for (int warp = 0; warp < WARPS; ++warp) {
            float4 x = reinterpret_cast<const float4*>(shared + warp * WARP_BYTES + SUMS_AT)[i];
            float f0 = exp2_fast((stats[warp * 48 + head] - best[0]) * LOG2_E);
            float f1 = exp2_fast((stats[warp * 48 + head + 1] - best[1]) * LOG2_E);
            sum.x += f0 * x.x, sum.y += f1 * x.y, sum.z += f0 * x.z, sum.w += f1 * x.w;
        }
        if (head < GROUP) *reinterpret_cast<float2*>(output + head * HEAD_SIZE + channel) = make_float2(sum.x, sum.z);
        if (head + 1 < GROUP) *reinterpret_cast<float2*>(output + (head + 1) * HEAD_SIZE + channel) = make_float2(sum.y, sum.w);
    }
    if (threadIdx.x < GROUP) {
        const float* of_head = stats + threadIdx.x;
        float best = DISCARDED, kept = 0.0f, lost = 0.0f;
        for (int warp = 0; warp < WARPS; ++warp) best = fmaxf(best, of_head[warp * 48]);
        for (int warp = 0; warp < WARPS; ++warp) {
            kept += exp2_fast((of_head[warp * 48] - best) * LOG2_E) * of_head[warp * 48 + 16];
            lost += of_head[warp * 48 + 32];
        }
        lost *= exp2_fast((thresholds[threadIdx.x] - best) * LOG2_E);
        float* of_piece = a.piece_stats + piece * 3 * GROUP + threadIdx.x;
        of_piece[0] = best, of_piece[GROUP] = kept, of_piece[2 * GROUP] = lost;
    }
}

// rows of values that a piece has read, with those of the open page, which the merge reads for the mean
__device__ __forceinline__ uint32_t rows_of_piece() {
    const uint32_t* counts = reinterpret_cast<const uint32_t*>(dynamic_shared() + COUNTS_AT);
    uint32_t rows = 0;
    for (int warp = 0; warp < WARPS; ++warp) rows += counts[warp];
    return rows;
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, RESIDENT) value_split(const __grid_constant__ Args a) {
    uint32_t lane = threadIdx.x & 31, warp = threadIdx.x / 32;
    allow_successor();
    int first_programs = first_programs_of(a, lane);  // with the lengths, not behind them
    StepTokens tokens = tokens_of(a, lane);
    Step step = step_of(a, tokens, a.schedule.num_programs, lane);
    auto [kv_head, program, num_programs] = place_of(a, is_balanced(a, tokens, step, first_programs, lane), first_programs, lane);
    if (num_programs != a.schedule.num_programs) step = step_of(a, tokens, max(num_programs, 1), lane);
    Warp w;
    w.at = warp * WARP_BYTES, w.warp = warp, w.lane = lane, w.g = lane / 4, w.t = lane % 4, w.parity = 0;
    w.stride_block = a.stride_block, w.stride_token = a.stride_token;
    w.scale = a.softmax_scale * (a.q_scale ? *a.q_scale : 1.0f) * (a.k_scale ? *a.k_scale : 1.0f);
    w.logits_soft_cap = a.logits_soft_cap;
    PieceTokens piece;
    Walk walk = walk_of(a, step, program, lane);
    bool has_piece = num_programs && next_piece(a, step, walk, piece);  // a program of no head has none
    if (has_piece)
        begin_piece(a, w, piece, kv_head, true);
    else
        wait_for_predecessor();  // in any case: whoever waits for this kernel relies on the one before it too
    while (has_piece) {
        w.clear();
        __syncthreads();
        w.take_terms();
        if (w.is_dense)
            w.run_dense();
        else
            w.run_sparse();
        __syncthreads();
        int done = piece.seq;
        const float* thresholds = w.thresholds();
        async_wait<0>();
        // the next keys are on their way while the last values of these arrive, and sums are written
        has_piece = next_piece(a, step, walk, piece);
        if (has_piece) begin_piece(a, w, piece, kv_head, false);
        w.finish();
        share_sums(w);
        __syncthreads();
        write_piece(a, (long long)(program + done) * a.num_kv_heads + kv_head, thresholds);
        if (threadIdx.x == 0 && a.value_rows_read) atomic_add(a.value_rows_read + kv_head, rows_of_piece());
    }
}

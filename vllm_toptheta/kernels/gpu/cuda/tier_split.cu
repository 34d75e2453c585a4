// Tiers on the device, in CUDA C++: what `tier_split.py` does in Triton, nearer to the limit of the memory.
//
// A program has a share of a kv head's keys (`schedule.py`), and its warps take steps of 32 tokens in turn, so that
// clustered keys are everybody's. A warp needs no other until the end of a piece:
//
//   scan    codes and steps of keys arrive in a ring of stages in shared memory. Tokens are the rows of products of
//           integers, heads the columns; where a group has at most four heads, two tokens share a row. Halves of bytes
//           become operands by one AND: the upper half is 16 times too large, and the lower product is multiplied by 16.
//   light   keys go to a ring with their weights, relative to the anchors, which no light key reaches. Sixteen at a time,
//           codes of their values are asked for; they are weighed 64 tokens later, so nothing waits.
//   heavy   keys go to a list. In the end, or when a list is full, which is rare, the warps share out what all of them
//           have listed: keys are read and scored exactly, and the values of survivors weighed. Not in between, because
//           both at a time do not fit into the registers.
//
// What is loaded is an operand of mma.sync as it comes: a product may take channels in any order if both sides take the same,
// so every lane reads 16 bytes in a row. Sums are added in an order that depends on lengths and scores only.
//
// What `macros_of` in tier_split.py names is defined when it is compiled; `device.cuh` stands in front.

#include "schedule.cuh"
#include "scores.cuh"
#include "lane_sums.cuh"
#include "tier_rows.cuh"
#include "tier_layout.cuh"
#include "value_sums.cuh"
#include "tier_exact.cuh"
#include "tier_light.cuh"
#include "tier_scan.cuh"

// what a warp saves of each part while it works on the other: floats of a lane
constexpr uint32_t SAVED_LIGHT = COLUMNS * (TILES * 4 + 10), SAVED = SAVED_LIGHT + COLUMNS * (TILES * 4 + 6) + 1;
static_assert(SAVED == EXPECTED_SAVED, "the scratch has what is saved");

typedef float Rows[COLUMNS][TILES * 4];
__device__ __forceinline__ Rows& as_rows(float (&x)[COLUMNS][TILES][4]) { return reinterpret_cast<Rows&>(x); }

template <int N>
__device__ __forceinline__ float* save(float* to, const float (&x)[COLUMNS][N]) {
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c)
#pragma unroll
        for (int i = 0; i < N; ++i, to += 32) *to = x[c][i];
    return to;
}

template <int N>
__device__ __forceinline__ const float* restore(const float* from, float (&x)[COLUMNS][N]) {
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c)
#pragma unroll
        for (int i = 0; i < N; ++i, from += 32) x[c][i] = *from;
    return from;
}

// leave sums to the other warps
__device__ __forceinline__ void share_sums(const Warp& w, uint32_t at, const float (&sums)[COLUMNS][TILES][4]) {
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c)
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) {
            const float* v = sums[c][tile];
            if (w.t < ACC_QUAD)
                reinterpret_cast<float4*>(w.mine() + at)[sum_index(c, tile, w.g, w.t)] = make_float4(v[0], v[1], v[2], v[3]);
        }
}

__device__ __forceinline__ void share_exact(const Warp& w, const Exact& exact, float* stats) {
    share_sums(w, EXACT_AT, exact.output);
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            float kept = sum_of(exact.kept[c][e], 4), lost = sum_of(exact.lost[c][e], 4);
            uint32_t head = 8 * c + 2 * w.t + e;
            if (w.g == 0) stats[head] = exact.maximum[c][e], stats[16 + head] = kept, stats[32 + head] = lost;
        }
}

__device__ __forceinline__ void share_light(const Warp& w, const Scan& scan, float* stats) {
    share_sums(w, LIGHT_AT, scan.light);
    constexpr int FIRST_BIT = ROW_TOKENS == 2 ? 2 : 4;
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            float total = sum_of(scan.total[c][e], FIRST_BIT);
            if (w.lane < FIRST_BIT) stats[48 + 8 * c + scan.first_head() + e] = total;
        }
    // in every row the same
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            uint32_t head = 8 * c + 2 * w.t + e;
            if (w.g == 0 && head < HEADS) stats[64 + head] = scan.kept[c][e], stats[80 + head] = scan.stepped[c][e];
        }
}

// what the warps have in common; queries as operands, exact ones and codes: y = R q, step = max |y| / 127, code = round(y / step)
__device__ __forceinline__ void prepare(const Args& a, int seq, int kv_head, const Warp& w, int seq_len, bool is_dense) {
    uint8_t* shared = dynamic_shared();
    constexpr uint32_t CHUNKS = HEAD_SIZE / 8;
    const uint8_t* query = a.query + (uint64_t)seq * a.query_stride_seq + (uint64_t)kv_head * GROUP * a.query_stride_head;
    const uint8_t* first_key = a.kv_cache + (uint64_t)kv_head * a.stride_head;
    if (!is_dense) {
        constexpr uint32_t PADDED_GROUP = ROW_TOKENS == 2 ? 4 : 8 * COLUMNS;
        uint8_t* operands = shared + OPERANDS_AT;
        for (uint32_t head = w.warp; head < PADDED_GROUP; head += WARPS) {
            uint32_t bytes[LANE_CHANNELS] = {};
            if (head < GROUP) {
                // all of them are on their way before one is waited for
                float x[LANE_CHANNELS], centre[LANE_CHANNELS], signs[LANE_CHANNELS], offset = 0.0f;
                load_row(query + head * a.query_stride_head, w.lane, x);
                load_floats(a.rotation, w.lane, signs);
                load_centre(first_key + (uint64_t)uint32_t(w.blocks[0]) * a.stride_block, a.stride_token, w.lane, centre);
#pragma unroll
                for (int i = 0; i < LANE_CHANNELS; ++i) {
                    if (a.q_scale) x[i] *= *a.q_scale;
                    if (a.k_scale) x[i] *= *a.k_scale;  // copies are of what is stored
                    offset += x[i] * centre[i];
                }
                rotate(signs, x, w.lane);
                float step = __fdiv_rn(largest_of(x), 127.0f);
                if (!(step > 0.0f)) step = 1.0f;
                int sum = 0;
#pragma unroll
                for (int i = 0; i < LANE_CHANNELS; ++i) {
                    int code = int(floorf(__fdiv_rn(x[i], step) + 0.5f));
                    sum += code, bytes[i] = code & 0xff;
                }
                offset = sum_of(offset, 1), sum = __reduce_add_sync(ALL, sum);
                float* terms = reinterpret_cast<float*>(shared + TERMS_AT) + 3 * head;
                if (w.lane == 0) terms[0] = a.softmax_scale * step, terms[1] = 7.5f * sum, terms[2] = a.softmax_scale * offset;
            }
            // the lower half of the channels is that of the first 16 lanes
            uint32_t of_half = w.lane / 16 * OPERANDS * OPERAND_BYTES + LANE_CHANNELS * (w.lane % 16);
            // columns of 8 heads, or of 4 heads for either token of a row: 0 where a column is the other's, or nobody's
#pragma unroll
            for (uint32_t token = 0; token < ROW_TOKENS; ++token) {
                uint32_t column = head + 4 * token, mine = ROW_TOKENS == 2 ? token : column / 8;
#pragma unroll
                for (uint32_t operand = 0; operand < OPERANDS; ++operand) {
                    uint32_t none[LANE_CHANNELS] = {};
                    uint8_t* to = operands + operand * OPERAND_BYTES + column % 8 * HALF + of_half;
                    // with two blocks of columns, each has an operand to itself
                    if (ROW_TOKENS == 2 || mine == operand) store_bytes(to, mine == operand ? bytes : none);
                }
            }
        }
    }
    for (uint32_t i = threadIdx.x; i < HEADS * CHUNKS; i += 32 * WARPS) {
        uint32_t head = i / CHUNKS, chunk = i % CHUNKS;
        *reinterpret_cast<uint4*>(shared + QUERY_AT + head * QUERY_STRIDE + 16 * chunk) =
            head < GROUP ? load16(query + head * a.query_stride_head + 16 * chunk) : make_uint4(0, 0, 0, 0);
    }
    // by the last thread, whose warp has no head to turn if there are more warps than heads
    if (threadIdx.x == 32 * WARPS - 1) {
        int open_start = w.place().open_start;
        Piece& common = piece_of(shared);
        common.kv_base = first_key;
        common.thresholds = a.thresholds + (seq * a.num_kv_heads + kv_head) * GROUP;
        common.scale = a.softmax_scale * (a.q_scale ? *a.q_scale : 1.0f) * (a.k_scale ? *a.k_scale : 1.0f);
        common.logits_soft_cap = a.logits_soft_cap;
        common.stride_block = a.stride_block, common.stride_token = a.stride_token;
        common.open_block = open_start < seq_len ? w.blocks[open_start / BLOCK_SIZE] : ~0u;
        common.is_dense = is_dense;
    }
    __syncthreads();
}

// add up what all warps have, each relative to its own maximum, where the first one's sums are
__device__ __forceinline__ void add_up(bool is_dense) {
    uint8_t* shared = dynamic_shared();
    const float* stats = reinterpret_cast<const float*>(shared + STATS_AT);
    constexpr uint32_t FRAGMENTS = COLUMNS * TILES * 8 * ACC_QUAD;
    for (uint32_t i = threadIdx.x; i < FRAGMENTS; i += 32 * WARPS) {
        const float* maxima = stats + i / (8 * ACC_QUAD * TILES) * 8 + 2 * (i % ACC_QUAD);
        float best[2] = {DISCARDED, DISCARDED};
        for (int warp = 0; warp < WARPS; ++warp)
#pragma unroll
            for (int e = 0; e < 2; ++e) best[e] = fmaxf(best[e], maxima[warp * WARP_BYTES / 4 + e]);
        float4 exact = make_float4(0, 0, 0, 0), light = make_float4(0, 0, 0, 0);
        for (int warp = 0; warp < WARPS; ++warp) {
            const uint8_t* of_warp = shared + warp * WARP_BYTES;
            float4 x = reinterpret_cast<const float4*>(of_warp + EXACT_AT)[i];
            float f0 = exp2_fast((maxima[warp * WARP_BYTES / 4] - best[0]) * LOG2_E);
            float f1 = exp2_fast((maxima[warp * WARP_BYTES / 4 + 1] - best[1]) * LOG2_E);
            exact.x += f0 * x.x, exact.y += f1 * x.y, exact.z += f0 * x.z, exact.w += f1 * x.w;
            if (is_dense) continue;
            float4 y = reinterpret_cast<const float4*>(of_warp + LIGHT_AT)[i];
            light.x += y.x, light.y += y.y, light.z += y.z, light.w += y.w;
        }
        reinterpret_cast<float4*>(shared + EXACT_AT)[i] = exact;
        reinterpret_cast<float4*>(shared + LIGHT_AT)[i] = light;
    }
}

// a warp writes a head's part of the piece
__device__ __forceinline__ void write_head(const Args& a, uint32_t head, uint32_t row, long long piece, uint32_t lane, bool is_dense) {
    uint8_t* shared = dynamic_shared();
    const float* stats = reinterpret_cast<const float*>(shared + STATS_AT) + head;
    float best = DISCARDED, kept = 0.0f, lost = 0.0f, total = 0.0f, light = 0.0f, stepped = 0.0f;
    for (int warp = 0; warp < WARPS; ++warp) best = fmaxf(best, stats[warp * WARP_BYTES / 4]);
    float light_scale = is_dense ? 0.0f : exp2_fast((a.anchor_lse[row] - best) * LOG2_E - a.log2_scale);
    for (int warp = 0; warp < WARPS; ++warp) {
        const float* of_warp = stats + warp * WARP_BYTES / 4;
        float f = exp2_fast((of_warp[0] - best) * LOG2_E);
        kept += f * of_warp[16], lost += f * of_warp[32];
        total += of_warp[48], light += of_warp[64], stepped += of_warp[80];
    }
    // what is neither heavy nor light is lost
    kept += light_scale * light, lost += light_scale * fmaxf(total - light, 0.0f);
    // R^T of what light values add up to: Hadamard's transform, and the signs that stand in the first row of R
    float x[LANE_CHANNELS], signs[LANE_CHANNELS];
    load_floats(a.rotation, lane, signs);
#pragma unroll
    for (int i = 0; i < LANE_CHANNELS; ++i) {
        uint32_t channel = LANE_CHANNELS * lane + i;
        float codes = reinterpret_cast<const float*>(shared + LIGHT_AT)[Scan::light_index(head, channel)];
        x[i] = Scan::value_of_light(channel, codes, stepped);
    }
    transform(x, lane);
    const float* exact = reinterpret_cast<const float*>(shared + EXACT_AT);
    float* output = a.piece_output + (piece * GROUP + head) * HEAD_SIZE;
#pragma unroll
    for (int i = 0; i < LANE_CHANNELS; ++i) {
        uint32_t channel = LANE_CHANNELS * lane + i;
        output[channel] = exact[exact_index(head, channel)] + x[i] * signs[i] * light_scale;
    }
    float* of_piece = a.piece_stats + piece * 3 * GROUP + head;
    if (lane == 0) of_piece[0] = best, of_piece[GROUP] = kept, of_piece[2 * GROUP] = lost;
}

__device__ __forceinline__ void attend_piece(
    const Args& a, const Warp& w, int seq, int kv_head, long long piece, int seq_len, bool is_dense) {
    uint8_t* shared = dynamic_shared();
    float* stats = reinterpret_cast<float*>(w.mine() + STATS_AT);
    uint32_t* counts = reinterpret_cast<uint32_t*>(shared + COUNTS_AT);  // [WARPS, 4]
    uint32_t first_row = (seq * a.num_kv_heads + kv_head) * GROUP, keys = 0, copies = 0;
    float* saved = a.saved + (uint64_t)((blockIdx.y * gridDim.x + blockIdx.x) * WARPS + w.warp) * SAVED * 32 + w.lane;
    int open_start = VALUE_MEAN ? seq_len / BLOCK_SIZE * BLOCK_SIZE : seq_len;
    if (w.lane == 0) {
        Place& place = w.place();
        uint32_t unit = a.schedule.unit;
        place.spread = Spread::of(divide_up(seq_len, unit)), place.end = w.end;
        place.unit_bits = __ffs(unit / 16) - 1;  // units are tiles, or pages that tiles consist of
        place.seq_len = seq_len, place.open_start = open_start, place.open_rows = 0;
    }
    __syncwarp();
    auto begin_exact = [&](Exact& exact) {
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                uint32_t head = 8 * c + 2 * w.t + e;
                exact.maximum[c][e] = is_dense ? DISCARDED : head < GROUP ? a.anchor_lse[first_row + head] : 0.0f;
                exact.kept[c][e] = exact.lost[c][e] = 0.0f;
            }
        clear(exact.output);
        exact.rows_read = 0;
    };
    Exact exact;
    if (is_dense) {
        prepare(a, seq, kv_head, w, seq_len, is_dense);
        wait_for_predecessor();
        begin_exact(exact);
        keys = w.end - w.start;
        w.attend_keys(exact, keys, [&](uint32_t i) {
            uint32_t position = w.start + i;
            return w.blocks[position / BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE;
        });
        if (w.lane < 16) stats[48 + w.lane] = stats[64 + w.lane] = stats[80 + w.lane] = 0.0f;
        share_exact(w, exact, stats);
    } else {
        uint32_t total = divide_up(w.end - w.start, STAGE_TOKENS), stage = 0;
        uint32_t num_stages = total > w.warp ? divide_up(total - w.warp, WARPS) : 0;
        bool is_done = false, is_first = true, all_done;
        do {
            uint32_t count = 0;
            if (!is_done) {
                Scan scan(w, a, kv_head);
                scan.begin(stage, num_stages);
                // while the first codes are on their way
                if (is_first) {
                    prepare(a, seq, kv_head, w, seq_len, is_dense);
                    wait_for_predecessor();
                }
                scan.load_terms(a, first_row);
                if (!is_first) restore(restore(restore(restore(saved, scan.total), scan.kept), scan.stepped), as_rows(scan.light));
                stage = scan.run(stage, num_stages);
                is_done = stage >= num_stages;
                count = scan.heavy_count, copies += scan.light_end;
                if (is_done)
                    share_light(w, scan, stats);
                else
                    save(save(save(save(saved, scan.total), scan.kept), scan.stepped), as_rows(scan.light));
            }
            if (w.lane == 0) w.listed()[w.warp] = count | (is_done ? IS_DONE : 0);
            __syncthreads();
            uint32_t sum = 0;
            all_done = true;
            for (uint32_t warp = 0; warp < WARPS; ++warp) {
                uint32_t of_warp = w.listed()[warp];
                sum += of_warp & ~IS_DONE, all_done &= of_warp >= IS_DONE;
            }
            keys += sum;
            float* of_exact = saved + 32 * SAVED_LIGHT;
            if (is_first) {
                begin_exact(exact);
            } else {
                const float* rows = restore(restore(restore(restore(of_exact, exact.maximum), exact.kept), exact.lost), as_rows(exact.output));
                exact.rows_read = __float_as_uint(*rows);
            }
            w.attend_keys(exact, sum, [&](uint32_t i) {
                uint32_t warp = 0, of_warp = w.listed()[0] & ~IS_DONE;
                while (i >= of_warp) i -= of_warp, of_warp = w.listed()[++warp] & ~IS_DONE;
                return reinterpret_cast<const uint32_t*>(shared + warp * WARP_BYTES + HEAVY_AT)[i];
            });
            if (all_done)
                share_exact(w, exact, stats);
            else
                *save(save(save(save(of_exact, exact.maximum), exact.kept), exact.lost), as_rows(exact.output)) =
                    __uint_as_float(exact.rows_read);
            is_first = false;
            // the next scan writes over what is read here
            if (!all_done) __syncthreads();
        } while (!all_done);
    }
    uint32_t rows = __reduce_add_sync(ALL, uint32_t(exact.rows_read));
    // the merge reads those of the open page, for the mean
    if (w.lane == 0) counts[4 * w.warp] = rows + w.place().open_rows, counts[4 * w.warp + 1] = copies;
    __syncthreads();
    add_up(is_dense);
    __syncthreads();
    for (uint32_t head = w.warp; head < GROUP; head += WARPS) write_head(a, head, first_row + head, piece, w.lane, is_dense);
    if (threadIdx.x == 0 && a.value_rows_read) {
        copies = rows = 0;
        for (int warp = 0; warp < WARPS; ++warp) rows += counts[4 * warp], copies += counts[4 * warp + 1];
        if (is_dense) rows = keys;
        atomic_add(a.keys_read + kv_head, keys);
        atomic_add(a.value_rows_read + kv_head, rows);
        atomic_add(a.copies_read + kv_head, copies);
    }
    __syncthreads();
}

// Before it waits, this kernel reads what stood there before the two kernels in front began: lengths, queries, keys and
// codes. Codes that they write are of a page that is read exactly (`first_recent`). It writes nothing before.
extern "C" __global__ void __launch_bounds__(32 * WARPS, RESIDENT) tier_split(const __grid_constant__ Args a) {
    uint32_t lane = threadIdx.x & 31, warp = threadIdx.x / 32;
    allow_successor();
    int first_programs = first_programs_of(a, lane);
    StepTokens tokens = tokens_of(a, lane);
    Step step = step_of(a, tokens, a.schedule.num_programs, lane);
    auto [kv_head, program, num_programs] = place_of(a, is_balanced(a, tokens, step, first_programs, lane), first_programs, lane);
    if (num_programs != a.schedule.num_programs) step = step_of(a, tokens, max(num_programs, 1), lane);
    // the kernel behind reads all keys then
    bool is_short = step.num_tokens < a.few_tokens || step.num_tokens < a.short_length * step.num_decoded;
    if (is_short || !num_programs) {  // or a program of no head
        wait_for_predecessor();
        return;
    }
    Warp w{warp * WARP_BYTES, warp, lane, lane / 4, lane % 4, 0, 0, 0, nullptr};
    Walk walk = walk_of(a, step, program, lane);
    PieceTokens piece;
    while (next_piece(a, step, walk, piece)) {
        uint32_t unit = a.schedule.unit;
        w.start = piece.start, w.end = piece.is_dense ? piece.end : divide_up(piece.end, unit) * unit;
        w.blocks = a.block_table + (long long)piece.seq * a.table_stride;
        // the page of the last token has no copies yet, or only since this step
        w.first_recent = min(piece.seq_len - NUM_LAST_ANCHORS, (piece.seq_len - 1) / BLOCK_SIZE * BLOCK_SIZE);
        long long number = (long long)(program + piece.seq) * a.num_kv_heads + kv_head;
        attend_piece(a, w, piece.seq, kv_head, number, piece.seq_len, piece.is_dense);
    }
    // in any case: whoever waits for this kernel relies on the ones before it too
    wait_for_predecessor();
}

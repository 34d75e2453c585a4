// What `split.py` does in Triton, nearer to the limit of the memory: every key is scored, and values of survivors read.
//
// A program takes shares of a kv head's keys (`schedule.py`) from a counter until none is left, so heads that keep many
// keys are everybody's. What it takes when changes from run to run; what a share adds up to, and in which order shares
// are joined, does not. The warps of a program take stages of 16 tokens in turn, and need no other until the end of a
// piece:
//
//   scan    keys arrive in a ring of stages in shared memory. Tokens are the rows of products, heads the columns. Keys
//           that reach the threshold of a head go to a ring of 64, with the scores of the group's heads.
//   gather  sixteen at a time, values of the ring are asked for, straight into the operands of products; they are weighed
//           when the next sixteen are asked for, so nothing waits.
//
// A sequence that keeps every key goes the same way. A product may take channels in any order if both sides take the
// same, so every lane reads 16 bytes in a row. Sums are added in an order that depends on lengths and scores only.
//
// What `macros_of` in value_split.py names is defined when it is compiled; `device.cuh` stands in front.

#include "schedule.cuh"
#include "scores.cuh"

constexpr uint32_t STAGE_TOKENS = 16;
constexpr uint32_t ROW_BYTES = 2 * HEAD_SIZE, CHUNKS = ROW_BYTES / 16;  // of a key or a value
constexpr int COLUMNS = GROUP > 8 ? 2 : 1;                              // blocks of eight columns
constexpr uint32_t HEADS = GROUP <= 4 ? 4 : 8 * COLUMNS;                // that the ring has scores of
constexpr int TILES = HEAD_SIZE / 16;                                   // of 16 channels
constexpr int KEY_PARTS = HEAD_SIZE / 32, VALUE_PARTS = HEAD_SIZE / 64; // of 16 bytes that a lane has of a row
constexpr bool HOLDS_QUERIES = HEAD_SIZE * COLUMNS <= 128;              // in registers, of which there are enough
constexpr uint32_t ACC_QUAD = GROUP <= 4 ? 2 : 4;                       // lanes of a quad that have columns of heads
constexpr uint32_t ROOM = 64, SCORE_STRIDE = ROOM + 8;                  // the stride spreads heads over the banks
constexpr float SLACK = 5.0f;  // that scores exceed what exponentials are relative to, at most

// bytes of shared memory: what every warp has, and behind that what all have together
constexpr uint32_t STAGE_BYTES = STAGE_TOKENS * ROW_BYTES, SUMS_BYTES = COLUMNS * TILES * 8 * ACC_QUAD * 16;
// in the end, sums stand where the ring has its last stage, which the next piece asks for last
constexpr uint32_t SUMS_AT = (STAGES - 1) * STAGE_BYTES;
constexpr uint32_t RING_BYTES = SUMS_AT + (STAGE_BYTES > SUMS_BYTES ? STAGE_BYTES : SUMS_BYTES);
constexpr uint32_t SCORES_AT = RING_BYTES, SLOTS_AT = SCORES_AT + HEADS * SCORE_STRIDE * 4;
constexpr uint32_t PLANS_AT = SLOTS_AT + ROOM * 4, PLAN_BYTES = 32, PLANNER_BYTES = 64;
constexpr uint32_t WARP_BYTES = PLANS_AT + 2 * PLAN_BYTES + PLANNER_BYTES;
constexpr uint32_t QUERY_STRIDE = ROW_BYTES + 64, QUERY_BYTES = HEADS * QUERY_STRIDE;
constexpr uint32_t QUERY_AT = WARPS * WARP_BYTES, STATS_AT = QUERY_AT + 2 * QUERY_BYTES;
constexpr uint32_t COUNTS_AT = STATS_AT + WARPS * 3 * 16 * 4;  // at most 15 warps
constexpr uint32_t THRESHOLDS_AT = COUNTS_AT + 64, SHARED_BYTES = THRESHOLDS_AT + 2 * 16 * 4;
static_assert(STAGE_BYTES % 128 == 0 && WARP_BYTES % 16 == 0, "copies of 16 bytes");
static_assert(SHARED_BYTES == EXPECTED_SHARED_BYTES, "the launch asks for what is used");

struct Args {
    const uint8_t* kv_cache;
    const int* block_table;
    const int* seq_lens;
    const float* threshold_offset;  // or null
    const uint8_t* query;
    const float* thresholds;
    const float* q_scale;  // or null
    const float* k_scale;  // or null
    float* piece_output;
    float* piece_stats;
    uint32_t* taken;             // shares that programs have taken beside their first two; 0 before the kernel
    long long* value_rows_read;  // or null
    uint32_t stride_block, stride_head, stride_token;  // bytes
    uint32_t query_stride_seq, query_stride_head;
    int table_stride, num_seqs, num_kv_heads;
    int max_dense_len, min_step_tokens;
    ScheduleArgs schedule;
    float softmax_scale, logits_soft_cap;
};

// Part `chunk` of a row stands at 16 * chunk ^ twist_of(row), so that lanes find theirs in different banks.
__device__ __forceinline__ constexpr uint32_t twist_of(uint32_t row) { return 16 * ((row & 6) ^ (row & 1) << 2); }

// where 4 sums of a block of columns and a tile stand: those of head 8 c + 2 t and of the next, in rows g and g + 8
__device__ __forceinline__ uint32_t sum_index(uint32_t c, uint32_t tile, uint32_t g, uint32_t t) {
    return ((c * TILES + tile) * 8 + g) * ACC_QUAD + t;
}

// What a program does next; the kernel has one piece at hand, and plans another meanwhile.
struct Plan {
    PieceTokens tokens;
    uint32_t share;
    int is_there;
};

// How a warp comes to its plans. In shared memory, because registers are full.
struct Planner {
    Step step;
    Walk walk;
    uint32_t share;
};
static_assert(sizeof(Plan) <= PLAN_BYTES && sizeof(Planner) <= PLANNER_BYTES, "room of plans");

__device__ __forceinline__ uint8_t* queries_of(uint32_t which) { return dynamic_shared() + QUERY_AT + QUERY_BYTES * which; }
__device__ __forceinline__ float* thresholds_of(uint32_t which) { return reinterpret_cast<float*>(dynamic_shared() + THRESHOLDS_AT) + 16 * which; }

// where the page begins that the sequence's next token goes to
__device__ __forceinline__ uint32_t open_start_of(const PieceTokens& tokens) {
    return VALUE_MEAN ? tokens.seq_len / BLOCK_SIZE * BLOCK_SIZE : tokens.seq_len;
}

// A warp's part of a piece. A lane is number t of quad g. In the scan it has tokens g and g + 8 of a stage, and heads
// 8 c + 2 t + e; in the gather keys 2 t, 2 t + 1, 8 + 2 t and 9 + 2 t of sixteen, and head 8 c + g.
struct Warp {
    uint32_t at;  // where the warp's shared memory is
    uint32_t warp, lane, g, t;
    uint32_t start, end, num_stages;
    uint32_t middle;      // a stage that every warp comes by, where it has any
    uint32_t open_start;
    uint32_t parity;      // which plan, queries and thresholds of two are the piece's
    bool is_dense;
    const int* blocks;
    const uint8_t* kv_base;
    uint32_t stride_block, stride_token;
    float scale, logits_soft_cap;
    uint4 query[COLUMNS][HOLDS_QUERIES ? KEY_PARTS : 1];
    float threshold[COLUMNS][2], offset[COLUMNS][2], lost[COLUMNS][2];  // relative to the threshold
    float maximum[COLUMNS], kept[COLUMNS], output[COLUMNS][TILES][4];
    uint4 pending[4][VALUE_PARTS];
    uint32_t ring_begin, ring_end, rows_read;
    int slots_before, slots, next_slots;  // of the first tokens of 32 stages, one a lane
    int planned_slots;                    // of those of the planned piece

    __device__ __forceinline__ uint8_t* mine() const { return dynamic_shared() + at; }
    __device__ __forceinline__ float* ring_scores() const { return reinterpret_cast<float*>(mine() + SCORES_AT); }
    __device__ __forceinline__ uint32_t* ring_slots() const { return reinterpret_cast<uint32_t*>(mine() + SLOTS_AT); }
    __device__ __forceinline__ const uint8_t* row_of(uint32_t slot) const {
        return kv_base + ((uint64_t)(slot / BLOCK_SIZE) * stride_block + slot % BLOCK_SIZE * stride_token);
    }

    __device__ __forceinline__ Plan& plan(uint32_t which) const { return reinterpret_cast<Plan&>(*(mine() + PLANS_AT + PLAN_BYTES * which)); }

    __device__ __forceinline__ Planner& planner() const { return reinterpret_cast<Planner&>(*(mine() + PLANS_AT + 2 * PLAN_BYTES)); }

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c) {
            lost[c][0] = lost[c][1] = kept[c] = 0.0f;
#pragma unroll
            for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
                for (int i = 0; i < 4; ++i) output[c][tile][i] = 0.0f;
        }
        ring_begin = ring_end = rows_read = 0;
    }

    // what `begin_piece` has left
    __device__ __forceinline__ void take_terms() {
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                threshold[c][e] = thresholds_of(parity)[8 * c + 2 * t + e];
                offset[c][e] = threshold[c][e] * -LOG2_E;
            }
            maximum[c] = thresholds_of(parity)[8 * c + g % HEADS];
            if (HOLDS_QUERIES)
#pragma unroll
                for (int i = 0; i < KEY_PARTS; ++i)
                    query[c][i] = query_in_memory(c, i);
        }
    }

    // lanes of columns without a head take another's
    __device__ __forceinline__ uint4 query_in_memory(uint32_t c, uint32_t i) const {
        return *reinterpret_cast<const uint4*>(queries_of(parity) + (8 * c + g % HEADS) * QUERY_STRIDE + 64 * i + 16 * t);
    }

    // ---- keys arrive ----
    __device__ __forceinline__ int load_slots(const PieceTokens& tokens, const int* blocks, uint32_t first_stage) const {
        uint32_t position = tokens.start + STAGE_TOKENS * (warp + WARPS * (first_stage + lane));
        return position < uint32_t(tokens.end) ? blocks[position / BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE : 0;
    }

    __device__ __forceinline__ void request_keys(uint32_t stage) {
        if (stage % 32 == 0 && stage) {
            slots_before = slots, slots = next_slots;
            next_slots = load_slots(plan(parity).tokens, blocks, stage + 32);
        }
        if (stage < num_stages) {
            const uint8_t* from = row_of(__shfl_sync(ALL, slots, stage % 32));
            constexpr uint32_t ROWS = 32 / CHUNKS;  // at a time
            uint32_t row = lane / CHUNKS, chunk = lane % CHUNKS, place = 16 * chunk ^ twist_of(row);
            opaque(place);  // not to be kept for every k
            uint8_t* to = mine() + (stage % STAGES * STAGE_BYTES + row * ROW_BYTES);
            from += row * stride_token + 16 * chunk;
#pragma unroll
            for (uint32_t k = 0; k < CHUNKS / 2; ++k)
                async_copy16(to + ROWS * k * ROW_BYTES + (place ^ twist_of(ROWS * k)), from + ROWS * k * stride_token);
        }
        async_commit();
    }

    // of the first token of a stage, if no stage behind `requested` was requested
    __device__ __forceinline__ uint32_t slot_of(uint32_t stage, uint32_t requested) const {
        return __shfl_sync(ALL, requested / 32 == stage / 32 ? slots : slots_before, stage % 32);
    }

    // Plan a piece, or that there is none; where its keys are is on its way.
    __device__ __forceinline__ void set_plan(const Args& a, uint32_t which, const PieceTokens& tokens, uint32_t share, bool is_there) {
        if (lane == 0) plan(which) = {tokens, share, is_there};
        __syncwarp();
        if (is_there) planned_slots = load_slots(tokens, a.block_table + (long long)tokens.seq * a.table_stride, 0);
    }

    // Go on with the planned piece, whose number is `parity`: ask for its first keys.
    __device__ __forceinline__ void begin(const Args& a) {
        const Plan& next = plan(parity);
        const PieceTokens& tokens = next.tokens;
        start = tokens.start, end = tokens.end, is_dense = tokens.is_dense;
        uint32_t total = divide_up(end - start, STAGE_TOKENS);
        num_stages = total > warp ? divide_up(total - warp, WARPS) : 0;
        middle = total / (2 * WARPS);
        open_start = open_start_of(tokens);
        blocks = a.block_table + (long long)tokens.seq * a.table_stride;
        kv_base = a.kv_cache + (uint64_t)(next.share % a.num_kv_heads) * a.stride_head;
        slots_before = 0, slots = planned_slots, next_slots = num_stages > 32 ? load_slots(tokens, blocks, 32) : 0;
#pragma unroll
        for (uint32_t stage = 0; stage < STAGES - 1; ++stage) request_keys(stage);
    }

    // ---- values of sixteen survivors ----
    // ask for them; number i of them is in slot `slot_at(i)`
    template <class SlotAt>
    __device__ __forceinline__ void request_values(SlotAt slot_at) {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            const uint8_t* value = row_of(slot_at(2 * t + (k & 1) + 8 * (k >> 1))) + (ROW_BYTES + 16 * g);
#pragma unroll
            for (int i = 0; i < VALUE_PARTS; ++i) pending[k][i] = load16(value + 128 * i);
        }
        ring_begin += 16;
    }

    __device__ __forceinline__ void request_listed() {
        const uint32_t* listed = ring_slots() + ring_begin % ROOM;
        request_values([&](uint32_t index) { return listed[index]; });
    }

    __device__ __forceinline__ void weigh_values() {
        const float* of_lane = ring_scores() + (ring_begin - 16) % ROOM + 2 * t;
        uint32_t operand[COLUMNS][2];
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c) {
            // lanes of columns without a head take another's, and nobody looks at what comes of it
            const float* of_head = of_lane + (8 * c + g % HEADS) * SCORE_STRIDE;
            float2 low = *reinterpret_cast<const float2*>(of_head), high = *reinterpret_cast<const float2*>(of_head + 8);
            float best = fmaxf(fmaxf(low.x, low.y), fmaxf(high.x, high.y));
            best = fmaxf(best, __shfl_xor_sync(ALL, best, 1));
            best = fmaxf(best, __shfl_xor_sync(ALL, best, 2));
            bool is_higher = best > maximum[c] + SLACK;
            if (__ballot_sync(ALL, is_higher)) {
                float factor = is_higher ? exp2_fast((maximum[c] - best) * LOG2_E) : 1.0f;
                if (is_higher) maximum[c] = best;
                kept[c] *= factor;
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    float of_sums = __shfl_sync(ALL, factor, 4 * (2 * t + e));
#pragma unroll
                    for (int tile = 0; tile < TILES; ++tile) output[c][tile][e] *= of_sums, output[c][tile][2 + e] *= of_sums;
                }
            }
            float offset = maximum[c] * -LOG2_E;
            low.x = exp2_fast(__fmaf_rn(low.x, LOG2_E, offset)), low.y = exp2_fast(__fmaf_rn(low.y, LOG2_E, offset));
            high.x = exp2_fast(__fmaf_rn(high.x, LOG2_E, offset)), high.y = exp2_fast(__fmaf_rn(high.y, LOG2_E, offset));
            operand[c][0] = pack_half<IS_FLOAT16>(low.x, low.y), operand[c][1] = pack_half<IS_FLOAT16>(high.x, high.y);
            // as they are rounded: then a key that outweighs all others has a weight of 1
#pragma unroll
            for (int k = 0; k < 2; ++k)
                kept[c] += element_to_float<IS_FLOAT16>(uint16_t(operand[c][k])) + element_to_float<IS_FLOAT16>(uint16_t(operand[c][k] >> 16));
        }
#pragma unroll
        for (int i = 0; i < VALUE_PARTS; ++i) {
            uint32_t part[4][4];
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                uint4 v = pending[k][i];
                part[k][0] = v.x, part[k][1] = v.y, part[k][2] = v.z, part[k][3] = v.w;
            }
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                uint32_t a0 = permute_bytes(part[0][j], part[1][j], 0x5410), a1 = permute_bytes(part[0][j], part[1][j], 0x7632);
                uint32_t a2 = permute_bytes(part[2][j], part[3][j], 0x5410), a3 = permute_bytes(part[2][j], part[3][j], 0x7632);
#pragma unroll
                for (int c = 0; c < COLUMNS; ++c)
                    mma_half<IS_FLOAT16>(output[c][4 * i + j], a0, a1, a2, a3, operand[c][0], operand[c][1]);
            }
        }
    }

    // channel of row g of a tile; row g + 8 has the next one
    static __device__ __forceinline__ uint32_t channel_of(uint32_t tile, uint32_t g) { return tile / 4 * 64 + 8 * g + tile % 4 * 2; }

    // ---- 16 tokens ----
    __device__ __forceinline__ uint4 query_part(uint32_t c, uint32_t i) const {
        if constexpr (HOLDS_QUERIES) return query[c][i];
        return query_in_memory(c, i);
    }

    // products of the tokens of a stage, in two halves, so that none waits for all others
    __device__ __forceinline__ void multiply(uint32_t stage, float (&products)[COLUMNS][2][4]) const {
        const uint8_t* keys = mine() + (stage % STAGES * STAGE_BYTES + g * ROW_BYTES);
        uint32_t place = 16 * t ^ twist_of(g);
        opaque(place);
#pragma unroll
        for (int i = 0; i < KEY_PARTS; ++i) {
            const uint4 k = *reinterpret_cast<const uint4*>(keys + (place ^ 64 * i));
            const uint4 l = *reinterpret_cast<const uint4*>(keys + 8 * ROW_BYTES + (place ^ 64 * i));
#pragma unroll
            for (int c = 0; c < COLUMNS; ++c) {
                const uint4 q = query_part(c, i);
                mma_half<IS_FLOAT16>(products[c][0], k.x, l.x, k.y, l.y, q.x, q.y);
                mma_half<IS_FLOAT16>(products[c][1], k.z, l.z, k.w, l.w, q.z, q.w);
            }
        }
    }

    __device__ __forceinline__ float score_of(const float (&products)[2][4], uint32_t r, int e) const {
        return capped((products[0][2 * r + e] + products[1][2 * r + e]) * scale, logits_soft_cap);
    }

    // `SPECIAL` stages hold positions behind the end, or of the open page.
    template <bool SPECIAL>
    __device__ __forceinline__ void scan(uint32_t stage, uint32_t first) {
        float products[COLUMNS][2][4] = {};
        multiply(stage, products);
        uint32_t slot = slot_of(stage, stage + STAGES - 1);
#pragma unroll
        for (uint32_t r = 0; r < 2; ++r) {
            uint32_t position = first + g + 8 * r;
            bool is_inside = !SPECIAL || position < end, survives = false, keep[COLUMNS][2];
            float score[COLUMNS][2];
#pragma unroll
            for (int c = 0; c < COLUMNS; ++c)
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    float s = score_of(products[c], r, e);
                    score[c][e] = s;
                    keep[c][e] = is_inside && s >= threshold[c][e];
                    survives |= keep[c][e];
                    float exponential = exp2_fast(__fmaf_rn(s, LOG2_E, offset[c][e]));
                    if (is_inside && !keep[c][e]) lost[c][e] += exponential;
                }
            uint32_t survivors = __ballot_sync(ALL, survives);
            if (survivors == 0) continue;
            survivors |= survivors >> 1;
            survivors = (survivors | survivors >> 2) & 0x11111111u;
            uint32_t leader = 1u << (lane & ~3u);
            if (survivors & leader) {
                uint32_t index = (ring_end + __popc(survivors & (leader - 1))) % ROOM;
                float* of_token = ring_scores() + index;
#pragma unroll
                for (int c = 0; c < COLUMNS; ++c)
#pragma unroll
                    for (int e = 0; e < 2; ++e)
                        if (8 * c + 2 * t + e < HEADS) of_token[(8 * c + 2 * t + e) * SCORE_STRIDE] = keep[c][e] ? score[c][e] : DISCARDED;
                if (t == 0) ring_slots()[index] = slot + g + 8 * r;
            }
            ring_end += __popc(survivors);
            rows_read += __popc(SPECIAL ? survivors & before_open(first + 8 * r) : survivors);
        }
    }

    // leaders of tokens from `first` on that are not of the open page
    __device__ __forceinline__ uint32_t before_open(uint32_t first) const {
        uint32_t number = open_start > first ? min(open_start - first, 8u) : 0u;
        return number == 8 ? ALL : (1u << 4 * number) - 1;
    }

    // Stages from `stage` to `last`; in the end some values are pending, or not even asked for.
    __device__ __forceinline__ void run_sparse(uint32_t stage, uint32_t last) {
        uint32_t first = start + STAGE_TOKENS * (warp + WARPS * stage), special = min(end, open_start);
        for (; stage < last; ++stage, first += STAGE_TOKENS * WARPS) {
            async_wait<STAGES - 2>();
            __syncwarp();
            // what is written to was read in the stage before
            request_keys(stage + STAGES - 1);
            if (first + STAGE_TOKENS > special)
                scan<true>(stage, first);
            else
                scan<false>(stage, first);
            __syncwarp();
            if (ring_end - ring_begin >= 16) {
                if (ring_begin) weigh_values();
                request_listed();
            }
        }
    }

    __device__ __forceinline__ void request_last() {
        if (ring_end == ring_begin) return;
        if (ring_begin) weigh_values();
        // the last key again, with weight 0
        uint32_t last = ring_slots()[(ring_end - 1) % ROOM];
        __syncwarp();
        if (lane < ring_begin + 16 - ring_end) {
            uint32_t index = (ring_end + lane) % ROOM;
            ring_slots()[index] = last;
            for (uint32_t head = 0; head < HEADS; ++head) ring_scores()[head * SCORE_STRIDE + index] = DISCARDED;
        }
        __syncwarp();
        request_listed();
    }

    // Where every key is kept, values are asked for before their keys are scored.
    __device__ __forceinline__ void run_dense(uint32_t stage, uint32_t last) {
        uint32_t first = start + STAGE_TOKENS * (warp + WARPS * stage);
        auto request = [&](uint32_t stage, uint32_t from, uint32_t requested) {
            uint32_t slot = slot_of(stage, requested), last = min(STAGE_TOKENS, end - from) - 1;
            request_values([&](uint32_t index) { return slot + min(index, last); });
        };
        if (ring_begin == 0 && num_stages) request(0, first, 0);
        for (; stage < last; ++stage, first += STAGE_TOKENS * WARPS) {
            async_wait<STAGES - 2>();
            __syncwarp();
            request_keys(stage + STAGES - 1);
            float products[COLUMNS][2][4] = {};
            multiply(stage, products);
            float* of_stage = ring_scores() + (ring_begin - 16) % ROOM + g;
#pragma unroll
            for (int c = 0; c < COLUMNS; ++c)
#pragma unroll
                for (int e = 0; e < 2; ++e)
#pragma unroll
                    for (uint32_t r = 0; r < 2; ++r)
                        if (8 * c + 2 * t + e < HEADS)
                            of_stage[(8 * c + 2 * t + e) * SCORE_STRIDE + 8 * r] =
                                first + g + 8 * r < end ? score_of(products[c], r, e) : DISCARDED;
            __syncwarp();
            if (stage + 1 == num_stages) break;
            weigh_values();
            request(stage + 1, first + STAGE_TOKENS * WARPS, stage + STAGES - 1);
        }
    }

    // what the stages have left
    __device__ __forceinline__ void finish() {
        if (ring_begin) weigh_values();
        __syncwarp();
    }
};

// Queries and thresholds of a planned piece, for all warps.
__device__ __forceinline__ void load_queries(const Args& a, const PieceTokens& tokens, uint32_t kv_head, uint32_t which) {
    const uint8_t* query = a.query + (uint64_t)tokens.seq * a.query_stride_seq + (uint64_t)kv_head * GROUP * a.query_stride_head;
    for (uint32_t i = threadIdx.x; i < HEADS * CHUNKS; i += 32 * WARPS) {
        uint32_t head = i / CHUNKS, chunk = i % CHUNKS;
        *reinterpret_cast<uint4*>(queries_of(which) + head * QUERY_STRIDE + 16 * chunk) =
            head < GROUP ? load16(query + head * a.query_stride_head + 16 * chunk) : make_uint4(0, 0, 0, 0);
    }
}

__device__ __forceinline__ void load_thresholds(const Args& a, const PieceTokens& tokens, uint32_t kv_head, uint32_t which) {
    if (threadIdx.x >= 16) return;
    const float* thresholds = a.thresholds + ((long long)tokens.seq * a.num_kv_heads + kv_head) * GROUP;
    bool is_there = threadIdx.x < GROUP;
    thresholds_of(which)[threadIdx.x] = !is_there ? HIGHEST : tokens.is_dense ? -HIGHEST : thresholds[threadIdx.x];
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
__device__ __forceinline__ uint32_t rows_of(const PieceTokens& tokens) {
    if (tokens.is_dense) return tokens.end - tokens.start;
    const uint32_t* counts = reinterpret_cast<const uint32_t*>(dynamic_shared() + COUNTS_AT);
    uint32_t rows = max(tokens.end - max(tokens.start, int(open_start_of(tokens))), 0);
    for (int warp = 0; warp < WARPS; ++warp) rows += counts[warp];
    return rows;
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, RESIDENT) value_split(const __grid_constant__ Args a) {
    uint32_t lane = threadIdx.x & 31, warp = threadIdx.x / 32;
    allow_successor();
    Step step = step_of(a, lane);
    Warp w;
    w.at = warp * WARP_BYTES, w.warp = warp, w.lane = lane, w.g = lane / 4, w.t = lane % 4, w.parity = 0;
    w.stride_block = a.stride_block, w.stride_token = a.stride_token;
    w.scale = a.softmax_scale * (a.q_scale ? *a.q_scale : 1.0f) * (a.k_scale ? *a.k_scale : 1.0f);
    w.logits_soft_cap = a.logits_soft_cap;
    uint32_t num_heads = a.num_kv_heads, share = blockIdx.x, taken = 0;
    uint32_t num_shares = num_heads * a.schedule.num_programs * rounds_of(a.schedule, step);
    uint32_t* next_share = reinterpret_cast<uint32_t*>(dynamic_shared() + COUNTS_AT) + 15;
    PieceTokens tokens;
    Walk walk = walk_of(a, step, share / num_heads, lane);
    bool has_piece = share < num_shares && next_piece(a, step, walk, tokens), takes_more = num_shares > gridDim.x;
    if (has_piece) {
        w.set_plan(a, 0, tokens, share, true);
        w.begin(a);
        load_queries(a, tokens, share % num_heads, 0);
    }
    // in any case: whoever waits for this kernel relies on the one before it too
    wait_for_predecessor();
    if (has_piece) load_thresholds(a, tokens, share % num_heads, 0);
    if (lane == 0) w.planner() = {step, walk, share};
    __syncwarp();
    bool is_new = true;  // the share
    while (has_piece) {
        // long before it is needed
        if (is_new && takes_more && threadIdx.x == 0) taken = gridDim.x + atomic_increment(a.taken);
        w.clear();
        __syncthreads();
        w.take_terms();
#pragma unroll 1
        for (int half = 0; half < 2; ++half) {
            uint32_t from = half ? w.middle : 0, to = half ? w.num_stages : w.middle;
            if (w.is_dense)
                w.run_dense(from, to);
            else
                w.run_sparse(from, to);
            if (half) break;
            // plan the next piece, so that its keys follow on these
            if (threadIdx.x == 0) *next_share = taken;
            __syncthreads();
            const Step step = w.planner().step;
            Walk walk = w.planner().walk;
            share = w.planner().share;
            is_new = false;
            has_piece = next_piece(a, step, walk, tokens);
            while (!has_piece && takes_more) {
                share = *next_share, is_new = true;
                if (share >= num_heads * a.schedule.num_programs * rounds_of(a.schedule, step)) break;
                walk = walk_of(a, step, share / num_heads, lane);
                has_piece = next_piece(a, step, walk, tokens);
                if (has_piece) break;
                // shares without a token are possible where they are tiny
                __syncthreads();
                if (threadIdx.x == 0) *next_share = gridDim.x + atomic_increment(a.taken);
                __syncthreads();
            }
            __syncwarp();
            if (lane == 0) w.planner().walk = walk, w.planner().share = share;
            w.set_plan(a, w.parity ^ 1, tokens, share, has_piece);
            if (has_piece) {
                load_queries(a, tokens, share % num_heads, w.parity ^ 1);
                load_thresholds(a, tokens, share % num_heads, w.parity ^ 1);
            }
        }
        if (!w.is_dense) w.request_last();
        w.parity ^= 1;
        if (has_piece) w.begin(a);
        w.finish();
        share_sums(w);
        __syncthreads();
        const Plan& done = w.plan(w.parity ^ 1);
        uint32_t kv_head = done.share % num_heads, program = done.share / num_heads;
        write_piece(a, (long long)(program + done.tokens.seq) * num_heads + kv_head, thresholds_of(w.parity ^ 1));
        if (threadIdx.x == 0 && a.value_rows_read) atomic_add(a.value_rows_read + kv_head, rows_of(done.tokens));
    }
}

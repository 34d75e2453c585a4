// Tiers on the device, in CUDA C++: what `tier_split.py` does in Triton, nearer to the limit of the memory.
//
// A program has a share of a kv head's keys (`schedule.py`), and its warps take steps of 32 tokens in turn, so that
// clustered keys are everybody's. A warp needs no other until the end of a piece:
//
//   scan    codes and steps of keys arrive in a ring of stages in shared memory. Tokens are the rows of products of
//           integers, heads the columns; where a group has at most four heads, two tokens share a row. Halves of bytes
//           become operands by one AND: the upper half is 16 times too large, and the lower product is multiplied by 16.
//   light   keys go to a ring of 64 with their weights, relative to the anchors, which no light key reaches. Sixteen at a
//           time, their codes are asked for; they are weighed when the next sixteen are asked for, so nothing waits.
//   heavy   keys go to a list. In the end, or when a list is full, which is rare, the warps share out what all of them
//           have listed: keys are read and scored exactly, and the values of survivors weighed. Not in between, because
//           both at a time do not fit into the registers.
//
// Loads go straight into the operands of mma.sync: a product may take channels in any order if both sides take the same,
// so every lane reads 16 bytes in a row. Sums are added in an order that depends on lengths and scores only.
//
// What `macros_of` in tier_split.py names is defined when it is compiled; `device.cuh` stands in front.

#include "schedule.cuh"
#include "scores.cuh"

constexpr uint32_t HALF = HEAD_SIZE / 2, QUARTER = HEAD_SIZE / 4;
constexpr uint32_t STEP = 32;                                 // tokens
constexpr int ROW_TOKENS = GROUP <= 4 ? 2 : 1;                // tokens that share a row of a product with codes
constexpr int SETS = 2 / ROW_TOKENS;                          // of 16 rows in a step
constexpr int COLUMNS = GROUP > 8 ? 2 : 1;                    // blocks of eight columns
constexpr int HEADS = ROW_TOKENS == 2 ? 4 : 8 * COLUMNS;      // that the scan has columns for
constexpr int KEY_WORDS = HEAD_SIZE / 32;                     // words of a key's codes that a lane of its quad has
constexpr int VALUE_BYTES = HEAD_SIZE / 32;                   // of a value's codes that each of eight lanes has
constexpr int VALUE_WORDS = (VALUE_BYTES + 3) / 4;
constexpr int TILES = HEAD_SIZE / 16;                         // of 16 channels
constexpr uint32_t ACC_QUAD = GROUP <= 4 ? 2 : 4;             // lanes of a quad that have columns of heads
constexpr uint32_t STAGE_STEPS = HEAD_SIZE <= 128 ? 2 : 1;    // of a stage of the ring
constexpr uint32_t STAGE_TOKENS = STAGE_STEPS * STEP, STAGE_SLOTS = STAGE_TOKENS / 16;
constexpr uint32_t FETCH_STAGES = 32 / STAGE_SLOTS;           // that a warp looks up blocks for at a time
constexpr uint32_t LIGHT_ROOM = 64, LIGHT_STRIDE = 72;        // the stride spreads heads over the banks
constexpr uint32_t HEAVY_ROOM = 256, IS_DONE = 1u << 31;
constexpr float LEAST_STEP = 5.9604644775390625e-08f, LARGEST_HALF = 65504.0f;

// bytes of shared memory: what every warp has, and behind that what all have together
constexpr uint32_t STEPS_AT = STAGE_TOKENS * HALF, STAGE_BYTES = STEPS_AT + 2 * STAGE_TOKENS;
// in the end, sums stand where the ring was
constexpr uint32_t SUMS_BYTES = COLUMNS * TILES * 8 * ACC_QUAD * 16, LIGHT_AT = 0, EXACT_AT = SUMS_BYTES;
constexpr uint32_t IDS_AT = STAGES * STAGE_BYTES > 2 * SUMS_BYTES ? STAGES * STAGE_BYTES : 2 * SUMS_BYTES;
constexpr uint32_t WEIGHTS_AT = IDS_AT + 64 * 4;
constexpr uint32_t SLOTS_AT = WEIGHTS_AT + HEADS * LIGHT_STRIDE * 4, HEAVY_AT = SLOTS_AT + LIGHT_ROOM * 4;
constexpr uint32_t WARP_BYTES = HEAVY_AT + HEAVY_ROOM * 4;
constexpr uint32_t QUERY_STRIDE = 2 * HEAD_SIZE + 64;
constexpr uint32_t PIECE_AT = WARPS * WARP_BYTES, QUERY_AT = PIECE_AT + 64, STATS_AT = QUERY_AT + 8 * COLUMNS * QUERY_STRIDE;
constexpr uint32_t NUM_STATS = 5, COUNTS_AT = STATS_AT + WARPS * NUM_STATS * 16 * 4;
constexpr uint32_t OPERANDS = ROW_TOKENS * COLUMNS, OPERAND_BYTES = 32 * KEY_WORDS * 4;  // codes of queries, one half
constexpr uint32_t OPERANDS_AT = COUNTS_AT + WARPS * 16, TERMS_AT = OPERANDS_AT + 2 * OPERANDS * OPERAND_BYTES;
constexpr uint32_t LISTED_AT = TERMS_AT + 16 * 3 * 4, SHARED_BYTES = LISTED_AT + 64;  // at most 16 warps
static_assert(STAGE_BYTES % 16 == 0 && WARP_BYTES % 16 == 0 && QUERY_STRIDE % 16 == 0, "copies of 16 bytes");
static_assert(SHARED_BYTES == EXPECTED_SHARED_BYTES, "the launch asks for what is used");

struct Args {
    const uint8_t* kv_cache;
    const int* block_table;
    const int* seq_lens;
    const float* threshold_offset;  // or null
    const uint8_t* query;
    const float* thresholds;
    const float* anchor_lse;
    const float* q_scale;  // or null
    const float* k_scale;  // or null
    uint8_t* codes;
    const float* rotation;
    float* piece_output;
    float* piece_stats;
    float* saved;  // [programs * kv heads * WARPS, SAVED, 32], where a warp's sums wait while it scans
    long long* keys_read;  // this and the next two are null if nothing is counted
    long long* value_rows_read;
    long long* copies_read;
    uint32_t stride_block, stride_head, stride_token;  // bytes
    uint32_t query_stride_seq, query_stride_head;
    uint32_t code_stride_block, code_stride_head;
    int table_stride, num_seqs, num_kv_heads;
    int max_dense_len, min_step_tokens, few_tokens, short_length;
    ScheduleArgs schedule;
    float softmax_scale, logits_soft_cap, log_heavy;
    float log2_scale;  // light weights are by that power of two too large, so that float16 holds their products with steps
};

// ---- rows in rotated channels ----
constexpr int LANE_CHANNELS = HEAD_SIZE / 32;  // a lane has channels LANE_CHANNELS * lane + i

__device__ __forceinline__ void load_row(const uint8_t* row, uint32_t lane, float (&x)[LANE_CHANNELS]) {
    uint32_t words[LANE_CHANNELS / 2];
    if constexpr (LANE_CHANNELS == 2) {
        words[0] = load4(row + 4 * lane);
    } else if constexpr (LANE_CHANNELS == 4) {
        uint2 v = load8(row + 8 * lane);
        words[0] = v.x, words[1] = v.y;
    } else {
        uint4 v = load16(row + 16 * lane);
        words[0] = v.x, words[1] = v.y, words[LANE_CHANNELS / 2 - 2] = v.z, words[LANE_CHANNELS / 2 - 1] = v.w;
    }
#pragma unroll
    for (int i = 0; i < LANE_CHANNELS; ++i) x[i] = element_to_float<IS_FLOAT16>(uint16_t(words[i / 2] >> 16 * (i % 2)));
}

// Hadamard's transform of a warp's row, not normalised
__device__ __forceinline__ void transform(float (&x)[LANE_CHANNELS], uint32_t lane) {
#pragma unroll
    for (int m = 1; m < LANE_CHANNELS; m *= 2)
#pragma unroll
        for (int i = 0; i < LANE_CHANNELS; ++i)
            if (!(i & m)) {
                float other = x[i + m];
                x[i + m] = x[i] - other, x[i] += other;
            }
#pragma unroll
    for (int m = 1; m < 32; m *= 2)
#pragma unroll
        for (int i = 0; i < LANE_CHANNELS; ++i) {
            float other = __shfl_xor_sync(ALL, x[i], m);
            x[i] = lane & m ? other - x[i] : x[i] + other;
        }
}

// R x; the first row of R is the signs over the root of the size
__device__ __forceinline__ void rotate(const float* rotation, float (&x)[LANE_CHANNELS], uint32_t lane) {
#pragma unroll
    for (int i = 0; i < LANE_CHANNELS; ++i) x[i] *= rotation[LANE_CHANNELS * lane + i];
    transform(x, lane);
}

// what keys are centred by: the mean of the first anchors but one
__device__ __forceinline__ void load_centre(const uint8_t* first_row, uint32_t stride_token, uint32_t lane, float (&centre)[LANE_CHANNELS]) {
    float rows[NUM_FIRST_ANCHORS - 1][LANE_CHANNELS];
#pragma unroll
    for (int i = 1; i < NUM_FIRST_ANCHORS; ++i) load_row(first_row + i * stride_token, lane, rows[i - 1]);
#pragma unroll
    for (int k = 0; k < LANE_CHANNELS; ++k) {
        centre[k] = 0.0f;
#pragma unroll
        for (int i = 0; i < NUM_FIRST_ANCHORS - 1; ++i) centre[k] += rows[i][k];
        centre[k] /= NUM_FIRST_ANCHORS - 1;
    }
}

__device__ __forceinline__ float largest_of(const float (&x)[LANE_CHANNELS]) {
    float largest = 0.0f;
#pragma unroll
    for (int i = 0; i < LANE_CHANNELS; ++i) largest = fmaxf(largest, fabsf(x[i]));
#pragma unroll
    for (int m = 1; m < 32; m *= 2) largest = fmaxf(largest, __shfl_xor_sync(ALL, largest, m));
    return largest;
}

// LANE_CHANNELS bytes
__device__ __forceinline__ void store_bytes(uint8_t* to, const uint32_t (&bytes)[LANE_CHANNELS]) {
    if constexpr (LANE_CHANNELS == 2) {
        *reinterpret_cast<uint16_t*>(to) = bytes[0] | bytes[1] << 8;
    } else {
#pragma unroll
        for (int i = 0; i < LANE_CHANNELS; i += 4)
            *reinterpret_cast<uint32_t*>(to + i) = bytes[i] | bytes[i + 1] << 8 | bytes[i + 2] << 16 | bytes[i + 3] << 24;
    }
}

__device__ __forceinline__ float clamp(float x, float lowest, float highest) { return fminf(fmaxf(x, lowest), highest); }

__device__ __forceinline__ uint16_t half_of(float step) { return uint16_t(pack_half<true>(clamp(step, LEAST_STEP, LARGEST_HALF), 0.0f)); }

// ---- what the warps of a program have in common while they work on a piece, in shared memory ----
struct Piece {
    const uint8_t* kv_base;  // where the keys of the kv head start
    const float* thresholds;
    float scale, logits_soft_cap;
    uint32_t stride_block, stride_token, open_block;
    int is_dense;
};
static_assert(sizeof(Piece) <= QUERY_AT - PIECE_AT, "room of a piece");

__device__ __forceinline__ Piece& piece_of(uint8_t* shared) { return *reinterpret_cast<Piece*>(shared + PIECE_AT); }

// where 4 sums of a block of columns and a tile stand: those of head 8 c + 2 t and of the next, in rows g and g + 8
__device__ __forceinline__ uint32_t sum_index(uint32_t c, uint32_t tile, uint32_t g, uint32_t t) {
    return ((c * TILES + tile) * 8 + g) * ACC_QUAD + t;
}

__device__ __forceinline__ void clear(float (&sums)[COLUMNS][TILES][4]) {
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c)
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
            for (int i = 0; i < 4; ++i) sums[c][tile][i] = 0.0f;
}

// ---- heavy keys ----
// The exact part of a warp's piece. A lane has heads 8 c + 2 t + e.
struct Exact {
    float maximum[COLUMNS][2], kept[COLUMNS][2], lost[COLUMNS][2], output[COLUMNS][TILES][4];
    int rows_read;
};

__device__ __forceinline__ const uint8_t* row_of(const Piece& piece, uint32_t slot) {
    return piece.kv_base + (uint64_t)(slot / BLOCK_SIZE) * piece.stride_block + slot % BLOCK_SIZE * piece.stride_token;
}

// 16 keys on their way; a lane has parts of keys g and g + 8
struct Keys {
    uint4 part[2][HEAD_SIZE / 32];
    bool listed[2], in_open[2];
};

// the first `count` of 16 slots
__device__ __forceinline__ Keys load_keys(const Piece& piece, const uint32_t* slots, uint32_t count) {
    uint32_t lane = threadIdx.x & 31, g = lane / 4, t = lane % 4;
    Keys keys;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        keys.listed[r] = g + 8 * r < count;
        uint32_t slot = keys.listed[r] ? slots[g + 8 * r] : 0;
        keys.in_open[r] = slot / BLOCK_SIZE == piece.open_block;
        const uint8_t* row = row_of(piece, slot) + 16 * t;
#pragma unroll
        for (int i = 0; i < HEAD_SIZE / 32; ++i)
            keys.part[r][i] = keys.listed[r] ? load16(row + 64 * i) : make_uint4(0, 0, 0, 0);
    }
    return keys;
}

__device__ __forceinline__ void attend_exactly(const Piece& piece, const uint32_t* slots, const Keys& keys, Exact& x) {
    uint32_t lane = threadIdx.x & 31, g = lane / 4, t = lane % 4;
    float products[COLUMNS][4] = {};
    const uint8_t* query = dynamic_shared() + QUERY_AT + g * QUERY_STRIDE + 16 * t;
#pragma unroll
    for (int i = 0; i < HEAD_SIZE / 32; ++i)
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c) {
            const uint4 q = *reinterpret_cast<const uint4*>(query + 8 * c * QUERY_STRIDE + 64 * i);
            const uint4 &k = keys.part[0][i], &l = keys.part[1][i];
            mma_half<IS_FLOAT16>(products[c], k.x, l.x, k.y, l.y, q.x, q.y);
            mma_half<IS_FLOAT16>(products[c], k.z, l.z, k.w, l.w, q.z, q.w);
        }
    bool survives[2] = {false, false};
    uint32_t operand[COLUMNS][2];
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c) {
        float weight[2][2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            uint32_t head = 8 * c + 2 * t + e;
            float theta = piece.is_dense || head >= GROUP ? -HIGHEST : piece.thresholds[head];
            float score[2], before = x.maximum[c][e], best = before;
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                score[r] = keys.listed[r] ? capped(products[c][2 * r + e] * piece.scale, piece.logits_soft_cap) : DISCARDED;
                best = fmaxf(best, score[r]);
            }
#pragma unroll
            for (int m = 4; m < 32; m *= 2) best = fmaxf(best, __shfl_xor_sync(ALL, best, m));
            float rescale = exp2_fast((before - best) * LOG2_E);
            float kept = x.kept[c][e] * rescale, lost = x.lost[c][e] * rescale;
#pragma unroll
            for (int tile = 0; tile < TILES; ++tile) x.output[c][tile][e] *= rescale, x.output[c][tile][2 + e] *= rescale;
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                float exponential = exp2_fast((score[r] - best) * LOG2_E);
                bool keep = keys.listed[r] && score[r] >= theta && head < GROUP;
                weight[r][e] = keep ? exponential : 0.0f;
                kept += weight[r][e];
                lost += keep || !keys.listed[r] ? 0.0f : exponential;
                survives[r] |= keep;
            }
            x.maximum[c][e] = best, x.kept[c][e] = kept, x.lost[c][e] = lost;
        }
        // keys become the depth of the next product
        operand[c][0] = transpose8(pack_half<IS_FLOAT16>(weight[0][0], weight[0][1]));
        operand[c][1] = transpose8(pack_half<IS_FLOAT16>(weight[1][0], weight[1][1]));
    }
    uint32_t alive[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        alive[r] = __ballot_sync(ALL, survives[r]);
        alive[r] |= alive[r] >> 1;
        alive[r] |= alive[r] >> 2;
        x.rows_read += t == 0 && (alive[r] >> lane & 1) && !keys.in_open[r];
    }
    // rows of values: of keys 2 t, 2 t + 1, and those 8 behind
    const uint8_t* value[4];
    bool is_read[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        uint32_t index = 2 * t + (k & 1);
        is_read[k] = alive[k >> 1] >> (4 * index) & 1;
        value[k] = row_of(piece, is_read[k] ? slots[index + 8 * (k >> 1)] : 0) + 2 * HEAD_SIZE + 16 * g;
    }
#pragma unroll
    for (int i = 0; i < HEAD_SIZE / 64; ++i) {
        uint32_t part[4][4];
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            uint4 v = is_read[k] ? load16(value[k] + 128 * i) : make_uint4(0, 0, 0, 0);
            part[k][0] = v.x, part[k][1] = v.y, part[k][2] = v.z, part[k][3] = v.w;
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            uint32_t a0 = permute_bytes(part[0][j], part[1][j], 0x5410), a1 = permute_bytes(part[0][j], part[1][j], 0x7632);
            uint32_t a2 = permute_bytes(part[2][j], part[3][j], 0x5410), a3 = permute_bytes(part[2][j], part[3][j], 0x7632);
#pragma unroll
            for (int c = 0; c < COLUMNS; ++c)
                mma_half<IS_FLOAT16>(x.output[c][4 * i + j], a0, a1, a2, a3, operand[c][0], operand[c][1]);
        }
    }
}

// where the sum of a head and a channel of `attend_exactly` stands, in floats
__device__ __forceinline__ uint32_t exact_index(uint32_t head, uint32_t channel) {
    uint32_t tile = channel / 64 * 4 + channel / 2 % 4;
    return 4 * sum_index(head / 8, tile, channel / 8 % 8, head % 8 / 2) + 2 * (channel % 2) + head % 2;
}

// ---- a warp's part of a piece ----
struct Warp {
    uint32_t at;                // where the warp's shared memory is
    uint32_t warp, lane, g, t;  // a lane is number t of quad g
    uint32_t start, end;
    int first_recent;
    const int* blocks;

    __device__ __forceinline__ uint8_t* mine() const { return dynamic_shared() + at; }
    __device__ __forceinline__ uint32_t* heavy() const { return reinterpret_cast<uint32_t*>(mine() + HEAVY_AT); }

    // by warp: how many keys it has listed, and IS_DONE if it has scanned all of its stages
    __device__ __forceinline__ uint32_t* listed() const { return reinterpret_cast<uint32_t*>(dynamic_shared() + LISTED_AT); }

    // Attend to this warp's share of `count` keys, the i-th of which is in slot `slot_at(i)`.
    template <class SlotAt>
    __device__ __forceinline__ void attend_keys(Exact& exact, uint32_t count, SlotAt slot_at) const {
        const Piece& piece = piece_of(dynamic_shared());
        uint32_t* slots = reinterpret_cast<uint32_t*>(mine() + SLOTS_AT);
        auto look_up = [&](uint32_t first, uint32_t* to) {
            if (lane < 16 && first + lane < count) to[lane] = slot_at(first + lane);
            __syncwarp();
            return first < count ? min(16u, count - first) : 0u;
        };
        uint32_t first = 16 * warp, number = look_up(first, slots);
        if constexpr (HEAD_SIZE <= 128) {
            // the next keys are on their way while these are scored and their values read
            Keys keys = load_keys(piece, slots, number);
            uint32_t half = 0;  // of the slots: of these keys; the other is of the next
            while (number) {
                first += 16 * WARPS;
                uint32_t next = look_up(first, slots + (half ^ 16));
                Keys next_keys = load_keys(piece, slots + (half ^ 16), next);
                attend_exactly(piece, slots + half, keys, exact);
                keys = next_keys, number = next, half ^= 16;
                __syncwarp();
            }
        } else {
            while (number) {
                attend_exactly(piece, slots, load_keys(piece, slots, number), exact);
                __syncwarp();
                first += 16 * WARPS, number = look_up(first, slots);
            }
        }
    }
};

struct Scan : Warp {
    const uint8_t* code_base;
    uint32_t code_stride;
    uint32_t keys_at, weights_at;  // of the lane
    uint32_t leader_bit, below;    // of the lane's token among the bits of a warp, and all bits before it
    int first_special;
    float logits_soft_cap;
    // of heads 8 c + 2 t + e, or 2 (t % 2) + e where two tokens share a row
    float scale[COLUMNS][2], middle[COLUMNS][2], offset[COLUMNS][2], light_limit[COLUMNS][2], heavy_limit[COLUMNS][2];
    float anchor[COLUMNS][2];
    // relative to the anchors, and 2^log2_scale times too large
    float kept[COLUMNS][2], lost[COLUMNS][2], light[COLUMNS][TILES][4];
    uint32_t light_begin, light_end, heavy_count;
    uint32_t pending[4][VALUE_WORDS], pending_steps[4];
    uint32_t next_ids;

    __device__ __forceinline__ uint32_t first_head() const { return ROW_TOKENS == 2 ? t % 2 * 2 : t * 2; }

    __device__ __forceinline__ Scan(const Warp& warp, const Args& a, int seq, int kv_head) : Warp(warp) {
        code_base = a.codes + (uint64_t)kv_head * a.code_stride_head;
        code_stride = a.code_stride_block;
        keys_at = at + g * HALF + t * KEY_WORDS * 4;
        weights_at = at + WEIGHTS_AT + first_head() * LIGHT_STRIDE * 4;
        leader_bit = 1u << (lane & (ROW_TOKENS == 2 ? ~1u : ~3u)), below = leader_bit - 1;
        first_special = min(first_recent, int(end)) - int(STEP);
        // as values that the compiler cannot work out again in every step
        opaque(code_base), opaque(keys_at), opaque(weights_at), opaque(leader_bit), opaque(below), opaque(first_special);
        logits_soft_cap = a.logits_soft_cap;
        uint32_t first_row = (seq * a.num_kv_heads + kv_head) * GROUP;
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                uint32_t head = 8 * c + first_head() + e, row = first_row + head;
                bool is_there = head < GROUP;
                light_limit[c][e] = is_there ? a.thresholds[row] : HIGHEST;
                float lse = is_there ? a.anchor_lse[row] : 0.0f;
                heavy_limit[c][e] = is_there ? lse + a.log_heavy : HIGHEST;
                anchor[c][e] = a.log2_scale - lse * LOG2_E;
                kept[c][e] = lost[c][e] = 0.0f;
            }
        clear(light);
        light_begin = light_end = heavy_count = 0;
    }

    // what `prepare` has left
    __device__ __forceinline__ void load_terms() {
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                uint32_t head = 8 * c + first_head() + e;
                bool is_there = head < GROUP;
                const float* terms = reinterpret_cast<const float*>(dynamic_shared() + TERMS_AT) + 3 * head;
                scale[c][e] = is_there ? terms[0] : 0.0f;
                middle[c][e] = is_there ? terms[1] : 0.0f;
                offset[c][e] = is_there ? terms[2] : DISCARDED;
            }
    }

    __device__ __forceinline__ uint32_t* ids() const { return reinterpret_cast<uint32_t*>(mine() + IDS_AT); }
    __device__ __forceinline__ float* weights() const { return reinterpret_cast<float*>(mine() + WEIGHTS_AT); }
    __device__ __forceinline__ uint32_t* slots() const { return reinterpret_cast<uint32_t*>(mine() + SLOTS_AT); }

    // ---- codes arrive ----
    // slots of the first tokens of each 16 in the stages from `stage` on
    __device__ __forceinline__ uint32_t load_ids(uint32_t stage) const {
        uint32_t position = start + STAGE_TOKENS * (warp + WARPS * (stage + lane / STAGE_SLOTS)) + 16 * (lane % STAGE_SLOTS);
        // behind the end block 0 is read: any bytes do
        return position < end ? blocks[position / BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE : 0;
    }

    __device__ __forceinline__ void keep_ids(uint32_t stage) {
        ids()[stage % (2 * FETCH_STAGES) * STAGE_SLOTS + lane] = next_ids;
        next_ids = load_ids(stage + FETCH_STAGES);
        __syncwarp();
    }

    __device__ __forceinline__ const uint8_t* page_of(uint32_t slot) const {
        return code_base + (uint64_t)(slot / BLOCK_SIZE) * code_stride;
    }

    __device__ __forceinline__ void request(uint32_t stage, uint32_t buffer) const {
        const uint32_t* slots = ids() + stage % (2 * FETCH_STAGES) * STAGE_SLOTS;
        uint8_t* to = mine() + buffer + 16 * lane;
#pragma unroll
        for (uint32_t i = 0; i < STAGE_SLOTS; i += 2) {
            uint2 slot = *reinterpret_cast<const uint2*>(slots + i);
#pragma unroll
            for (uint32_t j = 0; j < 2; ++j) {
                uint32_t first = j ? slot.y : slot.x, in_page = BLOCK_SIZE == 16 ? 0 : first % BLOCK_SIZE;
                const uint8_t* keys = page_of(first) + (in_page * HALF + 16 * lane);
#pragma unroll
                for (uint32_t k = 0; k < HALF / 32; ++k) async_copy16(to + (i + j) * 16 * HALF + 512 * k, keys + 512 * k);
            }
        }
        if (lane < 2 * STAGE_SLOTS) {
            uint32_t slot = slots[lane / 2];
            const uint8_t* steps = page_of(slot) + (BLOCK_SIZE * (HALF + QUARTER) + slot % BLOCK_SIZE * 2 + 16 * (lane % 2));
            async_copy16(to + STEPS_AT, steps);
        }
    }

    // ---- light keys, 16 of the ring ----
    __device__ __forceinline__ void request_light() {
        const uint32_t* of_lane = slots() + light_begin % LIGHT_ROOM + 2 * t;
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            uint32_t slot = of_lane[(k & 1) + 8 * (k >> 1)], in_page = slot % BLOCK_SIZE;
            const uint8_t* page = page_of(slot);
            const uint8_t* code = page + (in_page * QUARTER + BLOCK_SIZE * HALF + g * VALUE_BYTES);
            if constexpr (VALUE_BYTES == 2) {
                pending[k][0] = load2(code);
            } else if constexpr (VALUE_BYTES == 4) {
                pending[k][0] = load4(code);
            } else {
                uint2 v = load8(code);
                pending[k][0] = v.x, pending[k][VALUE_WORDS - 1] = v.y;
            }
            pending_steps[k] = load2(page + (2 * in_page + BLOCK_SIZE * (HALF + QUARTER + 2)));
        }
        light_begin += 16;
    }

    __device__ __forceinline__ void weigh_light() {
        const float* of_lane = weights() + (light_begin - 16) % LIGHT_ROOM + 2 * t;
        float step[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) step[k] = half_to_float(pending_steps[k]);
        uint32_t operand[COLUMNS][2];
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c)
#pragma unroll
            for (int k = 0; k < 2; ++k) {
                // lanes of columns without a head take another's, and nobody looks at what comes of it
                const float* of_head = of_lane + (8 * c + g % HEADS) * LIGHT_STRIDE + 8 * k;
                float2 v = *reinterpret_cast<const float2*>(of_head);
                float first = fminf(v.x * step[2 * k], LARGEST_HALF), second = fminf(v.y * step[2 * k + 1], LARGEST_HALF);
                operand[c][k] = pack_half<true>(first, second);
            }
#pragma unroll
        for (int b = 0; b < VALUE_BYTES; ++b) {
            // a code becomes the lowest bits of a float16 from 1,024 on, which is then made the level
            uint32_t level[2][4];
#pragma unroll
            for (int k = 0; k < 2; ++k) {
                uint32_t selector = 0x4400 + b % 4 * 0x1111;
                uint32_t both = permute_bytes(pending[2 * k][b / 4], pending[2 * k + 1][b / 4], selector);
                level[k][0] = fma_half2((both << 2 & 0x000c000c) | 0x64006400, 0x34003400, 0xdc06dc06);  // x / 4 - 257.5
                level[k][1] = fma_half2((both & 0x000c000c) | 0x64006400, 0x34003400, 0xdc06dc06);
                level[k][2] = fma_half2((both & 0x00300030) | 0x64006400, 0x2c002c00, 0xd418d418);  // x / 16 - 65.5
                level[k][3] = fma_half2((both & 0x00c000c0) | 0x64006400, 0x24002400, 0xcc60cc60);  // x / 64 - 17.5
            }
#pragma unroll
            for (int c = 0; c < COLUMNS; ++c)
#pragma unroll
                for (int i = 0; i < 2; ++i)
                    mma_half<true>(light[c][2 * b + i], level[0][2 * i], level[0][2 * i + 1], level[1][2 * i],
                                   level[1][2 * i + 1], operand[c][0], operand[c][1]);
        }
    }

    // where the sum of a head and a rotated channel of `weigh_light` stands, in floats
    static __device__ __forceinline__ uint32_t light_index(uint32_t head, uint32_t channel) {
        uint32_t byte = channel % QUARTER, quarter = channel / QUARTER, tile = 2 * (byte % VALUE_BYTES) + quarter / 2;
        return 4 * sum_index(head / 8, tile, byte / VALUE_BYTES, head % 8 / 2) + 2 * (quarter % 2) + head % 2;
    }

    // ---- 32 tokens ----
    static __device__ __forceinline__ void load_words(const uint8_t* from, uint32_t (&words)[KEY_WORDS]) {
        if constexpr (KEY_WORDS == 2) {
            uint2 v = *reinterpret_cast<const uint2*>(from);
            words[0] = v.x, words[1] = v.y;
        } else {
#pragma unroll
            for (int k = 0; k < KEY_WORDS; k += 4) {
                uint4 v = *reinterpret_cast<const uint4*>(from + 4 * k);
                words[k] = v.x, words[k + 1] = v.y, words[k + 2] = v.z, words[k + 3] = v.w;
            }
        }
    }

    // add the products of 16 tokens with operands from `first` on
    __device__ __forceinline__ void multiply(const uint8_t* keys, int first, int (&low)[COLUMNS][4], int (&high)[COLUMNS][4]) const {
        uint32_t x[2][KEY_WORDS];
#pragma unroll
        for (int r = 0; r < 2; ++r) load_words(keys + 8 * r * HALF, x[r]);
        const uint8_t* operands = dynamic_shared() + OPERANDS_AT + lane * KEY_WORDS * 4;
        constexpr uint32_t LOW = 0x0f0f0f0f, HIGH = 0xf0f0f0f0;
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c) {
            uint32_t l[KEY_WORDS], u[KEY_WORDS];
            load_words(operands + (first + c) * OPERAND_BYTES, l);
            load_words(operands + (OPERANDS + first + c) * OPERAND_BYTES, u);
#pragma unroll
            for (int k = 0; k < KEY_WORDS; k += 2) {
                mma_codes(low[c], x[0][k] & LOW, x[1][k] & LOW, x[0][k + 1] & LOW, x[1][k + 1] & LOW, l[k], l[k + 1]);
                mma_codes(high[c], x[0][k] & HIGH, x[1][k] & HIGH, x[0][k + 1] & HIGH, x[1][k + 1] & HIGH, u[k], u[k + 1]);
            }
        }
    }

    // one bit for each token, in its first lane
    static __device__ __forceinline__ uint32_t fold(uint32_t lanes) {
        lanes |= lanes >> 1;
        if (ROW_TOKENS == 2) return lanes & 0x55555555u;
        lanes |= lanes >> 2;
        return lanes & 0x11111111u;
    }

    // Step `step` of the stage in `buffer`. `SPECIAL` steps, of which there are few, hold positions without a copy, whose
    // score may be anything.
    template <bool SPECIAL>
    __device__ __forceinline__ void scan(uint32_t first, const uint32_t* slots_of_stage, uint32_t buffer, uint32_t step) {
        const uint8_t* keys = dynamic_shared() + (keys_at + buffer + step * STEP * HALF);
        bool is_leader = (lane & (ROW_TOKENS == 2 ? 1 : 3)) == 0;
#pragma unroll
        for (uint32_t set = 0; set < SETS; ++set) {
            int low[COLUMNS][4] = {}, high[COLUMNS][4] = {};
            multiply(keys + set * 16 * HALF, 0, low, high);
            if constexpr (ROW_TOKENS == 2) multiply(keys + 16 * HALF, COLUMNS, low, high);
            uint32_t half = ROW_TOKENS == 2 ? t / 2 : set;  // of the step
            uint32_t first_slot = slots_of_stage[2 * step + half] + g;
            const uint8_t* steps = mine() + (buffer + STEPS_AT + 64 * step + 32 * half + 2 * g);
#pragma unroll
            for (uint32_t r = 0; r < 2; ++r) {
                uint32_t position = first + 16 * half + g + 8 * r;
                float key_step = half_to_float(*reinterpret_cast<const uint16_t*>(steps + 16 * r));
                float score[COLUMNS][2];
                bool is_heavy = false, is_light = false, keep[COLUMNS][2];
                bool always = SPECIAL && (position < NUM_FIRST_ANCHORS || int(position) >= first_recent);
                bool is_inside = !SPECIAL || position < end;
#pragma unroll
                for (int c = 0; c < COLUMNS; ++c)
#pragma unroll
                    for (int e = 0; e < 2; ++e) {
                        // exact: 16 times the sum is less than 2^24
                        float sum = __fmaf_rn(float(16 * low[c][2 * r + e] + high[c][2 * r + e]), 0.0625f, -middle[c][e]);
                        float s = capped(__fmaf_rn(sum, __fmul_rn(key_step, scale[c][e]), offset[c][e]), logits_soft_cap);
                        if (SOFT_CAP && offset[c][e] == DISCARDED) s = DISCARDED;
                        if (SPECIAL && (always || !is_inside)) s = DISCARDED;
                        score[c][e] = s;
                        is_heavy |= s >= heavy_limit[c][e];
                        keep[c][e] = s >= light_limit[c][e];
                        is_light |= keep[c][e];
                    }
                if (SPECIAL) is_heavy = is_inside && (is_heavy || always);
                uint32_t heavy_tokens = fold(__ballot_sync(ALL, is_heavy));
                uint32_t light_tokens = fold(__ballot_sync(ALL, is_light)) & ~heavy_tokens;
                is_light = light_tokens & leader_bit, is_heavy = heavy_tokens & leader_bit;
                uint32_t index = (light_end + __popc(light_tokens & below)) % LIGHT_ROOM;
                float* of_token = reinterpret_cast<float*>(dynamic_shared() + (weights_at + 4 * index));
#pragma unroll
                for (int c = 0; c < COLUMNS; ++c)
#pragma unroll
                    for (int e = 0; e < 2; ++e) {
                        float exponential = exp2_fast(__fmaf_rn(score[c][e], LOG2_E, anchor[c][e]));
                        // heavy keys are scored exactly, and their exponentials here may be any
                        if (is_heavy) exponential = 0.0f;
                        if (keep[c][e]) kept[c][e] += exponential;
                        if (!keep[c][e]) lost[c][e] += exponential;
                        if (is_light) of_token[(8 * c + e) * LIGHT_STRIDE] = keep[c][e] ? exponential : 0.0f;
                    }
                if (is_light && is_leader) slots()[index] = first_slot + 8 * r;
                light_end += __popc(light_tokens);
                if (heavy_tokens) {
                    if (is_heavy && is_leader) heavy()[heavy_count + __popc(heavy_tokens & below)] = first_slot + 8 * r;
                    heavy_count += __popc(heavy_tokens);
                }
            }
        }
    }

    // ask for the first stages from `stage` on
    __device__ __forceinline__ void begin(uint32_t stage, uint32_t num_stages) {
        uint32_t fetched = stage / FETCH_STAGES * FETCH_STAGES;
        next_ids = load_ids(fetched);
        keep_ids(fetched);
        if (stage - fetched + STAGES - 1 > FETCH_STAGES) keep_ids(fetched + FETCH_STAGES);
#pragma unroll
        for (uint32_t i = 0; i < STAGES - 1; ++i) {
            if (stage + i < num_stages) request(stage + i, i * STAGE_BYTES);
            async_commit();
        }
    }

    // stages from `stage` on, until all are done or the list has no room for another; returns the next
    __device__ __forceinline__ uint32_t run(uint32_t stage, uint32_t num_stages) {
        uint32_t buffer = 0, free_buffer = (STAGES - 1) * STAGE_BYTES;
        uint32_t first = start + STAGE_TOKENS * (warp + WARPS * stage);
        for (; stage < num_stages && heavy_count <= HEAVY_ROOM - STAGE_TOKENS; ++stage) {
            async_wait<STAGES - 2>();
            __syncwarp();
            // what is written to was read in the stage before
            uint32_t ahead = stage + STAGES - 1;
            if (ahead % FETCH_STAGES == 0) keep_ids(ahead);
            if (ahead < num_stages) request(ahead, free_buffer);
            async_commit();
            const uint32_t* slots_of_stage = ids() + stage % (2 * FETCH_STAGES) * STAGE_SLOTS;
#pragma unroll 1
            for (uint32_t step = 0; step < STAGE_STEPS; ++step) {
                uint32_t position = first + STEP * step;
                if (position < NUM_FIRST_ANCHORS || int(position) > first_special)
                    scan<true>(position, slots_of_stage, buffer, step);
                else
                    scan<false>(position, slots_of_stage, buffer, step);
                __syncwarp();
                while (light_end - light_begin >= 16) {
                    if (light_begin) weigh_light();
                    request_light();
                }
            }
            first += STAGE_TOKENS * WARPS;
            free_buffer = buffer;
            buffer = buffer == (STAGES - 1) * STAGE_BYTES ? 0 : buffer + STAGE_BYTES;
        }
        async_wait<0>();
        if (light_begin) weigh_light();
        if (light_end > light_begin) {
            // the last key again, with weight 0
            uint32_t last = slots()[(light_end - 1) % LIGHT_ROOM];
            __syncwarp();
            if (lane < light_begin + 16 - light_end) {
                uint32_t index = (light_end + lane) % LIGHT_ROOM;
                slots()[index] = last;
                for (int head = 0; head < HEADS; ++head) weights()[head * LIGHT_STRIDE + index] = 0.0f;
            }
            __syncwarp();
            request_light();
            weigh_light();
        }
        __syncwarp();
        return stage;
    }
};

// ---- a piece ----
// what a warp saves of each part while it works on the other: floats of a lane
constexpr uint32_t SAVED_LIGHT = COLUMNS * (TILES * 4 + 4), SAVED = SAVED_LIGHT + COLUMNS * (TILES * 4 + 6) + 1;
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
            float kept = sum_of(scan.kept[c][e], FIRST_BIT), lost = sum_of(scan.lost[c][e], FIRST_BIT);
            uint32_t head = 8 * c + scan.first_head() + e;
            if (w.lane < FIRST_BIT) stats[48 + head] = kept, stats[64 + head] = lost;
        }
}

// queries as operands, exact ones and codes: y = R q, step = max |y| / 127, code = round(y / step)
__device__ __forceinline__ void prepare(const Args& a, int seq, int kv_head, const Warp& w, bool is_dense) {
    uint8_t* shared = dynamic_shared();
    constexpr uint32_t CHUNKS = HEAD_SIZE / 8;
    const uint8_t* query = a.query + (uint64_t)seq * a.query_stride_seq + (uint64_t)kv_head * GROUP * a.query_stride_head;
    for (uint32_t i = threadIdx.x; i < 8 * COLUMNS * CHUNKS; i += 32 * WARPS) {
        uint32_t head = i / CHUNKS, chunk = i % CHUNKS;
        *reinterpret_cast<uint4*>(shared + QUERY_AT + head * QUERY_STRIDE + 16 * chunk) =
            head < GROUP ? load16(query + head * a.query_stride_head + 16 * chunk) : make_uint4(0, 0, 0, 0);
    }
    if (is_dense) return;
    uint8_t* operands = shared + OPERANDS_AT;
    float centre[LANE_CHANNELS];
    if (w.warp < 8 * COLUMNS && w.warp % (ROW_TOKENS == 2 ? 4 : 8) < GROUP) {
        const uint8_t* first = a.kv_cache + (uint64_t)kv_head * a.stride_head + (uint64_t)uint32_t(w.blocks[0]) * a.stride_block;
        load_centre(first, a.stride_token, w.lane, centre);
    }
    // columns of 8 heads, or of 4 heads for either token of a row: 0 where a column is the other's, or nobody's
    for (uint32_t column = w.warp; column < 8 * COLUMNS; column += WARPS) {
        uint32_t head = ROW_TOKENS == 2 ? column % 4 : column, bytes[LANE_CHANNELS] = {};
        if (head < GROUP) {
            float x[LANE_CHANNELS], offset = 0.0f;
            load_row(query + head * a.query_stride_head, w.lane, x);
#pragma unroll
            for (int i = 0; i < LANE_CHANNELS; ++i) {
                if (a.q_scale) x[i] *= *a.q_scale;
                if (a.k_scale) x[i] *= *a.k_scale;  // copies are of what is stored
                offset += x[i] * centre[i];
            }
            rotate(a.rotation, x, w.lane);
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
#pragma unroll
        for (uint32_t operand = 0; operand < OPERANDS; ++operand) {
            uint32_t none[LANE_CHANNELS] = {};
            uint8_t* to = operands + operand * OPERAND_BYTES + column % 8 * HALF + of_half;
            bool is_mine = ROW_TOKENS == 2 ? column / 4 == operand : column / 8 == operand;
            // with two blocks of columns, each has an operand to itself
            if (ROW_TOKENS == 2 || is_mine) store_bytes(to, is_mine ? bytes : none);
        }
    }
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
            for (int e = 0; e < 2; ++e) best[e] = fmaxf(best[e], maxima[warp * NUM_STATS * 16 + e]);
        float4 exact = make_float4(0, 0, 0, 0), light = make_float4(0, 0, 0, 0);
        for (int warp = 0; warp < WARPS; ++warp) {
            const uint8_t* of_warp = shared + warp * WARP_BYTES;
            float4 x = reinterpret_cast<const float4*>(of_warp + EXACT_AT)[i];
            float f0 = exp2_fast((maxima[warp * NUM_STATS * 16] - best[0]) * LOG2_E);
            float f1 = exp2_fast((maxima[warp * NUM_STATS * 16 + 1] - best[1]) * LOG2_E);
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
    float best = DISCARDED, kept = 0.0f, lost = 0.0f;
    for (int warp = 0; warp < WARPS; ++warp) best = fmaxf(best, stats[warp * NUM_STATS * 16]);
    float light_scale = is_dense ? 0.0f : exp2_fast((a.anchor_lse[row] - best) * LOG2_E - a.log2_scale);
    for (int warp = 0; warp < WARPS; ++warp) {
        const float* of_warp = stats + warp * NUM_STATS * 16;
        float f = exp2_fast((of_warp[0] - best) * LOG2_E);
        kept += f * of_warp[16] + light_scale * of_warp[48], lost += f * of_warp[32] + light_scale * of_warp[64];
    }
    // R^T of what light values add up to: Hadamard's transform, and the signs that stand in the first row of R
    float x[LANE_CHANNELS];
#pragma unroll
    for (int i = 0; i < LANE_CHANNELS; ++i)
        x[i] = reinterpret_cast<const float*>(shared + LIGHT_AT)[Scan::light_index(head, LANE_CHANNELS * lane + i)];
    transform(x, lane);
    const float* exact = reinterpret_cast<const float*>(shared + EXACT_AT);
    float* output = a.piece_output + (piece * GROUP + head) * HEAD_SIZE;
#pragma unroll
    for (int i = 0; i < LANE_CHANNELS; ++i) {
        uint32_t channel = LANE_CHANNELS * lane + i;
        output[channel] = exact[exact_index(head, channel)] + x[i] * a.rotation[channel] * light_scale;
    }
    float* of_piece = a.piece_stats + piece * 3 * GROUP + head;
    if (lane == 0) of_piece[0] = best, of_piece[GROUP] = kept, of_piece[2 * GROUP] = lost;
}

__device__ __forceinline__ void attend_piece(
    const Args& a, const Warp& w, int seq, int kv_head, long long piece, int seq_len, bool is_dense) {
    uint8_t* shared = dynamic_shared();
    float* stats = reinterpret_cast<float*>(shared + STATS_AT) + w.warp * NUM_STATS * 16;
    uint32_t* counts = reinterpret_cast<uint32_t*>(shared + COUNTS_AT);  // [WARPS, 4]
    uint32_t first_row = (seq * a.num_kv_heads + kv_head) * GROUP, keys = 0, copies = 0;
    float* saved = a.saved + (uint64_t)((blockIdx.y * gridDim.x + blockIdx.x) * WARPS + w.warp) * SAVED * 32 + w.lane;
    int open_start = VALUE_MEAN ? seq_len / BLOCK_SIZE * BLOCK_SIZE : seq_len;  // of the page that the next token goes to
    if (threadIdx.x == 0) {
        Piece& common = piece_of(shared);
        common.kv_base = a.kv_cache + (uint64_t)kv_head * a.stride_head;
        common.thresholds = a.thresholds + first_row;
        common.scale = a.softmax_scale * (a.q_scale ? *a.q_scale : 1.0f) * (a.k_scale ? *a.k_scale : 1.0f);
        common.logits_soft_cap = a.logits_soft_cap;
        common.stride_block = a.stride_block, common.stride_token = a.stride_token;
        common.open_block = max(int(w.start), open_start) < int(w.end) ? w.blocks[open_start / BLOCK_SIZE] : ~0u;
        common.is_dense = is_dense;
    }
    Exact exact;
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
    if (is_dense) {
        prepare(a, seq, kv_head, w, is_dense);
        __syncthreads();
        keys = w.end - w.start;
        w.attend_keys(exact, keys, [&](uint32_t i) {
            uint32_t position = w.start + i;
            return w.blocks[position / BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE;
        });
        if (w.lane < 16) stats[48 + w.lane] = stats[64 + w.lane] = 0.0f;
        share_exact(w, exact, stats);
    } else {
        uint32_t total = divide_up(w.end - w.start, STAGE_TOKENS), stage = 0;
        uint32_t num_stages = total > w.warp ? divide_up(total - w.warp, WARPS) : 0;
        bool is_done = false, is_first = true, all_done;
        do {
            uint32_t count = 0;
            if (!is_done) {
                Scan scan(w, a, seq, kv_head);
                scan.begin(stage, num_stages);
                if (is_first) {
                    // while the first codes are on their way
                    prepare(a, seq, kv_head, w, is_dense);
                    __syncthreads();
                }
                scan.load_terms();
                if (!is_first) restore(restore(restore(saved, scan.kept), scan.lost), as_rows(scan.light));
                stage = scan.run(stage, num_stages);
                is_done = stage >= num_stages;
                count = scan.heavy_count, copies += scan.light_end;
                if (is_done)
                    share_light(w, scan, stats);
                else
                    save(save(save(saved, scan.kept), scan.lost), as_rows(scan.light));
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
            if (!is_first) {
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
    if (w.lane == 0) counts[4 * w.warp] = rows, counts[4 * w.warp + 1] = copies;
    __syncthreads();
    add_up(is_dense);
    __syncthreads();
    for (uint32_t head = w.warp; head < GROUP; head += WARPS) write_head(a, head, first_row + head, piece, w.lane, is_dense);
    if (threadIdx.x == 0 && a.value_rows_read) {
        copies = rows = 0;
        for (int warp = 0; warp < WARPS; ++warp) rows += counts[4 * warp], copies += counts[4 * warp + 1];
        // what the merge reads of the open page, for the mean
        if (is_dense)
            rows = keys;
        else
            rows += max(int(w.end) - max(int(w.start), open_start), 0);
        atomic_add(a.keys_read + kv_head, keys);
        atomic_add(a.value_rows_read + kv_head, rows);
        atomic_add(a.copies_read + kv_head, copies);
    }
    __syncthreads();
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, RESIDENT) tier_split(const __grid_constant__ Args a) {
    uint32_t lane = threadIdx.x & 31, warp = threadIdx.x / 32;
    int kv_head = blockIdx.x, program = blockIdx.y;
    wait_for_predecessor();
    allow_successor();
    Step step = step_of(a, lane);
    // the kernel in front has read all keys then
    if (step.num_tokens < a.few_tokens || step.num_tokens < a.short_length * step.num_decoded) return;
    Warp w{warp * WARP_BYTES, warp, lane, lane / 4, lane % 4, 0, 0, 0, nullptr};
    Walk walk = walk_of(a, step, program, lane);
    PieceTokens piece;
    while (next_piece(a, step, walk, piece)) {
        w.start = piece.start, w.end = piece.end;
        w.blocks = a.block_table + (long long)piece.seq * a.table_stride;
        // the page of the last token has no copies yet, or only since this step
        w.first_recent = min(piece.seq_len - NUM_LAST_ANCHORS, (piece.seq_len - 1) / BLOCK_SIZE * BLOCK_SIZE);
        long long number = (long long)(program + piece.seq) * a.num_kv_heads + kv_head;
        attend_piece(a, w, piece.seq, kv_head, number, piece.seq_len, piece.is_dense);
    }
}

// ---- copies of the pages that this step's tokens fill (copies.py); a program for each kv head and sequence ----
extern "C" __global__ void __launch_bounds__(32 * COPY_WARPS) tier_copy(const __grid_constant__ Args a) {
    uint32_t lane = threadIdx.x & 31, warp = threadIdx.x / 32;
    int kv_head = blockIdx.x, seq = blockIdx.y;
    wait_for_predecessor();
    allow_successor();
    int seq_len = a.seq_lens[seq];
    if (seq_len == 0 || seq_len % BLOCK_SIZE) return;
    const int* blocks = a.block_table + (long long)seq * a.table_stride;
    const uint8_t* kv = a.kv_cache + (uint64_t)kv_head * a.stride_head;
    uint32_t block = blocks[seq_len / BLOCK_SIZE - 1];
    uint8_t* codes = a.codes + (uint64_t)block * a.code_stride_block + (uint64_t)kv_head * a.code_stride_head;
    float centre[LANE_CHANNELS];
    load_centre(kv + (uint64_t)blocks[0] * a.stride_block, a.stride_token, lane, centre);
    for (uint32_t token = warp; token < BLOCK_SIZE; token += COPY_WARPS) {
        const uint8_t* row = kv + (uint64_t)block * a.stride_block + token * a.stride_token;
        uint16_t* steps = reinterpret_cast<uint16_t*>(codes + BLOCK_SIZE * (HALF + QUARTER)) + token;
        float key[LANE_CHANNELS], value[LANE_CHANNELS];
        load_row(row, lane, key);
        load_row(row + 2 * HEAD_SIZE, lane, value);
        uint32_t bytes[LANE_CHANNELS];

#pragma unroll
        for (int i = 0; i < LANE_CHANNELS; ++i) key[i] -= centre[i];
        rotate(a.rotation, key, lane);
        uint16_t key_step = half_of(largest_of(key) / 8.0f);
#pragma unroll
        for (int i = 0; i < LANE_CHANNELS; ++i) {
            uint32_t code = clamp(floorf(__fdiv_rn(key[i], half_to_float(key_step)) + 8.0f), 0.0f, 15.0f);
            bytes[i] = code | __shfl_xor_sync(ALL, code, 16) << 4;
        }
        if (lane < 16) store_bytes(codes + token * HALF + LANE_CHANNELS * lane, bytes);
        if (lane == 0) steps[0] = key_step;

        rotate(a.rotation, value, lane);
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
}

// What a warp of value_split.cu does: the scan and the gather.

// where part `chunk` of a row stands in it, so that lanes find theirs in different banks, as they do in rows with a half
__device__ __forceinline__ uint32_t place_of(uint32_t row, uint32_t chunk) {
    return 16 * (HAS_HALF ? chunk : chunk ^ (row & 6) ^ (row & 1) << 2);
}

// A warp's part of a piece. A lane is number t of quad g. In the scan it has tokens g and g + 8 of a stage, and heads
// 8 c + 2 t + e; in the gather keys 2 t, 2 t + 1, 8 + 2 t and 9 + 2 t of sixteen, and head 8 c + g.
struct Warp {
    uint32_t at;  // where the warp's shared memory is
    uint32_t warp, lane, g, t;
    uint32_t first_stage, unit_bits, num_stages;  // of the piece, of the number of a unit's stages, and the warp's stages
    Spread spread;
    NewTokens tokens;
    uint32_t seq_len;
    uint32_t open_start;     // where the page begins that the token behind the first new one goes to
    uint32_t special_start;  // where keys begin that are of that page, or that not all columns see
    uint32_t parity;      // which of the two sets of thresholds is the piece's
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
    uint32_t specials_before, specials, next_specials;  // which of these stages have tokens of the open page, or none

    __device__ __forceinline__ uint8_t* mine() const { return dynamic_shared() + at; }
    __device__ __forceinline__ float* ring_scores() const { return reinterpret_cast<float*>(mine() + SCORES_AT); }
    __device__ __forceinline__ uint32_t* ring_slots() const { return reinterpret_cast<uint32_t*>(mine() + SLOTS_AT); }
    __device__ __forceinline__ const uint8_t* row_of(uint32_t slot) const {
        return kv_base + ((uint64_t)(slot / BLOCK_SIZE) * stride_block + slot % BLOCK_SIZE * stride_token);
    }

    __device__ __forceinline__ float* thresholds() const { return reinterpret_cast<float*>(dynamic_shared() + THRESHOLDS_AT) + 16 * parity; }

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
                threshold[c][e] = thresholds()[8 * c + 2 * t + e];
                offset[c][e] = threshold[c][e] * -LOG2_E;
            }
            maximum[c] = thresholds()[8 * c + g % HEADS];
            if (HOLDS_QUERIES)
#pragma unroll
                for (int i = 0; i < KEY_PARTS; ++i)
                    query[c][i] = *reinterpret_cast<const uint4*>(
                        dynamic_shared() + QUERY_AT + (8 * c + g) * QUERY_STRIDE + 64 * i + 16 * t);
        }
    }

    // ---- keys arrive ----
    // of the first token of a stage
    __device__ __forceinline__ uint32_t position_of(uint32_t stage) const {
        uint32_t index = first_stage + warp + WARPS * stage, in_unit = index & ((1u << unit_bits) - 1);
        return STAGE_TOKENS * ((spread.unit_of(index >> unit_bits) << unit_bits) + in_unit);
    }

    __device__ __forceinline__ void load_slots(uint32_t from) {
        if (from >= num_stages) return;
        uint32_t position = from + lane < num_stages ? position_of(from + lane) : seq_len;
        // a stage without tokens has those of the last page, which are finite, as 0 times a value has to be
        uint32_t page = min(position, seq_len - 1) / BLOCK_SIZE;
        next_slots = blocks[page] * BLOCK_SIZE + (position < seq_len ? position % BLOCK_SIZE : 0);
        next_specials = __ballot_sync(ALL, position + STAGE_TOKENS > special_start);
    }

    __device__ __forceinline__ void take_slots() {
        slots_before = slots, slots = next_slots;
        specials_before = specials, specials = next_specials;
    }

    __device__ __forceinline__ void request_keys(uint32_t stage) {
        if (stage % 32 == 0 && stage) take_slots(), load_slots(stage + 32);
        if (stage < num_stages) {
            const uint8_t* from = row_of(__shfl_sync(ALL, slots, stage % 32));
            uint8_t* to = mine() + stage % STAGES * STAGE_BYTES;
#pragma unroll
            for (uint32_t k = 0; k < CHUNKS / 2; ++k) {
                uint32_t row = (32 * k + lane) / CHUNKS, chunk = (32 * k + lane) % CHUNKS;
                async_copy16(to + row * ROW_BYTES + place_of(row, chunk), from + row * stride_token + 16 * chunk);
            }
        }
        async_commit();
    }

    // of the first token of a stage, if no stage behind `requested` was requested
    __device__ __forceinline__ uint32_t slot_of(uint32_t stage, uint32_t requested) const {
        return __shfl_sync(ALL, requested / 32 == stage / 32 ? slots : slots_before, stage % 32);
    }

    __device__ __forceinline__ bool is_special(uint32_t stage, uint32_t requested) const {
        return (requested / 32 == stage / 32 ? specials : specials_before) >> stage % 32 & 1;
    }

    __device__ __forceinline__ void begin() {
        load_slots(0), take_slots(), load_slots(32);
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
            for (int i = 0; i < VALUE_PARTS - HAS_HALF; ++i) pending[k][i] = load16(value + 128 * i);
            if constexpr (HAS_HALF) {
                uint2 half = load8(value + (128 * (VALUE_PARTS - 1) - 8 * g));
                pending[k][VALUE_PARTS - 1].x = half.x, pending[k][VALUE_PARTS - 1].y = half.y;
            }
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
            uint4 values[4];
#pragma unroll
            for (int k = 0; k < 4; ++k) values[k] = pending[k][i];
            add_values(output, i, values, operand);
        }
    }

    // channel of row g of a tile; row g + 8 has the next one
    static __device__ __forceinline__ uint32_t channel_of(uint32_t tile, uint32_t g) {
        uint32_t of_lane = HAS_HALF && tile / 4 == VALUE_PARTS - 1 ? 4 : 8;
        return tile / 4 * 64 + of_lane * g + tile % 4 * 2;
    }

    // ---- 16 tokens ----
    __device__ __forceinline__ uint4 query_part(uint32_t c, uint32_t i) const {
        if constexpr (HOLDS_QUERIES) return query[c][i];
        return *reinterpret_cast<const uint4*>(dynamic_shared() + QUERY_AT + (8 * c + g) * QUERY_STRIDE + 64 * i + 16 * t);
    }

    // products of the tokens of a stage, in two halves, so that none waits for all others
    __device__ __forceinline__ void multiply(uint32_t stage, float (&products)[COLUMNS][2][4]) const {
        const uint8_t* keys = mine() + (stage % STAGES * STAGE_BYTES + g * ROW_BYTES);
#pragma unroll
        for (int i = 0; i < KEY_PARTS; ++i) {
            const uint4 k = *reinterpret_cast<const uint4*>(keys + place_of(g, 4 * i + t));
            const uint4 l = *reinterpret_cast<const uint4*>(keys + 8 * ROW_BYTES + place_of(g, 4 * i + t));
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

    __device__ __forceinline__ bool sees(uint32_t column, uint32_t position) const {
        return position < tokens.seen_by(column, seq_len);
    }

    // `SPECIAL` stages hold positions that not all columns see, or of the open page, all rows of which the merge reads.
    template <bool SPECIAL>
    __device__ __forceinline__ void scan(uint32_t stage) {
        uint32_t first = SPECIAL ? position_of(stage) : 0;
        if (SPECIAL) rows_read += max(int(min(first + STAGE_TOKENS, seq_len)) - int(max(first, open_start)), 0);
        float products[COLUMNS][2][4] = {};
        multiply(stage, products);
        uint32_t slot = slot_of(stage, stage + STAGES - 1);
#pragma unroll
        for (uint32_t r = 0; r < 2; ++r) {
            uint32_t position = first + g + 8 * r;
            bool survives = false, keep[COLUMNS][2];
            float score[COLUMNS][2];
#pragma unroll
            for (int c = 0; c < COLUMNS; ++c)
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    bool is_inside = !SPECIAL || sees(8 * c + 2 * t + e, position);
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

    // the stages of a piece; in the end some values are pending, or not even asked for
    __device__ __forceinline__ void run_sparse() {
        for (uint32_t stage = 0; stage < num_stages; ++stage) {
            async_wait<STAGES - 2>();
            __syncwarp();
            // what is written to was read in the stage before
            request_keys(stage + STAGES - 1);
            if (is_special(stage, stage + STAGES - 1))
                scan<true>(stage);
            else
                scan<false>(stage);
            __syncwarp();
            if (ring_end - ring_begin >= 16) {
                if (ring_begin) weigh_values();
                request_listed();
            }
        }
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
    __device__ __forceinline__ void run_dense() {
        uint32_t num_tokens = 0, first = 0;  // of the stage whose values are pending
        auto request = [&](uint32_t stage, uint32_t requested) {
            uint32_t slot = slot_of(stage, requested);
            num_tokens = STAGE_TOKENS;
            first = 0;
            if (is_special(stage, requested)) {
                first = position_of(stage);
                num_tokens = min(max(int(seq_len - first), 0), int(STAGE_TOKENS));
            }
            uint32_t last = max(num_tokens, 1u) - 1;
            request_values([&](uint32_t index) { return slot + min(index, last); });
            rows_read += num_tokens;
        };
        if (num_stages) request(0, 0);
        for (uint32_t stage = 0; stage < num_stages; ++stage) {
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
                                g + 8 * r < num_tokens &&
                                        (QUERY_LEN == 1 || sees(8 * c + 2 * t + e, first + g + 8 * r))
                                    ? score_of(products[c], r, e)
                                    : DISCARDED;
            __syncwarp();
            if (stage + 1 == num_stages) break;
            weigh_values();
            request(stage + 1, stage + STAGES - 1);
        }
    }

    // what the stages have left
    __device__ __forceinline__ void finish() {
        if (ring_begin) weigh_values();
        __syncwarp();
    }
};

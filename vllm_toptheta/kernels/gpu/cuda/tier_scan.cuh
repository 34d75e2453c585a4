// The scan of tier_split.cu: all keys as codes, light keys weighed, heavy ones listed.

struct Scan : LightKeys {
    uint32_t keys_at, steps_at, weights_at;  // of the lane
    uint32_t leader_bit, below;    // of the lane's token among the bits of a warp, and all bits before it
    uint32_t first_sixteen;  // of the warp's first stage
    int first_special;
    float logits_soft_cap;
    // of heads 8 c + 2 t + e, or 2 (t % 2) + e where two tokens share a row; `middle` is what products begin with
    float scale[COLUMNS][2], offset[COLUMNS][2], light_limit[COLUMNS][2], heavy_limit[COLUMNS][2];
    float anchor[COLUMNS][2];
    int middle[COLUMNS][2];
    float total[COLUMNS][2];  // of the weights of all keys that are not heavy
    uint32_t heavy_count;
    uint32_t next_block, next_in_page;  // of the sixteens that follow

    __device__ __forceinline__ uint32_t first_head() const { return ROW_TOKENS == 2 ? t % 2 * 2 : t * 2; }

    // of what stood there before the kernel in front began
    __device__ __forceinline__ Scan(const Warp& warp, const Args& a, int kv_head) : LightKeys(warp, a, kv_head) {
        keys_at = at + g * HALF + t * KEY_WORDS * 4;
        steps_at = at + STEPS_AT + 2 * g + (ROW_TOKENS == 2 ? t / 2 * 32 : 0);
        weights_at = at + WEIGHTS_AT + first_head() / 2 * LIGHT_STRIDE * 4;
        leader_bit = 1u << (lane & (ROW_TOKENS == 2 ? ~1u : ~3u)), below = leader_bit - 1;
        first_sixteen = start / 16 + STAGE_SLOTS * warp.warp;
        first_special = first_recent - 16;
        // as values that the compiler cannot work out again in every step
        opaque(keys_at), opaque(steps_at), opaque(weights_at), opaque(leader_bit), opaque(below), opaque(first_special);
        logits_soft_cap = a.logits_soft_cap;
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c) total[c][0] = total[c][1] = 0.0f;
        heavy_count = 0;
    }

    // what `prepare` and the kernel in front have left of the heads from row `first_row` on
    __device__ __forceinline__ void load_terms(const Args& a, uint32_t first_row) {
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
                const float* terms = reinterpret_cast<const float*>(dynamic_shared() + TERMS_AT) + 3 * head;
                scale[c][e] = is_there ? terms[0] * 0.0625f : 0.0f;
                middle[c][e] = is_there ? int(terms[1] * -16.0f) : 0;
                offset[c][e] = is_there ? terms[2] : DISCARDED;
            }
    }

    __device__ __forceinline__ uint32_t* ids() const { return reinterpret_cast<uint32_t*>(mine() + IDS_AT); }

    // ---- codes arrive ----
    // position of the first of sixteen tokens of a stage
    __device__ __forceinline__ int start_of(uint32_t stage, uint32_t slot) const {
        return place().position_of(first_sixteen + STAGE_SLOTS * WARPS * stage + slot);
    }

    // slots of the first tokens of each 16 in the stages from `stage` on
    __device__ __forceinline__ void load_ids(uint32_t stage) {
        int position = start_of(stage + lane / STAGE_SLOTS, lane % STAGE_SLOTS);
        // behind the end block 0 is read: any bytes do. Nobody looks at what is loaded before `keep_ids`, which need not wait
        bool is_inside = position < place().seq_len;
        next_block = is_inside ? blocks[uint32_t(position) / BLOCK_SIZE] : 0;
        next_in_page = BLOCK_SIZE == 16 || !is_inside ? 0 : uint32_t(position) % BLOCK_SIZE;
        uint32_t specials = __ballot_sync(ALL, position < NUM_FIRST_ANCHORS || position > first_special);
        if (lane == 0) place().specials[stage / FETCH_STAGES % 4] = specials;
    }

    __device__ __forceinline__ void keep_ids(uint32_t stage) {
        ids()[stage % (2 * FETCH_STAGES) * STAGE_SLOTS + lane] = next_block * BLOCK_SIZE + next_in_page;
        load_ids(stage + FETCH_STAGES);
        __syncwarp();
    }

    __device__ __forceinline__ void request(uint32_t stage, uint32_t buffer) const {
        const uint32_t* slots = ids() + stage % (2 * FETCH_STAGES) * STAGE_SLOTS;
        uint8_t* to = mine() + buffer + 16 * lane;
#pragma unroll
        for (uint32_t i = 0; i < STAGE_SLOTS; i += 2) {
            uint2 slot = *reinterpret_cast<const uint2*>(slots + i);
#pragma unroll
            for (uint32_t j = 0; j < 2; ++j) {
                uint32_t first = j ? slot.y : slot.x;
                const uint8_t* keys = lane_of(first);
                if (BLOCK_SIZE > 16) keys += first % BLOCK_SIZE * HALF;
#pragma unroll
                for (uint32_t k = 0; k < HALF / 32; ++k)
                    async_copy16(to + i / 2 * STEP_BYTES + j * 16 * HALF + 512 * k, keys + 512 * k);
            }
        }
        if (lane < 2 * STAGE_SLOTS) {
            uint32_t slot = slots[lane / 2], in_page = BLOCK_SIZE == 16 ? 0 : slot % BLOCK_SIZE;
            // from the first or second sixteen bytes on
            uint32_t of_lane = BLOCK_SIZE * (HALF + QUARTER) + 2 * in_page - 16 * (lane - lane % 2);
            async_copy16(to + STEPS_AT + lane / 4 * STEPS_AT, ahead(lane_of(slot), of_lane, 1));
        }
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

    // One bit for each token of the rows g and g + 8, from ballots of both: where its first lane is, and behind that.
    static __device__ __forceinline__ uint32_t fold(const uint32_t (&lanes)[2]) {
        if (ROW_TOKENS == 2) return ((lanes[0] | lanes[0] >> 1) & 0x55555555u) | ((lanes[1] | lanes[1] << 1) & 0xaaaaaaaau);
        uint32_t first = lanes[0] | lanes[0] >> 1, second = lanes[1] | lanes[1] >> 1;
        first |= first >> 2, second |= second >> 2;
        return (first & 0x11111111u) | (second & 0x11111111u) << 1;
    }

    // 32 tokens whose codes are `at` bytes behind where the ring starts, and their slots at `slots_at`. `SPECIAL` steps, of which
    // there are few, hold positions without a copy, whose score may be anything.
    template <bool SPECIAL>
    __device__ __forceinline__ void scan(uint32_t at, uint32_t slots_at, uint32_t stage, uint32_t step) {
        const uint8_t* keys = dynamic_shared() + (keys_at + at);
        bool is_leader = (lane & (ROW_TOKENS == 2 ? 1 : 3)) == 0;
#pragma unroll
        for (uint32_t set = 0; set < SETS; ++set) {
            int low[COLUMNS][4], high[COLUMNS][4];
#pragma unroll
            for (int c = 0; c < COLUMNS; ++c)
#pragma unroll
                for (int i = 0; i < 4; ++i) low[c][i] = 0, high[c][i] = middle[c][i % 2];
            multiply(keys + set * 16 * HALF, 0, low, high);
            if constexpr (ROW_TOKENS == 2) multiply(keys + 16 * HALF, COLUMNS, low, high);
            uint32_t half = ROW_TOKENS == 2 ? t / 2 : set;  // of the step
            uint32_t first_slot = *reinterpret_cast<const uint32_t*>(dynamic_shared() + slots_at + 4 * half) + g;
            const uint8_t* steps = dynamic_shared() + (steps_at + at + (ROW_TOKENS == 2 ? 0 : 32 * set));
            float score[2][COLUMNS][2];
            bool keep[2][COLUMNS][2];
            uint32_t heavy_lanes[2], light_lanes[2];
#pragma unroll
            for (uint32_t r = 0; r < 2; ++r) {
                int position = SPECIAL ? start_of(stage, 2 * step + half) + g + 8 * r : 0;
                float key_step = half_to_float(*reinterpret_cast<const uint16_t*>(steps + 16 * r));
                bool is_heavy = false, is_light = false;
                bool always = SPECIAL && (position < NUM_FIRST_ANCHORS || position >= first_recent);
                bool is_inside = !SPECIAL || position < place().seq_len;
#pragma unroll
                for (int c = 0; c < COLUMNS; ++c)
#pragma unroll
                    for (int e = 0; e < 2; ++e) {
                        // exact: 16 times the sum is less than 2^24
                        float sum = float(16 * low[c][2 * r + e] + high[c][2 * r + e]);
                        float s = capped(__fmaf_rn(sum, __fmul_rn(key_step, scale[c][e]), offset[c][e]), logits_soft_cap);
                        if (SOFT_CAP && offset[c][e] == DISCARDED) s = DISCARDED;
                        if (SPECIAL && (always || !is_inside)) s = DISCARDED;
                        score[r][c][e] = s;
                        is_heavy |= s >= heavy_limit[c][e];
                        keep[r][c][e] = s >= light_limit[c][e];
                        is_light |= keep[r][c][e];
                    }
                if (SPECIAL) is_heavy = is_inside && (is_heavy || always);
                heavy_lanes[r] = __ballot_sync(ALL, is_heavy), light_lanes[r] = __ballot_sync(ALL, is_light);
            }
            uint32_t heavy_tokens = fold(heavy_lanes), light_tokens = fold(light_lanes) & ~heavy_tokens;
            if (heavy_tokens) {
#pragma unroll
                for (uint32_t r = 0; r < 2; ++r) {
                    if (!(heavy_tokens & leader_bit << r)) continue;
                    // they are scored exactly
#pragma unroll
                    for (int c = 0; c < COLUMNS; ++c)
#pragma unroll
                        for (int e = 0; e < 2; ++e) score[r][c][e] = DISCARDED;
                    uint32_t before = heavy_tokens & ((leader_bit << r) - 1);
                    if (is_leader) heavy()[heavy_count + __popc(before)] = first_slot + 8 * r;
                }
                heavy_count += __popc(heavy_tokens);
            }
#pragma unroll
            for (uint32_t r = 0; r < 2; ++r) {
                bool is_light = light_tokens & leader_bit << r;
                uint32_t before = light_tokens & (r ? below | leader_bit : below);
                uint32_t index_at = 4 * (light_end + __popc(before)) % (4 * LIGHT_ROOM);
                uint32_t* of_token = reinterpret_cast<uint32_t*>(dynamic_shared() + (weights_at + index_at));
#pragma unroll
                for (int c = 0; c < COLUMNS; ++c) {
                    float weight[2];
#pragma unroll
                    for (int e = 0; e < 2; ++e) {
                        weight[e] = exp2_fast(__fmaf_rn(score[r][c][e], LOG2_E, anchor[c][e]));
                        total[c][e] += weight[e];
                        if (!keep[r][c][e]) weight[e] = 0.0f;
                    }
                    if (is_light) of_token[4 * c * LIGHT_STRIDE] = pack_half<true>(weight[0], weight[1]);
                }
                // a leader has the first heads, behind whose weights, and those of all others, slots stand
                if (is_light && is_leader) of_token[HEADS / 2 * LIGHT_STRIDE] = first_slot + 8 * r;
            }
            light_end += __popc(light_tokens);
        }
    }

    // the merge reads the rows of the open page, of which a step may have some
    __device__ __forceinline__ void count_open_rows(uint32_t stage, uint32_t step) const {
        int position = start_of(stage, 2 * step + lane % 2);
        int rows = max(min(position + 16, place().seq_len) - max(position, place().open_start), 0);
        rows += __shfl_xor_sync(ALL, rows, 1);
        if (lane == 0) place().open_rows += rows;
    }

    // ask for the first stages from `stage` on
    __device__ __forceinline__ void begin(uint32_t stage, uint32_t num_stages) {
        uint32_t fetched = stage / FETCH_STAGES * FETCH_STAGES;
        load_ids(fetched);
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
        async_wait<STAGES - 2>();
        __syncwarp();
        for (; stage < num_stages && heavy_count <= HEAVY_ROOM - STAGE_TOKENS; ++stage) {
            // what is written to was read in the stage before
            uint32_t next = stage + STAGES - 1;
            if (next % FETCH_STAGES == 0) keep_ids(next);
            if (next < num_stages) request(next, free_buffer);
            async_commit();
            uint32_t specials = place().specials[stage / FETCH_STAGES % 4] >> stage % FETCH_STAGES * STAGE_SLOTS;
            uint32_t at_step = buffer, slots_at = at + IDS_AT + 4 * STAGE_SLOTS * (stage % (2 * FETCH_STAGES));
#pragma unroll 1
            for (uint32_t step = 0; step < STAGE_STEPS; ++step, specials >>= 2, at_step += STEP_BYTES, slots_at += 8) {
                if (specials & 3) {
                    scan<true>(at_step, slots_at, stage, step);
                    count_open_rows(stage, step);
                } else {
                    scan<false>(at_step, slots_at, stage, step);
                }
            }
            // all but the last group: codes of the next stage, and of light keys that were asked for in the stage before
            async_wait<1>();
            __syncwarp();
            turn_over_light(light_end);
            while (light_end - weighed > LIGHT_ROOM - STAGE_TOKENS) {
                async_wait<0>();
                __syncwarp();
                turn_over_light(light_end);
            }
            __syncwarp();
            free_buffer = buffer;
            buffer = buffer == (STAGES - 1) * STAGE_BYTES ? 0 : buffer + STAGE_BYTES;
        }
        async_wait<0>();
        __syncwarp();
        finish_light();
        return stage;
    }
};

// Light keys of tier_split.cu: a warp's ring of them, and what their values add up to.
//
// Sixteen at a time, codes of values are asked for, and weighed when they have arrived: in shared memory, not in registers,
// because the machine waits for those at the next branch.

struct LightKeys : Warp {
    const uint8_t* lane_codes;  // of the kv head, 16 bytes further for each lane
    uint32_t code_stride;
    // Sums of weights relative to the anchors, and 2^log2_scale times too large, with heads 8 c + 2 t + e as products have them:
    // of weights alone, times steps of values, and times steps and codes. These are the float16 of their bits where they stand
    // in their bytes.
    float kept[COLUMNS][4], stepped[COLUMNS][4], light[COLUMNS][TILES][4];
    uint32_t weighed, requested, light_end;  // in the ring; the first two are multiples of 16

    __device__ __forceinline__ LightKeys(const Warp& warp, const Args& a, int kv_head) : Warp(warp) {
        lane_codes = a.codes + (uint64_t)kv_head * a.code_stride_head + 16 * lane;
        code_stride = a.code_stride_block;
        // as a value that the compiler cannot work out again in every step
        opaque(lane_codes);
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c)
#pragma unroll
            for (int i = 0; i < 4; ++i) kept[c][i] = stepped[c][i] = 0.0f;
        clear(light);
        weighed = requested = light_end = 0;
    }

    // of two heads a word
    __device__ __forceinline__ uint32_t* weights() const { return reinterpret_cast<uint32_t*>(mine() + WEIGHTS_AT); }
    __device__ __forceinline__ uint32_t* slots() const { return reinterpret_cast<uint32_t*>(mine() + SLOTS_AT); }

    // codes of a block, and behind them the 16 bytes of this lane
    __device__ __forceinline__ const uint8_t* lane_of(uint32_t slot) const {
        return ahead(lane_codes, slot / BLOCK_SIZE, code_stride);
    }

    // Keys stand there as `weigh_light` reads them: number k of lane t of a quad is key 2 t + k % 2 + k / 2 * 8.
    __device__ __forceinline__ uint8_t* batch_of(uint32_t first) const {
        return mine() + (CODES_AT + first / 16 % LIGHT_BATCHES * BATCH_BYTES);
    }

    __device__ __forceinline__ void request_light() {
        constexpr uint32_t PARTS = QUARTER / 16;  // of a key's codes
        uint8_t* to = batch_of(requested);
        const uint32_t* first = slots() + requested % LIGHT_ROOM;
#pragma unroll
        for (uint32_t i = 0; i < 16 * PARTS; i += 32) {
            uint32_t index = i + lane, k = index / (4 * PARTS), of_quad = index / PARTS % 4, part = index % PARTS;
            if (16 * PARTS < 32 && index >= 16 * PARTS) break;
            uint32_t slot = first[2 * of_quad + k % 2 + k / 2 * 8], in_page = slot % BLOCK_SIZE;
            const uint8_t* page = lane_of(slot);
            // codes of all keys stand in front, which are more than what `lane_of` is ahead by
            async_copy16(to + 16 * index, ahead(page, in_page * QUARTER + (BLOCK_SIZE * HALF + 16 * part - 16 * lane), 1));
            if (part == 0) {
                // with that of its neighbour
                uint32_t step = 2 * (in_page - in_page % 2) + (BLOCK_SIZE * (HALF + QUARTER + 2) - 16 * lane);
                async_copy4(to + LIGHT_STEPS_AT + 4 * (4 * of_quad + k), ahead(page, step, 1));
            }
        }
        requested += 16;
    }

    // codes of number k
    __device__ __forceinline__ void load_codes(const uint8_t* batch, int k, uint32_t (&words)[VALUE_WORDS]) const {
        const uint8_t* from = batch + (4 * k + t) * QUARTER + g * VALUE_BYTES;
        if constexpr (VALUE_BYTES == 2) {
            words[0] = *reinterpret_cast<const uint16_t*>(from);
        } else if constexpr (VALUE_BYTES == 4) {
            words[0] = *reinterpret_cast<const uint32_t*>(from);
        } else {
            uint2 v = *reinterpret_cast<const uint2*>(from);
            words[0] = v.x, words[VALUE_WORDS - 1] = v.y;
        }
    }

    __device__ __forceinline__ void weigh_light() {
        constexpr uint32_t ONES = 0x3c003c00;
        const uint8_t* batch = batch_of(weighed);
        uint32_t first = weighed % LIGHT_ROOM + 2 * t;
        uint4 steps_at = *reinterpret_cast<const uint4*>(batch + LIGHT_STEPS_AT + 16 * t);
        uint32_t codes[4][VALUE_WORDS], operand[COLUMNS][2], weight[COLUMNS][2];
#pragma unroll
        for (int k = 0; k < 4; ++k) load_codes(batch, k, codes[k]);
#pragma unroll
        for (int k = 0; k < 2; ++k) {
            // steps of two keys, each the upper or the lower half of a word
            uint2 slot = *reinterpret_cast<const uint2*>(slots() + first + 8 * k);
            uint32_t selector = 0x5410 + slot.x % 2 * 0x22 + slot.y % 2 * 0x2200;
            uint32_t steps = permute_bytes(k ? steps_at.z : steps_at.x, k ? steps_at.w : steps_at.y, selector);
#pragma unroll
            for (int c = 0; c < COLUMNS; ++c) {
                // lanes of columns without a head take another's, and nobody looks at what comes of it
                uint2 v = *reinterpret_cast<const uint2*>(weights() + (4 * c + g % HEADS / 2) * LIGHT_STRIDE + first + 8 * k);
                weight[c][k] = permute_bytes(v.x, v.y, g % 2 ? 0x7632 : 0x5410);
                operand[c][k] = multiply_half2(weight[c][k], steps);
            }
        }
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c) {
            mma_half<true>(kept[c], ONES, ONES, ONES, ONES, weight[c][0], weight[c][1]);
            mma_half<true>(stepped[c], ONES, ONES, ONES, ONES, operand[c][0], operand[c][1]);
        }
#pragma unroll
        for (int b = 0; b < VALUE_BYTES; ++b) {
            // a code is a number of the least float16 where it stands; `value_of_light` makes levels of their sums
            uint32_t code[2][4];
#pragma unroll
            for (int k = 0; k < 2; ++k) {
                uint32_t both = permute_bytes(codes[2 * k][b / 4], codes[2 * k + 1][b / 4], 0x4400 + b % 4 * 0x1111);
#pragma unroll
                for (int quarter = 0; quarter < 4; ++quarter) code[k][quarter] = both & 0x00030003u << 2 * quarter;
            }
#pragma unroll
            for (int c = 0; c < COLUMNS; ++c)
#pragma unroll
                for (int i = 0; i < 2; ++i)
                    mma_half<true>(light[c][2 * b + i], code[0][2 * i], code[0][2 * i + 1], code[1][2 * i], code[1][2 * i + 1],
                                   operand[c][0], operand[c][1]);
        }
        weighed += 16;
    }

    // Weigh what has arrived, and ask for the next of the keys before `end`, as one group.
    __device__ __forceinline__ void turn_over_light(uint32_t end) {
        while (weighed != requested) weigh_light();
        __syncwarp();  // what is read is written over
        while (end - requested >= 16 && requested - weighed < 16 * LIGHT_BATCHES) request_light();
        async_commit();
    }

    // Weigh all keys of the ring, of which none is on its way unseen.
    __device__ __forceinline__ void finish_light() {
        uint32_t end = (light_end + 15) / 16 * 16;
        if (light_end + lane < end) {
            // the last key again, with weight 0
            uint32_t index = (light_end + lane) % LIGHT_ROOM;
            slots()[index] = slots()[(light_end - 1) % LIGHT_ROOM];
            for (int pair = 0; pair < HEADS / 2; ++pair) weights()[pair * LIGHT_STRIDE + index] = 0;
        }
        __syncwarp();
        while (weighed != end) {
            turn_over_light(end);
            async_wait<0>();
            __syncwarp();
        }
    }

    // What codes of a rotated channel, and products with steps, add up to, as a value: a level is a code less 1.5.
    static __device__ __forceinline__ float value_of_light(uint32_t channel, float codes, float stepped) {
        // 2^24 less the bits before the code
        float scale = __uint_as_float((127 + 24 - 2 * (channel / QUARTER)) << 23);
        return __fmaf_rn(codes, scale, -1.5f * stepped);
    }

    // where the sum of a head and a rotated channel of `weigh_light` stands, in floats
    static __device__ __forceinline__ uint32_t light_index(uint32_t head, uint32_t channel) {
        uint32_t byte = channel % QUARTER, quarter = channel / QUARTER, tile = 2 * (byte % VALUE_BYTES) + quarter / 2;
        return 4 * sum_index(head / 8, tile, byte / VALUE_BYTES, head % 8 / 2) + 2 * (quarter % 2) + head % 2;
    }
};

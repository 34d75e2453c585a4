// Heavy keys of tier_split.cu: read and scored exactly, with the values of those that survive.

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

// Copy the first `count` of 16 keys to shared memory, where they arrive later.
__device__ __forceinline__ void request_keys(const Piece& piece, const uint32_t* slots, uint32_t count, uint8_t* keys) {
    uint32_t lane = threadIdx.x & 31, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        if (g + 8 * r >= count) continue;
        const uint8_t* row = row_of(piece, slots[g + 8 * r]) + 16 * t;
        uint8_t* to = keys + (g + 8 * r) * KEY_STRIDE + 16 * t;
#pragma unroll
        for (int i = 0; i < HEAD_SIZE / 32; ++i) async_copy16(to + 64 * i, row + 64 * i);
    }
}

// Score the first `count` of 16 keys, which have arrived, and weigh the values of those that survive.
__device__ __forceinline__ void attend_exactly(const Piece& piece, const uint32_t* slots, uint32_t count, const uint8_t* keys, Exact& x) {
    uint32_t lane = threadIdx.x & 31, g = lane / 4, t = lane % 4;
    float products[COLUMNS][4] = {};
    // columns without a head take another's, which nobody looks at
    const uint8_t* query = dynamic_shared() + QUERY_AT + g % HEADS * QUERY_STRIDE + 16 * t;
#pragma unroll
    for (int i = 0; i < HEAD_SIZE / 32; ++i) {
        const uint8_t* part = keys + g * KEY_STRIDE + 16 * t + 64 * i;
        const uint4 k = *reinterpret_cast<const uint4*>(part), l = *reinterpret_cast<const uint4*>(part + 8 * KEY_STRIDE);
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c) {
            const uint4 q = *reinterpret_cast<const uint4*>(query + 8 * c * QUERY_STRIDE + 64 * i);
            mma_half<IS_FLOAT16>(products[c], k.x, l.x, k.y, l.y, q.x, q.y);
            mma_half<IS_FLOAT16>(products[c], k.z, l.z, k.w, l.w, q.z, q.w);
        }
    }
    bool listed[2], in_open[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        listed[r] = g + 8 * r < count;
        in_open[r] = listed[r] && slots[g + 8 * r] / BLOCK_SIZE == piece.open_block;
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
                score[r] = listed[r] ? capped(products[c][2 * r + e] * piece.scale, piece.logits_soft_cap) : DISCARDED;
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
                bool keep = listed[r] && score[r] >= theta && head < GROUP;
                weight[r][e] = keep ? exponential : 0.0f;
                kept += weight[r][e];
                lost += keep || !listed[r] ? 0.0f : exponential;
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
        x.rows_read += t == 0 && (alive[r] >> lane & 1) && !in_open[r];
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
        uint4 values[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) values[k] = is_read[k] ? load16(value[k] + 128 * i) : make_uint4(0, 0, 0, 0);
        add_values(x.output, i, values, operand);
    }
}

// where the sum of a head and a channel of `attend_exactly` stands, in floats
__device__ __forceinline__ uint32_t exact_index(uint32_t head, uint32_t channel) {
    uint32_t tile = channel / 64 * 4 + channel / 2 % 4;
    return 4 * sum_index(head / 8, tile, channel / 8 % 8, head % 8 / 2) + 2 * (channel % 2) + head % 2;
}

// ---- a warp's part of a piece ----
// Where the tokens of a piece stand in their sequence. It is seldom asked, so it is no use to a register.
struct Place {
    Spread spread;
    uint32_t unit_bits, end;  // of the number of sixteens in a unit; of the piece
    int seq_len, open_start;  // `open_start` is of the page that the next token goes to
    uint32_t open_rows;       // tokens of that page that were scanned
    uint32_t specials[4];     // of 32 sixteens each: those with positions that have no copy

    // where sixteen tokens begin, by their number in the piece's order; the end of the sequence behind the end of the piece
    __device__ __forceinline__ int position_of(uint32_t sixteen) const {
        uint32_t in_unit = sixteen & ((1u << unit_bits) - 1);
        return 16 * sixteen < end ? 16 * ((spread.unit_of(sixteen >> unit_bits) << unit_bits) + in_unit) : seq_len;
    }
};
static_assert(sizeof(Place) <= PLACE_BYTES, "room of a place");

struct Warp {
    uint32_t at;                // where the warp's shared memory is
    uint32_t warp, lane, g, t;  // a lane is number t of quad g
    uint32_t start, end;  // of the piece; tokens in their order where every key is kept, else in that of `Spread`
    int first_recent;
    const int* blocks;

    __device__ __forceinline__ uint8_t* mine() const { return dynamic_shared() + at; }
    __device__ __forceinline__ Place& place() const { return *reinterpret_cast<Place*>(mine() + PLACE_AT); }
    __device__ __forceinline__ uint32_t* heavy() const { return reinterpret_cast<uint32_t*>(mine() + HEAVY_AT); }

    // by warp: how many keys it has listed, and IS_DONE if it has scanned all of its stages
    __device__ __forceinline__ uint32_t* listed() const { return reinterpret_cast<uint32_t*>(dynamic_shared() + LISTED_AT); }

    // Attend to this warp's share of `count` keys, the i-th of which is in slot `slot_at(i)`.
    template <class SlotAt>
    __device__ __forceinline__ void attend_keys(Exact& exact, uint32_t count, SlotAt slot_at) const {
        const Piece& piece = piece_of(dynamic_shared());
        uint32_t* slots = reinterpret_cast<uint32_t*>(mine() + SLOTS_AT);
        // Registers that loads are on their way to would be waited for at the next branch.
        uint32_t first = 16 * warp, half = 0;
        auto look_up = [&](uint32_t half) {
            uint32_t* to = slots + 16 * half;
            if (lane < 16 && first + lane < count) to[lane] = slot_at(first + lane);
            __syncwarp();
            uint32_t number = first < count ? min(16u, count - first) : 0u;
            request_keys(piece, to, number, mine() + KEYS_AT + half * KEYS_BYTES);
            async_commit();
            first += 16 * WARPS;
            return number;
        };
        uint32_t number = look_up(0);
        while (number) {
            uint32_t next;
            // they are on their way while these keys are scored and their values read, where there is room for both
            if constexpr (KEY_BUFFERS == 2) next = look_up(half ^ 1);
            async_wait<KEY_BUFFERS - 1>();
            __syncwarp();
            attend_exactly(piece, slots + 16 * half, number, mine() + KEYS_AT + half * KEYS_BYTES, exact);
            __syncwarp();
            if constexpr (KEY_BUFFERS == 1) next = look_up(0);
            number = next, half ^= KEY_BUFFERS - 1;
        }
        async_wait<0>();
        __syncwarp();
    }
};

// Sizes, shared memory and arguments of value_split.cu.
//
// GROUP are the queries that share a kv head: those of its query heads, for each of up to QUERY_LEN new tokens.

constexpr uint32_t STAGE_TOKENS = 16;
constexpr uint32_t ROW_BYTES = 2 * HEAD_SIZE, CHUNKS = ROW_BYTES / 16;  // of a key or a value
constexpr uint32_t QUERY_HEADS = GROUP / QUERY_LEN;                     // of a kv head
constexpr int COLUMNS = GROUP > 8 ? 2 : 1;                              // blocks of eight columns
constexpr uint32_t HEADS = GROUP <= 4 ? 4 : 8 * COLUMNS;                // that the ring has scores of
constexpr int TILES = HEAD_SIZE / 16;                                   // of 16 channels
constexpr bool HAS_HALF = HEAD_SIZE % 64 != 0;                          // of the last value part, in which a lane has 8 bytes
constexpr int KEY_PARTS = HEAD_SIZE / 32;                               // of 16 bytes that a lane has of a row
constexpr int VALUE_PARTS = HEAD_SIZE / 64 + HAS_HALF;                  // likewise
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
constexpr uint32_t WARP_BYTES = SLOTS_AT + ROOM * 4;
constexpr uint32_t QUERY_STRIDE = ROW_BYTES + (HAS_HALF ? 0 : 64);  // an odd number of half the banks
constexpr uint32_t QUERY_AT = WARPS * WARP_BYTES, STATS_AT = QUERY_AT + 8 * COLUMNS * QUERY_STRIDE;
constexpr uint32_t COUNTS_AT = STATS_AT + WARPS * 3 * 16 * 4;  // at most 16 warps
constexpr uint32_t THRESHOLDS_AT = COUNTS_AT + 64, SHARED_BYTES = THRESHOLDS_AT + 2 * 16 * 4;
static_assert(STAGE_BYTES % 128 == 0 && WARP_BYTES % 16 == 0, "copies of 16 bytes");
static_assert(SHARED_BYTES == EXPECTED_SHARED_BYTES, "the launch asks for what is used");

// of a column
__device__ __forceinline__ uint32_t head_of(uint32_t column) { return QUERY_LEN == 1 ? column : column % QUERY_HEADS; }

// The new tokens of a sequence.
struct NewTokens {
    int first;        // of the step's tokens
    uint32_t number;  // how many there are

    // which of them a column is of; columns behind the last one's are as that
    __device__ __forceinline__ uint32_t number_of(uint32_t column) const {
        return QUERY_LEN == 1 ? 0 : min(column / QUERY_HEADS, number - 1);
    }

    // how many keys a column sees of a sequence's
    __device__ __forceinline__ uint32_t seen_by(uint32_t column, uint32_t seq_len) const {
        return QUERY_LEN == 1 ? seq_len : seq_len - (number - 1) + number_of(column);
    }
};

struct Args {
    const uint8_t* kv_cache;
    const int* block_table;
    const int* seq_lens;
    const int* head_programs;  // or null: each kv head has as many
    const float* threshold_offset;  // or null
    const uint8_t* query;
    const float* thresholds;
    const float* q_scale;  // or null
    const float* k_scale;  // or null
    float* piece_output;
    float* piece_stats;
    long long* value_rows_read;  // or null
    uint32_t stride_block, stride_head, stride_token;  // bytes
    uint32_t query_stride_seq, query_stride_head;
    int table_stride, num_seqs, num_kv_heads;
    int max_dense_len, min_step_tokens;
    ScheduleArgs schedule;
    float softmax_scale, logits_soft_cap;
    const int* query_start_loc;  // null if QUERY_LEN is 1
};

// Sizes, shared memory and arguments of value_split.cu.

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
constexpr uint32_t WARP_BYTES = SLOTS_AT + ROOM * 4;
constexpr uint32_t QUERY_STRIDE = ROW_BYTES + 64;
constexpr uint32_t QUERY_AT = WARPS * WARP_BYTES, STATS_AT = QUERY_AT + 8 * COLUMNS * QUERY_STRIDE;
constexpr uint32_t COUNTS_AT = STATS_AT + WARPS * 3 * 16 * 4;  // at most 16 warps
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
    long long* value_rows_read;  // or null
    uint32_t stride_block, stride_head, stride_token;  // bytes
    uint32_t query_stride_seq, query_stride_head;
    int table_stride, num_seqs, num_kv_heads;
    int max_dense_len, min_step_tokens;
    ScheduleArgs schedule;
    float softmax_scale, logits_soft_cap;
};

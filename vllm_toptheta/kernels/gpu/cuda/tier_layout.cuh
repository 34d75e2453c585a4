// Sizes, shared memory and arguments of tier_split.cu.

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
constexpr uint32_t LIGHT_ROOM = 128, LIGHT_STRIDE = 136;      // the stride spreads pairs of heads over the banks
constexpr uint32_t LIGHT_BATCHES = 2;                         // of 16 light keys, that are on their way at a time
constexpr uint32_t IS_DONE = 1u << 31;

// bytes of shared memory: what every warp has, and behind that what all have together
constexpr uint32_t STEPS_AT = STEP * HALF, STEP_BYTES = STEPS_AT + 2 * STEP, STAGE_BYTES = STAGE_STEPS * STEP_BYTES;
// in the end, sums stand where the ring was, and what they are relative to where codes of light keys were
constexpr uint32_t SUMS_BYTES = COLUMNS * TILES * 8 * ACC_QUAD * 16, LIGHT_AT = 0, EXACT_AT = SUMS_BYTES;
constexpr uint32_t IDS_AT = STAGES * STAGE_BYTES > 2 * SUMS_BYTES ? STAGES * STAGE_BYTES : 2 * SUMS_BYTES;
constexpr uint32_t WEIGHTS_AT = IDS_AT + 64 * 4;
constexpr uint32_t SLOTS_AT = WEIGHTS_AT + HEADS / 2 * LIGHT_STRIDE * 4, CODES_AT = SLOTS_AT + LIGHT_ROOM * 4;
constexpr uint32_t LIGHT_STEPS_AT = 16 * QUARTER, BATCH_BYTES = LIGHT_STEPS_AT + 16 * 4;  // of light keys' codes
constexpr uint32_t STATS_AT = CODES_AT, NUM_STATS = 6;  // of 16 heads each
constexpr uint32_t HEAVY_AT = CODES_AT + LIGHT_BATCHES * BATCH_BYTES;
constexpr uint32_t PLACE_AT = HEAVY_AT + HEAVY_ROOM * 4, PLACE_BYTES = 48, WARP_BYTES = PLACE_AT + PLACE_BYTES;
// Exact queries and keys; the stride spreads rows over the banks. Keys stand behind light sums, where codes and weights were
// that nobody needs any more, two batches of 16 if both fit.
constexpr uint32_t QUERY_STRIDE = 2 * HEAD_SIZE + 64, KEY_STRIDE = QUERY_STRIDE, KEYS_BYTES = 16 * KEY_STRIDE;
constexpr uint32_t KEYS_AT = LIGHT_AT + SUMS_BYTES, KEY_BUFFERS = KEYS_AT + 2 * KEYS_BYTES <= SLOTS_AT ? 2 : 1;
constexpr uint32_t PIECE_AT = WARPS * WARP_BYTES, QUERY_AT = PIECE_AT + 64, COUNTS_AT = QUERY_AT + HEADS * QUERY_STRIDE;
constexpr uint32_t OPERANDS = ROW_TOKENS * COLUMNS, OPERAND_BYTES = 32 * KEY_WORDS * 4;  // codes of queries, one half
constexpr uint32_t OPERANDS_AT = COUNTS_AT + WARPS * 16, TERMS_AT = OPERANDS_AT + 2 * OPERANDS * OPERAND_BYTES;
constexpr uint32_t LISTED_AT = TERMS_AT + 16 * 3 * 4, SHARED_BYTES = LISTED_AT + 64;  // at most 16 warps
static_assert(KEYS_AT + KEYS_BYTES <= SLOTS_AT, "room of keys");
static_assert(NUM_STATS * 16 * 4 <= LIGHT_BATCHES * BATCH_BYTES, "room of statistics");
static_assert(STAGES >= 3, "codes and light keys arrive in groups");
static_assert(LIGHT_ROOM >= STAGE_TOKENS + 16 * LIGHT_BATCHES + 16, "light keys of a stage have room");
static_assert(STAGE_BYTES % 16 == 0 && CODES_AT % 16 == 0 && WARP_BYTES % 16 == 0 && QUERY_STRIDE % 16 == 0, "copies of 16 bytes");
static_assert(SHARED_BYTES == EXPECTED_SHARED_BYTES, "the launch asks for what is used");

struct Args {
    const uint8_t* kv_cache;
    const int* block_table;
    const int* seq_lens;
    const int* head_programs;  // or null
    const float* threshold_offset;  // or null
    const uint8_t* query;
    const float* thresholds;
    const float* anchor_lse;
    const float* q_scale;  // or null
    const float* k_scale;  // or null
    const uint8_t* codes;
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

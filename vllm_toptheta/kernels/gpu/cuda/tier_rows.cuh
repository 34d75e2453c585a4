// Rows in rotated channels, a warp each, for copies of keys and values and for what is compared with them.

constexpr uint32_t HALF = HEAD_SIZE / 2, QUARTER = HEAD_SIZE / 4;  // bytes of a key's codes, and of a value's
constexpr float LEAST_STEP = 5.9604644775390625e-08f, LARGEST_HALF = 65504.0f;
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

// a lane's of HEAD_SIZE floats
__device__ __forceinline__ void load_floats(const float* from, uint32_t lane, float (&x)[LANE_CHANNELS]) {
#pragma unroll
    for (int i = 0; i < LANE_CHANNELS; i += 2) {
        uint2 v = load8(from + LANE_CHANNELS * lane + i);
        x[i] = __uint_as_float(v.x), x[i + 1] = __uint_as_float(v.y);
    }
}

// R x; `signs` is the first row of R, signs over the root of the size
__device__ __forceinline__ void rotate(const float (&signs)[LANE_CHANNELS], float (&x)[LANE_CHANNELS], uint32_t lane) {
#pragma unroll
    for (int i = 0; i < LANE_CHANNELS; ++i) x[i] *= signs[i];
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

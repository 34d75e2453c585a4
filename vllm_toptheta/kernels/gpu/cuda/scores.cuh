// Scores as the kernels of this folder have them: in natural units, exponentials in base 2.
//
// SOFT_CAP is defined when a kernel is compiled.

constexpr float LOG2_E = 1.4426950408889634f;
constexpr float DISCARDED = -2.0e30f;  // score of a key that a head does not see or keep
constexpr float HIGHEST = 1.0e30f;     // no score reaches it, and every score reaches its negative

__device__ __forceinline__ float capped(float score, float cap) {
    // tanh(x) = 1 - 2 / (exp(2 x) + 1)
    return SOFT_CAP ? cap * (1.0f - divide_fast(2.0f, exp2_fast(score * (2.0f * LOG2_E / cap)) + 1.0f)) : score;
}

// Calls everything that device.cuh and device.h both provide, for two warps, so that CPU and GPU can be compared.

struct Arguments {
    const uint32_t* fragments;  // [64, 6]: a0..a3, b0, b1 of each thread
    const uint32_t* words;      // [num_words, 3]
    const float* floats;        // [num_words, 2]
    int* codes;                 // [64, 4]
    float* halves;              // [2, 64, 4]: float16, bfloat16
    uint32_t* transposed;       // [64]
    uint32_t* bits;             // [num_words, 4]: permute_bytes, pack_half of float16 and of bfloat16, multiply_half2
    float* reals;               // [num_words, 5]: 2 ** x, x / (|y| + 1), float16 twice and bfloat16 of the low 16 bits of x
    uint4* copied;              // [64]: what the neighbour's fragments begin with
    int* collected;             // [64, 8]
    long long* total;
    int num_words;
};

extern "C" __global__ void __launch_bounds__(64) probe(const Arguments arguments) {
    wait_for_predecessor();
    const int thread = threadIdx.x, lane = thread % 32;
    const uint32_t* mine = arguments.fragments + 6 * thread;
    uint32_t own[6];
    for (int i = 0; i < 6; ++i) own[i] = load4(mine + i);

    int codes[4] = {1, 2, 3, 4};
    mma_codes(codes, own[0], own[1], own[2], own[3], own[4], own[5]);
    float float16s[4] = {1.0f, 2.0f, 3.0f, 4.0f}, bfloat16s[4] = {1.0f, 2.0f, 3.0f, 4.0f};
    mma_half<true>(float16s, own[0], own[1], own[2], own[3], own[4], own[5]);
    mma_half<false>(bfloat16s, own[0], own[1], own[2], own[3], own[4], own[5]);
    for (int i = 0; i < 4; ++i) {
        arguments.codes[4 * thread + i] = codes[i];
        arguments.halves[4 * thread + i] = float16s[i];
        arguments.halves[256 + 4 * thread + i] = bfloat16s[i];
    }
    arguments.transposed[thread] = transpose8(own[0]);

    for (int i = thread; i < arguments.num_words; i += blockDim.x) {
        const uint32_t x = arguments.words[3 * i], y = arguments.words[3 * i + 1], z = arguments.words[3 * i + 2];
        const float low = arguments.floats[2 * i], high = arguments.floats[2 * i + 1];
        arguments.bits[4 * i] = permute_bytes(x, y, z);
        arguments.bits[4 * i + 1] = pack_half<true>(low, high);
        arguments.bits[4 * i + 2] = pack_half<false>(low, high);
        arguments.bits[4 * i + 3] = multiply_half2(x, y);
        const uint16_t half = load2(ahead(reinterpret_cast<const uint8_t*>(arguments.words), i, 12));
        arguments.reals[5 * i] = exp2_fast(low);
        arguments.reals[5 * i + 1] = divide_fast(low, fabsf(high) + 1.0f);
        arguments.reals[5 * i + 2] = half_to_float(half);
        arguments.reals[5 * i + 3] = element_to_float<true>(half);
        arguments.reals[5 * i + 4] = element_to_float<false>(half);
    }

    // 64 copies of 16 bytes in two groups, of which the second comes in parts of 4; it is awaited last
    uint8_t* shared = dynamic_shared();
    for (int group = 0; group < 2; ++group) {
        if (thread / 32 == group && group == 0) async_copy16(shared + 16 * thread, arguments.fragments + 4 * thread);
        for (int i = 0; i < 4 && thread / 32 == group && group == 1; ++i)
            async_copy4(shared + 16 * thread + 4 * i, arguments.fragments + 4 * thread + i);
        async_commit();
    }
    async_wait<1>();
    __syncthreads();
    async_wait<0>();
    __syncthreads();
    const uint4 neighbour = *reinterpret_cast<const uint4*>(shared + 16 * (thread ^ 33));
    const uint4 same = load16(arguments.fragments + 4 * (thread ^ 33));
    const uint2 half_of_it = load8(arguments.fragments + 4 * (thread ^ 33));
    const bool agrees = neighbour.x == same.x && neighbour.w == same.w && neighbour.y == half_of_it.y;
    arguments.copied[thread] = agrees ? neighbour : make_uint4(0, 0, 0, 0);

    int* collected = arguments.collected + 8 * thread;
    const int value = static_cast<int>(own[0]);
    collected[0] = static_cast<int>(__ballot_sync(ALL, value & 1));
    collected[1] = __any_sync(ALL, lane == 7 && value > 0);
    collected[2] = __shfl_sync(ALL, value, lane * 5 % 32);
    collected[3] = __shfl_xor_sync(ALL, value, 9);
    collected[4] = __shfl_up_sync(ALL, value, 3);
    collected[5] = __reduce_add_sync(ALL, value);
    const long long wide = static_cast<long long>(value) * 3;
    collected[6] = static_cast<int>(__shfl_sync(ALL, wide, 31 - lane) >> 1);
    collected[7] = min(__popc(own[0]), 14) + max(__ffs(value), __clz(value));
    __syncwarp();
    atomic_add(arguments.total, wide);
    allow_successor();
}

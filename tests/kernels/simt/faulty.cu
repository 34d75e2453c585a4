// Kernels that break a rule each, or keep one that is easily broken.

struct Arguments {
    const int* from;  // [256]
    int* to;          // [64]
    int fault;
};

extern "C" __global__ void faulty(const Arguments arguments) {
    const int thread = threadIdx.x;
    uint8_t* shared = dynamic_shared();
    int* own = reinterpret_cast<int*>(shared) + thread;
    switch (arguments.fault) {
        case 0:  // lanes meet at different operations
            if (thread % 2) {
                __syncwarp();
            } else {
                __ballot_sync(ALL, 1);
            }
            break;
        case 1:  // half of a warp waits for the CTA, half for the warp
            if (thread % 32 < 16) __syncthreads();
            __syncwarp();
            break;
        case 2:  // a lane that has ended is asked
            if (thread == 3) return;
            arguments.to[thread] = __shfl_sync(ALL, thread, 3);
            break;
        case 3:  // threads that have ended hold nobody up
            if (thread % 32 > 20) return;
            arguments.to[thread] = static_cast<int>(__ballot_sync(ALL, 1));
            __syncthreads();
            break;
        case 4:  // nobody waits for the copy
            async_copy16(shared + 16 * thread, arguments.from + 4 * thread);
            async_commit();
            __syncthreads();
            arguments.to[thread] = *own;
            break;
        case 5:  // the last group is not waited for
            for (int i = 0; i < 2; ++i) {
                async_copy16(shared + 16 * (64 * i + thread), arguments.from + 4 * thread);
                async_commit();
            }
            async_wait<1>();
            arguments.to[thread] = own[thread * 3] == arguments.from[4 * thread] ? own[thread * 3 + 256] : -1;
            break;
        case 6:  // past the end of shared memory
            shared[2048 + thread] = 1;
            break;
        case 7:
            async_copy16(shared + 2048, arguments.from);
            break;
        case 8:
            arguments.to[thread] = static_cast<int>(load8(arguments.from + 1).x);
            break;
        case 9:  // a mask of some lanes
            __syncwarp(0xFFu);
            break;
        case 10:  // a missing barrier between warps
            *own = thread;
            arguments.to[thread] = reinterpret_cast<int*>(shared)[thread ^ 32];
            break;
    }
}

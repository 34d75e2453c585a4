// Threads of a CTA as fibers of one CPU thread: what they wait for, who runs next, and what a deadlock looks like.
//
// A warp's lanes run one after the other, each until it meets the others at a collective operation or at a barrier;
// the last to arrive goes on at once. CTAs follow each other. Where lanes of a warp meet at different operations or
// lines, where nobody can go on, or where memory is used against the rules, the run ends with a message.
#pragma once

#include <sys/mman.h>

#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace simt {

struct Index {
    unsigned x, y, z;
};

constexpr int WARP = 32;
constexpr size_t STACK_BYTES = 256 << 10;
constexpr size_t PAGE_BYTES = 4096;
constexpr int CANARY_BYTES = 1024;  // behind the shared memory, to notice what writes past its end

#if defined(__x86_64__)
using Context = void*;  // the stack pointer, below the registers that a function must preserve
// Saves the running context and goes on with another.
extern "C" void simt_switch(Context* from, Context* to);
asm(R"(
    .text
    .local simt_switch
    .type simt_switch, @function
simt_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq (%rsi), %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size simt_switch, . - simt_switch
)");

inline void make_context(Context* context, uint8_t* stack, void (*entry)()) {
    // as if `entry` had been called: where it would return to, which nobody does, lies at a multiple of 16 less 8
    auto* top = reinterpret_cast<void**>(stack + STACK_BYTES) - 1;
    *top = nullptr;
    *--top = reinterpret_cast<void*>(entry);
    top -= 6;
    *context = top;
}
#else
using Context = ucontext_t;
inline void simt_switch(Context* from, Context* to) { swapcontext(from, to); }

inline void make_context(Context* context, uint8_t* stack, void (*entry)()) {
    getcontext(context);
    context->uc_stack.ss_sp = stack;
    context->uc_stack.ss_size = STACK_BYTES;
    context->uc_link = nullptr;
    makecontext(context, entry, 0);
}
#endif

struct Words {
    uint32_t word[6];
};

struct Copy {
    uint8_t* to;
    const uint8_t* from;
    size_t bytes;
};

struct Warp;

struct Thread {
    Context context;
    Warp* warp;
    int lane;
    Index index;
    std::vector<Copy> copies;     // not yet made, oldest first
    std::vector<size_t> groups;   // copies of each closed group, oldest first
    size_t open_copies;           // those behind the last closed group
};

struct Warp {
    Thread* lanes;
    uint32_t alive, ready, at_collective, at_barrier;  // a bit per lane
    const char* operation;                             // where the first lane arrived
    int line;
    int first_lane;
    int phase;                 // two sets of slots: nobody overwrites what a slower lane has yet to read
    uint32_t posted[2];        // lanes that took part
    Words slots[2][WARP];
};

// Of the running CTA. Not static, so that the compiler reloads them behind simt_switch.
Thread* current;
Index block_index, grid_size, block_size;
uint8_t* shared_memory;
size_t shared_size;
std::vector<Thread> threads;
std::vector<Warp> warps;
int alive_threads, waiting_threads;  // the latter at the barrier
Context scheduler;
uint8_t* stacks;
size_t num_stacks;
bool is_reversed;  // lanes and warps take their turns in descending order
bool has_failed;
char message[1024];
const void* kernel_arguments;
void (*call_kernel)(const void*);

[[gnu::noinline]] inline void switch_to_scheduler() { simt_switch(&current->context, &scheduler); }

// Ends the run with a message; it does not return, and nothing on the fibers' stacks is destroyed.
[[noreturn, gnu::format(printf, 1, 2)]] inline void fail(const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    const int start = snprintf(message, sizeof message, "block (%u, %u, %u), thread %u: ", block_index.x, block_index.y,
                               block_index.z, current->index.x);
    vsnprintf(message + start, sizeof message - start, format, arguments);
    va_end(arguments);
    has_failed = true;
    switch_to_scheduler();
    abort();  // nobody resumes a failed run
}

// The next of a set of lanes, cyclically behind a lane.
inline int next_lane(uint32_t set, int lane) {
    const uint32_t above = lane >= 31 ? 0 : set & (~0u << (lane + 1));
    const uint32_t below = lane <= 0 ? 0 : set & (~0u >> (32 - lane));
    if (is_reversed) return 31 - __builtin_clz(below ? below : set);
    return __builtin_ctz(above ? above : set);
}

// Lets another lane of this warp run, or another warp; returns when this lane is ready and its turn comes.
[[gnu::noinline]] inline void yield() {
    Thread* const self = current;
    const uint32_t ready = self->warp->ready;
    if (!ready) return switch_to_scheduler();
    current = &self->warp->lanes[next_lane(ready, self->lane)];
    simt_switch(&self->context, &current->context);
}

// Lets the lanes at the warp's collective operation go on, once all that are alive have arrived.
inline bool release_warp(Warp& warp) {
    if (!warp.at_collective || warp.at_collective != warp.alive) return false;
    warp.ready |= warp.at_collective;
    warp.at_collective = 0;
    warp.phase ^= 1;
    warp.posted[warp.phase] = 0;
    return true;
}

inline bool release_barrier() {
    if (!waiting_threads || waiting_threads != alive_threads) return false;
    for (Warp& warp : warps) {
        warp.ready |= warp.at_barrier;
        warp.at_barrier = 0;
    }
    waiting_threads = 0;
    return true;
}

// What every lane brought to a collective operation.
struct Meeting {
    const Words* slots;
    uint32_t lanes;

    const Words& of(int lane) const {
        if (!(lanes >> lane & 1)) fail("reads lane %d, which has ended", lane);
        return slots[lane];
    }
};

// Meets the other lanes of the warp. `operation` is a string literal; it and the line of the source must be the same.
inline Meeting meet(const char* operation, int line, unsigned mask, const Words& words) {
    Warp& warp = *current->warp;
    const int lane = current->lane;
    if (mask != ~0u) fail("%s in line %d: only masks of all lanes are supported, this is %#x", operation, line, mask);
    if (!warp.at_collective) {
        warp.operation = operation;
        warp.line = line;
        warp.first_lane = lane;
    } else if (line != warp.line || strcmp(operation, warp.operation) != 0) {
        fail("%s in line %d, while lane %d of the warp is at %s in line %d", operation, line, warp.first_lane,
             warp.operation, warp.line);
    }
    const int phase = warp.phase;
    warp.slots[phase][lane] = words;
    warp.posted[phase] |= 1u << lane;
    warp.at_collective |= 1u << lane;
    warp.ready &= ~(1u << lane);
    if (!release_warp(warp)) yield();
    return {warp.slots[phase], warp.posted[phase]};
}

inline void barrier() {
    Warp& warp = *current->warp;
    warp.at_barrier |= 1u << current->lane;
    warp.ready &= ~(1u << current->lane);
    ++waiting_threads;
    if (!release_barrier()) yield();
}

inline void run_thread() {
    call_kernel(kernel_arguments);
    Warp& warp = *current->warp;
    warp.alive &= ~(1u << current->lane);
    warp.ready &= ~(1u << current->lane);
    --alive_threads;
    release_warp(warp);
    release_barrier();
    yield();
    abort();  // nobody resumes a thread that has ended
}

inline void allocate_stacks(size_t number) {
    if (number <= num_stacks) return;
    const size_t bytes = STACK_BYTES + PAGE_BYTES;
    if (stacks) munmap(stacks, num_stacks * bytes);
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void* memory = mmap(nullptr, number * bytes, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (memory == MAP_FAILED) {
        fprintf(stderr, "no memory for the stacks of %zu fibers\n", number);
        abort();
    }
    stacks = static_cast<uint8_t*>(memory);
    num_stacks = number;
    // a page below each stack that nobody may touch, so that an overflow is noticed
    for (size_t i = 0; i < number; ++i) mprotect(stacks + i * bytes, PAGE_BYTES, PROT_NONE);
}

inline void start_block(int num_threads) {
    threads.resize(num_threads);
    warps.resize((num_threads + WARP - 1) / WARP);
    for (size_t i = 0; i < warps.size(); ++i) {
        const int lanes = num_threads - static_cast<int>(i) * WARP;
        const uint32_t alive = lanes >= WARP ? ~0u : (1u << lanes) - 1;
        warps[i] = Warp{};
        warps[i].lanes = &threads[i * WARP];
        warps[i].alive = warps[i].ready = alive;
    }
    for (int i = 0; i < num_threads; ++i) {
        Thread& thread = threads[i];
        thread.warp = &warps[i / WARP];
        thread.lane = i % WARP;
        thread.index = {static_cast<unsigned>(i), 0, 0};
        thread.copies.clear();
        thread.groups.clear();
        thread.open_copies = 0;
        make_context(&thread.context, stacks + i * (STACK_BYTES + PAGE_BYTES) + PAGE_BYTES, run_thread);
    }
    alive_threads = num_threads;
    waiting_threads = 0;
}

// Says of the first warp that is stuck where its lanes are.
inline void report_deadlock() {
    for (const Warp& warp : warps) {
        if (!warp.alive) continue;
        current = &warp.lanes[next_lane(warp.alive, 31)];
        const int start = snprintf(message, sizeof message, "block (%u, %u, %u), warp %zu: nobody can go on; ",
                                   block_index.x, block_index.y, block_index.z, &warp - warps.data());
        snprintf(message + start, sizeof message - start,
                 "lanes %#x of %#x are at __syncthreads, lanes %#x at %s in line %d; "
                 "%d of %d threads are at __syncthreads",
                 warp.at_barrier, warp.alive, warp.at_collective, warp.at_collective ? warp.operation : "nothing",
                 warp.line, waiting_threads, alive_threads);
        if (warp.at_collective) break;
    }
    has_failed = true;
}

inline void run_block(int num_threads) {
    start_block(num_threads);
    while (alive_threads && !has_failed) {
        bool has_run = false;
        for (size_t i = 0; i < warps.size() && !has_failed; ++i) {
            Warp& warp = warps[is_reversed ? warps.size() - 1 - i : i];
            if (!warp.ready) continue;
            has_run = true;
            current = &warp.lanes[next_lane(warp.ready, is_reversed ? 0 : 31)];
            simt_switch(&scheduler, &current->context);
        }
        if (!has_run) report_deadlock();
    }
}

// Runs every CTA; the error, or null.
inline const char* run_grid(Index grid, int num_threads, int shared_bytes) {
    has_failed = false;
    if (num_threads < 1 || num_threads > 1024 || shared_bytes < 0 || !grid.x || !grid.y || !grid.z) {
        return "threads must be 1 to 1024, shared_bytes not negative, and the grid not empty";
    }
    allocate_stacks(num_threads);
    grid_size = grid;
    block_size = {static_cast<unsigned>(num_threads), 1, 1};
    shared_size = shared_bytes;
    const size_t bytes = (shared_bytes + CANARY_BYTES + 127) / 128 * 128;
    shared_memory = static_cast<uint8_t*>(aligned_alloc(128, bytes));
    for (unsigned z = 0; z < grid.z && !has_failed; ++z) {
        for (unsigned y = 0; y < grid.y && !has_failed; ++y) {
            for (unsigned x = 0; x < grid.x && !has_failed; ++x) {
                block_index = {x, y, z};
                // NaN as float16 and bfloat16, and far too large as anything else
                memset(shared_memory, 0x7F, bytes);
                run_block(num_threads);
                for (size_t i = shared_size; i < bytes && !has_failed; ++i) {
                    if (shared_memory[i] != 0x7F) {
                        snprintf(message, sizeof message,
                                 "block (%u, %u, %u): byte %zu of shared memory is written, which has %zu", x, y, z, i,
                                 shared_size);
                        has_failed = true;
                    }
                }
            }
        }
    }
    free(shared_memory);
    return has_failed ? message : nullptr;
}

template <class Arguments, void (*KERNEL)(Arguments)>
const char* run(const void* arguments, size_t argument_bytes, Index grid, int num_threads, int shared_bytes) {
    if (argument_bytes != sizeof(Arguments)) {
        snprintf(message, sizeof message, "the kernel's arguments have %zu bytes, those given %zu", sizeof(Arguments),
                 argument_bytes);
        return message;
    }
    kernel_arguments = arguments;
    call_kernel = [](const void* from) { KERNEL(*static_cast<const Arguments*>(from)); };
    return run_grid(grid, num_threads, shared_bytes);
}

template <class Arguments>
Arguments argument_of(void (*)(Arguments));

}  // namespace simt

// Makes a kernel of one argument callable as run_NAME; the answer is null or what went wrong.
#define SIMT_EXPORT(NAME)                                                                                             \
    extern "C" const char* run_##NAME(const void* arguments, size_t argument_bytes, unsigned grid_x, unsigned grid_y, \
                                      unsigned grid_z, int num_threads, int shared_bytes, int is_reversed) {          \
        using Arguments = decltype(simt::argument_of(NAME));                                                          \
        simt::is_reversed = is_reversed != 0;                                                                         \
        return simt::run<Arguments, NAME>(arguments, argument_bytes, {grid_x, grid_y, grid_z}, num_threads,           \
                                          shared_bytes);                                                              \
    }

// Who does what: schedule.py, for kernels of this folder. Whoever joins pieces works the same out there.
//
// All lanes of a warp call `step_of` and `walk_of` together, with `Args` that hold the fields they name.

struct ScheduleArgs {
    int num_programs;  // of a kv head, where all have as many
    int unit;          // tokens
    int min_work, dense_work, piece_work;
};

constexpr int ANY_LENGTH = 0x7fffffff;

struct StepTokens {
    int num_tokens, num_decoded;
    bool all_dense;  // because the step is small, or any length is
};

struct Step {
    int num_tokens, num_decoded;
    int share, entry, multiple;  // work of a program; of a sequence before its first unit, and what it is rounded up to
    int equal;           // share of a program if every sequence has an entry
    int total;           // work of all
    int max_dense_len;
};

__device__ __forceinline__ int divide_up(int a, int b) { return (a + b - 1) / b; }

template <class Args>
__device__ __forceinline__ bool keeps_all(const Args& a, int seq, int seq_len, int max_dense_len) {
    return seq_len <= max_dense_len || (a.threshold_offset && a.threshold_offset[seq] < -3.4e38f);
}

__device__ __forceinline__ int work_of(const ScheduleArgs& s, int seq_len, bool is_dense, int entry, int multiple) {
    int work = divide_up(seq_len, s.unit) * (is_dense ? s.dense_work : 1);
    return divide_up(work + (seq_len > 0 ? entry : 0), multiple) * multiple;
}

template <class Args>
__device__ __forceinline__ StepTokens tokens_of(const Args& a, int lane) {
    int num_tokens = 0, num_decoded = 0;
    for (int seq = lane; seq < a.num_seqs; seq += 32) num_tokens += a.seq_lens[seq], num_decoded += a.seq_lens[seq] > 0;
    num_tokens = __reduce_add_sync(ALL, num_tokens);
    bool all_dense = num_tokens < a.min_step_tokens || a.max_dense_len == ANY_LENGTH;
    return {num_tokens, int(__reduce_add_sync(ALL, num_decoded)), all_dense};
}

// of a kv head that has `num_programs`
template <class Args>
__device__ __forceinline__ Step step_of(const Args& a, const StepTokens& tokens, int num_programs, int lane) {
    const ScheduleArgs& s = a.schedule;
    Step step;
    step.num_tokens = tokens.num_tokens, step.num_decoded = tokens.num_decoded;
    step.max_dense_len = tokens.all_dense ? ANY_LENGTH : a.max_dense_len;
    int total = 0, most = 0;
    for (int seq = lane; seq < a.num_seqs; seq += 32) {
        int len = a.seq_lens[seq], work = work_of(s, len, keeps_all(a, seq, len, step.max_dense_len), 0, 1);
        total += work, most = max(most, work);
    }
    total = __reduce_add_sync(ALL, total);
    for (int m = 16; m; m /= 2) most = max(most, __shfl_xor_sync(ALL, most, m));
    int num_decoded = max(step.num_decoded, 1);
    int even = divide_up(most, max(num_programs / num_decoded, 1));
    int rounded = min(even, divide_up(total, max(num_programs - num_decoded, 1)));
    // one sequence is one piece of each program, and small steps are rounded or not by their number of sequences
    int piece_work = num_decoded > 1 && !tokens.all_dense ? s.piece_work : 0;
    int with_entries = total + step.num_decoded * piece_work, equal = divide_up(with_entries, num_programs);
    step.equal = equal;
    bool is_worth = num_decoded <= num_programs && rounded < equal + piece_work / 2;
    bool is_rounded = tokens.all_dense ? 2 * num_decoded <= num_programs : is_worth;
    step.share = max(is_rounded ? rounded : equal, s.min_work);
    step.multiple = is_rounded ? step.share : 1, step.entry = is_rounded ? 0 : piece_work;
    step.total = with_entries;
    if (is_rounded) {
        total = 0;
        for (int seq = lane; seq < a.num_seqs; seq += 32) {
            int len = a.seq_lens[seq];
            total += work_of(s, len, keeps_all(a, seq, len, step.max_dense_len), 0, step.multiple);
        }
        step.total = __reduce_add_sync(ALL, total);
    }
    return step;
}

// The tokens of a sequence that are in a program's share.
struct PieceTokens {
    int seq, seq_len, start, end;
    bool is_dense;
};

// Which of `count` sizes in a row, given by their numbers, ends behind `target`, and what those before it come to; `count`,
// of size 0, if none does.
struct Found {
    int index, before, size;
};

template <class SizeOf>
__device__ __forceinline__ Found find(int count, int target, int lane, SizeOf size_of) {
    int before = 0;
    for (int first = 0; first < count; first += 32) {
        int size = first + lane < count ? size_of(first + lane) : 0, ends = size;
        for (int d = 1; d < 32; d *= 2) {
            int other = __shfl_up_sync(ALL, ends, d);
            if (lane >= d) ends += other;
        }
        uint32_t behind = __ballot_sync(ALL, before + ends > target);
        int index = behind ? __ffs(behind) - 1 : 0, of_index = __shfl_sync(ALL, size, index);
        int end_of_index = __shfl_sync(ALL, ends, index);
        if (behind) return {first + index, before + end_of_index - of_index, of_index};
        before += __shfl_sync(ALL, ends, 31);
    }
    return {count, before, 0};
}

// Which program of which kv head this is, of how many.
struct ProgramPlace {
    int kv_head, program, num_programs;
};

// Programs of the first heads, one a lane; 0 where each head has as many.
template <class Args>
__device__ __forceinline__ int first_programs_of(const Args& a, int lane) {
    return a.head_programs && lane < a.num_kv_heads ? a.head_programs[lane] : 0;
}

// Whether heads that keep many keys have more programs than others: not in small steps, in which all keep every key, and
// not where sequences have whole programs, unless second pieces, which often hide behind others, cost less than it wins.
// `even` is the step of a head that has as many programs as heads have on average.
template <class Args>
__device__ __forceinline__ bool is_balanced(const Args& a, const StepTokens& tokens, const Step& even, int first_programs, int lane) {
    if (!a.head_programs || tokens.all_dense) return false;
    if (even.multiple == 1) return true;
    for (int head = 32 + lane; head < a.num_kv_heads; head += 32) first_programs = max(first_programs, a.head_programs[head]);
    for (int m = 16; m; m /= 2) first_programs = max(first_programs, __shfl_xor_sync(ALL, first_programs, m));
    int second = tokens.num_decoded > 1 ? 4 * a.schedule.piece_work / 3 : 0;
    return (long long)even.share * first_programs > (long long)(even.equal + second) * a.schedule.num_programs;
}

template <class Args>
__device__ __forceinline__ ProgramPlace place_of(const Args& a, bool is_balanced, int first_programs, int lane) {
    if (!is_balanced) return {int(blockIdx.x), int(blockIdx.y), a.schedule.num_programs};
    int index = blockIdx.x + gridDim.x * blockIdx.y;
    Found head = find(a.num_kv_heads, index, lane, [&](int kv_head) {
        return kv_head < 32 ? first_programs : a.head_programs[kv_head];
    });
    return {head.index, index - head.before, head.size};
}

// Where a program is in its share.
struct Walk {
    int begin, end;  // of the share
    int seq, work_before;
};

template <class Args>
__device__ __forceinline__ Walk walk_of(const Args& a, const Step& step, int program, int lane) {
    int begin = program * step.share;
    // the first sequence whose work ends behind the beginning of the share
    Found first = find(a.num_seqs, begin, lane, [&](int seq) {
        int len = a.seq_lens[seq];
        return work_of(a.schedule, len, keeps_all(a, seq, len, step.max_dense_len), step.entry, step.multiple);
    });
    return {begin, min(begin + step.share, step.total), first.index, first.before};
}

// The next piece of the share; false behind the last one.
template <class Args>
__device__ __forceinline__ bool next_piece(const Args& a, const Step& step, Walk& walk, PieceTokens& piece) {
    const ScheduleArgs& s = a.schedule;
    while (walk.seq < a.num_seqs && walk.work_before < walk.end) {
        int seq = walk.seq++, seq_len = a.seq_lens[seq];
        bool is_dense = keeps_all(a, seq, seq_len, step.max_dense_len);
        int weight = is_dense ? s.dense_work : 1, num_units = divide_up(seq_len, s.unit);
        int before = walk.work_before + step.entry;
        int first = min(divide_up(max(walk.begin - before, 0), weight), num_units);
        int last = min(divide_up(max(walk.begin + step.share - before, 0), weight), num_units);
        walk.work_before += work_of(s, seq_len, is_dense, step.entry, step.multiple);
        if (first < last) {
            piece = {seq, seq_len, first * s.unit, min(last * s.unit, seq_len), is_dense};
            return true;
        }
    }
    return false;
}

// Survivors stand close together, in the newest tokens for instance. So that pieces have as many of them, each takes its
// units from all over the sequence: the units are dealt out to `SPREAD` parts, and pieces go through the parts in turn.
constexpr uint32_t SPREAD = 63;  // odd, so that no warp has the same parts in every turn

struct Spread {
    uint32_t part_units, longer_parts;  // units of a part, and how many parts have one more

    static __device__ __forceinline__ Spread of(uint32_t num_units) { return {num_units / SPREAD, num_units % SPREAD}; }

    // where number `index` of a sequence's units stands in it
    __device__ __forceinline__ uint32_t unit_of(uint32_t index) const {
        uint32_t turn = index / SPREAD, part = index % SPREAD;
        return part * part_units + min(part, longer_parts) + turn;
    }
};

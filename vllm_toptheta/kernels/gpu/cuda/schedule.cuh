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
    int with_entries = total + step.num_decoded * s.piece_work, equal = divide_up(with_entries, num_programs);
    bool is_worth = num_decoded <= num_programs && rounded < equal + s.piece_work / 2;
    bool is_rounded = tokens.all_dense ? 2 * num_decoded <= num_programs : is_worth;
    step.share = max(is_rounded ? rounded : equal, s.min_work);
    step.multiple = is_rounded ? step.share : 1, step.entry = is_rounded ? 0 : s.piece_work;
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

// Who does what: schedule.py, for kernels of this folder. Whoever joins pieces works the same out there.
//
// All lanes of a warp call `step_of` and `walk_of` together, with `Args` that hold the fields they name.

struct ScheduleArgs {
    int num_programs;  // of a kv head
    int unit;          // tokens
    int min_work, dense_work, piece_work;
};

struct Step {
    int num_tokens, num_decoded;
    int share, multiple;  // work of a program, and what a sequence's is rounded up to
    int total;           // work of all
    int max_dense_len;
};

__device__ __forceinline__ int divide_up(int a, int b) { return (a + b - 1) / b; }

template <class Args>
__device__ __forceinline__ bool keeps_all(const Args& a, int seq, int seq_len, int max_dense_len) {
    return seq_len <= max_dense_len || (a.threshold_offset && a.threshold_offset[seq] < -3.4e38f);
}

__device__ __forceinline__ int work_of(const ScheduleArgs& s, int seq_len, bool is_dense, int multiple) {
    return divide_up(divide_up(seq_len, s.unit) * (is_dense ? s.dense_work : 1), multiple) * multiple;
}

template <class Args>
__device__ __forceinline__ Step step_of(const Args& a, int lane) {
    const ScheduleArgs& s = a.schedule;
    Step step;
    int num_tokens = 0, num_decoded = 0;
    for (int seq = lane; seq < a.num_seqs; seq += 32) num_tokens += a.seq_lens[seq], num_decoded += a.seq_lens[seq] > 0;
    step.num_tokens = __reduce_add_sync(ALL, num_tokens), step.num_decoded = __reduce_add_sync(ALL, num_decoded);
    bool all_dense = step.num_tokens < a.min_step_tokens;
    step.max_dense_len = all_dense ? 0x7fffffff : a.max_dense_len;
    int total = 0, most = 0;
    for (int seq = lane; seq < a.num_seqs; seq += 32) {
        int len = a.seq_lens[seq], work = work_of(s, len, keeps_all(a, seq, len, step.max_dense_len), 1);
        total += work, most = max(most, work);
    }
    total = __reduce_add_sync(ALL, total);
    for (int m = 16; m; m /= 2) most = max(most, __shfl_xor_sync(ALL, most, m));
    num_decoded = max(step.num_decoded, 1);
    int even = divide_up(most, max(s.num_programs / num_decoded, 1));
    int rounded = min(even, divide_up(total, max(s.num_programs - num_decoded, 1)));
    int equal = divide_up(total, s.num_programs);
    bool is_worth = num_decoded <= s.num_programs && rounded < equal + s.piece_work;
    bool is_rounded = all_dense ? 2 * num_decoded <= s.num_programs : is_worth;
    step.share = max(is_rounded ? rounded : equal, s.min_work);
    step.multiple = is_rounded ? step.share : 1;
    step.total = total;
    if (is_rounded) {
        total = 0;
        for (int seq = lane; seq < a.num_seqs; seq += 32) {
            int len = a.seq_lens[seq];
            total += work_of(s, len, keeps_all(a, seq, len, step.max_dense_len), step.multiple);
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

// Where a program is in its share.
struct Walk {
    int begin, end;  // of the share
    int seq, work_before;
};

template <class Args>
__device__ __forceinline__ Walk walk_of(const Args& a, const Step& step, int program, int lane) {
    Walk walk{program * step.share, min((program + 1) * step.share, step.total), a.num_seqs, 0};
    // the first sequence whose work ends behind the beginning of the share
    int before = 0;
    bool found = false;
    for (int first = 0; first < a.num_seqs && !found; first += 32) {
        int one = first + lane, len = one < a.num_seqs ? a.seq_lens[one] : 0;
        bool is_dense = one < a.num_seqs && keeps_all(a, one, len, step.max_dense_len);
        int work = one < a.num_seqs ? work_of(a.schedule, len, is_dense, step.multiple) : 0, ends = work;
        for (int d = 1; d < 32; d *= 2) {
            int other = __shfl_up_sync(ALL, ends, d);
            if (lane >= d) ends += other;
        }
        uint32_t behind = __ballot_sync(ALL, one < a.num_seqs && before + ends > walk.begin);
        int index = behind ? __ffs(behind) - 1 : 0, of_index = __shfl_sync(ALL, ends - work, index);
        if (behind) walk.seq = first + index, walk.work_before = before + of_index, found = true;
        before += __shfl_sync(ALL, ends, 31);
    }
    return walk;
}

// The next piece of the share; false behind the last one.
template <class Args>
__device__ __forceinline__ bool next_piece(const Args& a, const Step& step, Walk& walk, PieceTokens& piece) {
    const ScheduleArgs& s = a.schedule;
    while (walk.seq < a.num_seqs && walk.work_before < walk.end) {
        int seq = walk.seq++, seq_len = a.seq_lens[seq];
        bool is_dense = keeps_all(a, seq, seq_len, step.max_dense_len);
        int weight = is_dense ? s.dense_work : 1, num_units = divide_up(seq_len, s.unit);
        int first = min(divide_up(max(walk.begin - walk.work_before, 0), weight), num_units);
        int last = min(divide_up(max(walk.begin + step.share - walk.work_before, 0), weight), num_units);
        walk.work_before += work_of(s, seq_len, is_dense, step.multiple);
        if (first < last) {
            piece = {seq, seq_len, first * s.unit, min(last * s.unit, seq_len), is_dense};
            return true;
        }
    }
    return false;
}

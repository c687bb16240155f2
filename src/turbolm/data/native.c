/* The loops of the data engine that NumPy needs several passes for. `native.py` compiles this file and calls it. */
#include <stdint.h>
#include <string.h>

/* Slices lie all over the store, so the beginnings of the next ones are fetched early. Measured with slices of 160
 * tokens: 143 microseconds a batch of 64 x 2,048, one slice ahead 168, none 239. */
#define SLICES_AHEAD 4
#define LINES_AHEAD 6
#define LINE_BYTES 64

/* The files of a shard in memory, NULL while they are not open. `index` has two columns; the first says where a document
 * ends, in tokens. */
struct shard {
    const int64_t *index;
    const void *tokens;
    int64_t num_tokens;
};

/* All shards: of the documents of a split, first_document[s] to first_document[s + 1] are in shard s, in the rows of its
 * index from first_row[s] on. */
struct shards {
    const struct shard *shard;
    const int64_t *first_document, *first_row;
    int64_t num_shards;
};

static const struct shard *find(const struct shards *shards, int64_t document, int64_t *row) {
    int64_t s = 0;
    for (int64_t left = shards->num_shards; left > 1; left -= left / 2)
        s += shards->first_document[s + left / 2] <= document ? left / 2 : 0;
    *row = document - shards->first_document[s] + shards->first_row[s];
    return shards->shard + s;
}

static int64_t begin_of(const struct shard *shard, int64_t row) { return row ? shard->index[2 * (row - 1)] : 0; }

/* Writes the positions of documents (a token less than they have) to `lengths`. They exist and their shards are open:
 * the caller sees to it. Returns 0. */
int64_t turbolm_lengths(const struct shards *shards, int64_t num_documents, const int64_t *restrict documents,
                        int64_t *restrict lengths) {
    for (int64_t d = 0; d < num_documents; d++) {
        int64_t row;
        const struct shard *shard = find(shards, documents[d], &row);
        lengths[d] = shard->index[2 * row] - begin_of(shard, row) - 1;
    }
    return 0;
}

/* Fills inputs, positions and targets, [num_slots, seq_len] each. Slot i gets sequence s = indices[i]: the slices
 * offsets[s] to offsets[s + 1] and then padding; or padding only where s < 0. Slice p is length[p] positions from
 * start[p] on of document[p], which exists and whose shard is open. `from` has room for an address for each slice,
 * `ends` for where each slice ends, padding included, when all sequences are laid end to end. Returns how many ends
 * there are, or -1 - p where slice p is not in its shard or has no room in its sequence.
 */
#define DEFINE_FILL(name, token_t)                                                                                   \
    int64_t name(const struct shards *shards, int64_t seq_len, int64_t num_slots, const int64_t *restrict indices,   \
                 const int64_t *restrict offsets, const int64_t *restrict document, const int64_t *restrict start,   \
                 const int64_t *restrict length, const token_t **restrict from, int64_t *restrict inputs,            \
                 int64_t *restrict positions, int64_t *restrict targets, int64_t *restrict ends, int64_t ignored) {  \
        int64_t num_slices = 0, num_ends = 0, at = 0;                                                                \
        for (int64_t i = 0; i < num_slots; i++) {                                                                    \
            const int64_t s = indices[i];                                                                            \
            for (int64_t p = s < 0 ? 0 : offsets[s]; s >= 0 && p < offsets[s + 1]; p++) {                            \
                int64_t row;                                                                                         \
                const struct shard *shard = find(shards, document[p], &row);                                         \
                const int64_t first = begin_of(shard, row), most = shard->num_tokens;                                \
                if (first < 0 || first > most || start[p] < 0 || start[p] > most || length[p] <= 0 ||                \
                    first + start[p] >= most - length[p])                                                            \
                    return -1 - p;                                                                                   \
                from[num_slices++] = (const token_t *)shard->tokens + first + start[p];                              \
            }                                                                                                        \
        }                                                                                                            \
        const token_t **next = from, **const last = from + num_slices - 1;                                           \
        for (int64_t i = 0; i < num_slots; i++) {                                                                    \
            const int64_t s = indices[i], sequence_end = (i + 1) * seq_len;                                          \
            for (int64_t p = s < 0 ? 0 : offsets[s]; s >= 0 && p < offsets[s + 1]; p++) {                            \
                const token_t *restrict tokens = *next;                                                              \
                const int64_t count = length[p];                                                                     \
                if (count > sequence_end - at)                                                                       \
                    return -1 - p;                                                                                   \
                if (last - next >= SLICES_AHEAD)                                                                     \
                    for (int line = 0; line < LINES_AHEAD; line++)                                                   \
                        __builtin_prefetch((const char *)next[SLICES_AHEAD] + LINE_BYTES * line);                    \
                next++;                                                                                              \
                for (int64_t t = 0; t < count; t++) {                                                                \
                    inputs[at + t] = tokens[t];                                                                      \
                    targets[at + t] = tokens[t + 1];                                                                 \
                    positions[at + t] = t;                                                                           \
                }                                                                                                    \
                ends[num_ends++] = at += count;                                                                      \
            }                                                                                                        \
            if (at < sequence_end)                                                                                   \
                ends[num_ends++] = sequence_end;                                                                     \
            for (int64_t t = 0; at < sequence_end; t++, at++) {                                                      \
                inputs[at] = 0;                                                                                      \
                targets[at] = ignored;                                                                               \
                positions[at] = t;                                                                                   \
            }                                                                                                        \
        }                                                                                                            \
        return num_ends;                                                                                             \
    }

DEFINE_FILL(turbolm_fill_u2, uint16_t)
DEFINE_FILL(turbolm_fill_u4, uint32_t)

/* Sequences first, first + 1, ... first + count - 1, which hold `before` slices each; `below` is next on the stack. */
struct run {
    int64_t first, count, before, below;
};

static int64_t first_with_room(const uint64_t *with_room, int64_t room, int64_t most) {
    int64_t word = room / 64;
    uint64_t bits = with_room[word] >> (room % 64) << (room % 64);
    while (!bits && ++word <= most / 64)
        bits = with_room[word];
    return bits ? 64 * word + __builtin_ctzll(bits) : -1;
}

/* Best fit decreasing of counts[i] slices of lengths[i], longest first: see `_best_fit` in packing.py, which does the
 * same. `actions` and `runs` have room for an entry for each slice (an action places one at least; a run has a sequence
 * at least, and no sequence stays empty); `stacks`, all -1, and the bits `with_room`, all 0, for the rooms 0 to seq_len.
 * Returns the number of actions.
 */
int64_t turbolm_best_fit(int64_t seq_len, int64_t num_lengths, const int64_t *lengths, const int64_t *counts,
                         int64_t (*actions)[4], struct run *runs, int64_t *stacks, uint64_t *with_room) {
    int64_t num_actions = 0, next_sequence = 0, num_runs = 0;
    int64_t unused = -1; /* a stack too, of runs to use again */
    for (int64_t i = 0; i < num_lengths; i++) {
        const int64_t length = lengths[i];
        for (int64_t count = counts[i]; count;) {
            int64_t room = first_with_room(with_room, length, seq_len), first = next_sequence, before = 0, available;
            if (room < 0) {
                const int64_t most = seq_len / length;
                room = seq_len;
                available = (count + most - 1) / most;
                next_sequence += available;
            } else {
                const int64_t top = stacks[room];
                first = runs[top].first, available = runs[top].count, before = runs[top].before;
                stacks[room] = runs[top].below;
                if (stacks[room] < 0)
                    with_room[room / 64] ^= UINT64_C(1) << (room % 64);
                runs[top].below = unused;
                unused = top;
            }
            int64_t each = room / length, used = count / each < available ? count / each : available;
            if (!used) /* fewer slices left than one sequence takes */
                each = count, used = 1;
            int64_t *action = actions[num_actions++];
            action[0] = first, action[1] = used, action[2] = each, action[3] = before;
            count -= used * each;
            const int64_t rooms[2] = {room, room - each * length};
            const struct run rest[2] = {{first + used, available - used, before, 0}, {first, used, before + each, 0}};
            for (int r = 0; r < 2; r++) {
                if (!rooms[r] || !rest[r].count)
                    continue;
                const int64_t at = unused < 0 ? num_runs++ : unused;
                if (at == unused)
                    unused = runs[at].below;
                runs[at] = rest[r];
                runs[at].below = stacks[rooms[r]];
                stacks[rooms[r]] = at;
                with_room[rooms[r] / 64] |= UINT64_C(1) << (rooms[r] % 64);
            }
        }
    }
    return num_actions;
}

/* Stable argsort of random numbers: their first `bits` bits put nearly all of them where they belong. `starts` counts
 * them, is all 0 and has room for 2^bits + 1. Returns 0. */
int64_t turbolm_argsort_random(int64_t count, int64_t bits, const uint64_t *restrict numbers,
                               int64_t *restrict starts, int64_t *restrict order) {
    const int64_t shift = 64 - bits;
    for (int64_t i = 0; i < count; i++)
        starts[(numbers[i] >> shift) + 1]++;
    for (int64_t b = 0; b < INT64_C(1) << bits; b++)
        starts[b + 1] += starts[b];
    for (int64_t i = 0; i < count; i++)
        order[starts[numbers[i] >> shift]++] = i;
    for (int64_t i = 1; i < count; i++) {
        const int64_t here = order[i];
        int64_t place = i;
        for (; place && numbers[order[place - 1]] > numbers[here]; place--)
            order[place] = order[place - 1];
        order[place] = here;
    }
    return 0;
}

#define DIGEST_BYTES 12

/* Places a digest in a table with linear probing, in which 0 is an empty slot. Returns whether it was not there. */
static int place(uint8_t *table, int64_t num_slots, const uint8_t *digest) {
    static const uint8_t empty[DIGEST_BYTES];
    uint64_t hash;
    memcpy(&hash, digest, sizeof hash);
    for (uint64_t at = hash % (uint64_t)num_slots;; at = at + 1 == (uint64_t)num_slots ? 0 : at + 1) {
        uint8_t *slot = table + at * DIGEST_BYTES;
        if (!memcmp(slot, digest, DIGEST_BYTES))
            return 0;
        if (!memcmp(slot, empty, DIGEST_BYTES)) {
            memcpy(slot, digest, DIGEST_BYTES);
            return 1;
        }
    }
}

/* Adds digests, each `stride` bytes after the one before, to the table that their last byte chooses, and writes whether
 * each was new. Returns how many it has added: fewer than `count` if the next one's table would be more than 3/4 full. */
int64_t turbolm_add_digests(int64_t num_tables, uint8_t *const *tables, const int64_t *restrict num_slots,
                            int64_t *restrict num_used, int64_t count, int64_t stride, const uint8_t *restrict digests,
                            uint8_t *restrict is_new) {
    for (int64_t i = 0; i < count; i++) {
        const uint8_t *digest = digests + i * stride;
        const int64_t t = digest[DIGEST_BYTES - 1] % num_tables;
        if (4 * (num_used[t] + 1) > 3 * num_slots[t])
            return i;
        is_new[i] = (uint8_t)place(tables[t], num_slots[t], digest);
        num_used[t] += is_new[i];
    }
    return count;
}

/* Copies the digests of a table to a larger one, which is empty. Returns 0. */
int64_t turbolm_grow_digests(int64_t num_slots, const uint8_t *restrict table, int64_t num_larger, uint8_t *larger) {
    static const uint8_t empty[DIGEST_BYTES];
    for (int64_t i = 0; i < num_slots; i++)
        if (memcmp(table + i * DIGEST_BYTES, empty, DIGEST_BYTES))
            place(larger, num_larger, table + i * DIGEST_BYTES);
    return 0;
}

/*
 * A kernel in a bad mood, and the same mood again from the same seed.
 *
 * Why it exists: short sends, missing buffers, receives that end without saying so, a full completion queue and interrupted
 * enters meet each other in production, once a month. Promise: each fault is one that the kernel itself produces or is free to
 * produce: requests are altered before it sees them, completions of different descriptors change places, and no result of a
 * request is invented. All choices come from one generator, so that a seed names a run.
 */
#ifndef FAULTS_H
#define FAULTS_H

#include "fake_kernel.h"

static uint64_t seed_state;

static inline uint32_t random_below(uint32_t end) {
    seed_state ^= seed_state << 13;
    seed_state ^= seed_state >> 7;
    seed_state ^= seed_state << 17;
    return (uint32_t)(seed_state >> 33) % end;
}

static inline bool chance(uint32_t percent) { return random_below(100) < percent; }

static struct {
    ul_fdmon *mon;
    uint32_t rate;   /* percent, of each fault */
    uint32_t cq, sq; /* queue sizes, or 0 */
    int errors_in_a_row;
    long denied;         /* every enter answers this */
    uint32_t edited;     /* submission entries before this one were altered, or spared */
    const ul_ring *ring; /* to which that applies */
    int counts[9];
} faults;

enum { LOST_MORE, NO_BUFFERS, WOULD_BLOCK, SHORT_SEND, FEW_TAKEN, ENTER_ERROR, REORDERED, OVERFLOWED, DENIED };

static inline bool strikes(int fault) {
    bool does = chance(faults.rate);
    faults.counts[fault] += does;
    return does;
}

static inline void alter_receive(struct ul_sqe *sqe) {
    if (strikes(LOST_MORE))
        sqe->ioprio &= (uint16_t)~UL_RECV_MULTISHOT;
    else if (strikes(NO_BUFFERS))
        sqe->buf_index = 7; /* a group that has none */
    else if (strikes(WOULD_BLOCK))
        sqe->op_flags |= MSG_DONTWAIT;
}

static inline void alter_send(struct ul_sqe *sqe) {
    if (strikes(WOULD_BLOCK))
        sqe->op_flags |= MSG_DONTWAIT;
    if (!strikes(SHORT_SEND))
        return;
    if (sqe->opcode == UL_OP_SEND) {
        sqe->len = sqe->len > 1 ? 1 + random_below(sqe->len) : sqe->len;
    } else {
        struct msghdr *message = (struct msghdr *)(uintptr_t)sqe->addr;
        message->msg_iovlen = 1 + random_below((uint32_t)message->msg_iovlen);
    }
}

static inline void alter_requests(const ul_ring *ring) {
    if (faults.ring != ring) {
        faults.ring = ring;
        faults.edited = *ring->sq_head;
    }
    for (; faults.edited != ring->sq_tail; faults.edited++) {
        struct ul_sqe *sqe = &ring->sqes[faults.edited & ring->sq_mask];
        if (sqe->opcode == UL_OP_RECV)
            alter_receive(sqe);
        else if (sqe->opcode == UL_OP_SEND || sqe->opcode == UL_OP_SENDMSG)
            alter_send(sqe);
    }
}

static inline int fd_of(const struct ul_cqe *cqe) {
    uint32_t id = (uint32_t)cqe->user_data;
    return id && id <= faults.mon->requests_cap ? faults.mon->requests[id - 1].fd : -1;
}

static inline void reorder_completions(const ul_ring *ring) {
    uint32_t first = *ring->cq_head, count = *ring->cq_ktail - first;
    for (uint32_t i = 0; count > 1 && i < 2 * count; i++) {
        uint32_t k = first + random_below(count - 1);
        struct ul_cqe *a = &ring->cqes[k & ring->cq_mask], *b = &ring->cqes[(k + 1) & ring->cq_mask];
        if (fd_of(a) != fd_of(b)) {
            struct ul_cqe swap = *a;
            *a = *b;
            *b = swap;
        }
    }
}

static long enter_in_a_bad_mood(const struct enter_call *call) {
    static const int passing[] = {EINTR, EAGAIN, EBUSY};
    struct enter_call altered = *call;
    const ul_ring *ring = faults.mon ? faults.mon->ring : NULL;
    if (!ring) /* its self-test */
        return real_enter(call);
    if (faults.denied)
        return faults.denied;
    if (faults.errors_in_a_row < 8 && strikes(ENTER_ERROR)) {
        faults.errors_in_a_row++;
        return -passing[random_below(3)];
    }
    faults.errors_in_a_row = 0;
    alter_requests(ring);
    if (altered.to_submit > 1 && strikes(FEW_TAKEN)) {
        altered.to_submit = (long)random_below((uint32_t)altered.to_submit);
        altered.min_complete = 0; /* the kernel does not wait after a short submission */
    }
    long ret = real_enter(&altered);
    faults.counts[OVERFLOWED] += ul_ring_overflowed(ring);
    if (strikes(REORDERED))
        reorder_completions(ring);
    return ret;
}

static long setup_with_small_queues(unsigned entries, struct ul_params *params) {
    if (faults.cq)
        params->cq_entries = faults.cq;
    return real_setup(faults.sq ? faults.sq : entries, params);
}

/* The mood of this seed, from the next set-up on. */
static inline void begin_faults(uint64_t seed) {
    int counts[9];
    memcpy(counts, faults.counts, sizeof counts);
    memset(&faults, 0, sizeof faults);
    memcpy(faults.counts, counts, sizeof counts);
    seed_state = seed * 0x9e3779b97f4a7c15ULL + 1;
    for (int i = 0; i < 8; i++)
        random_below(1);
    faults.rate = 1 + random_below(25);
    faults.cq = chance(50) ? 8U << random_below(4) : 0;
    faults.sq = chance(50) ? 2U << random_below(3) : 0;
    if (faults.cq && !faults.sq)
        faults.sq = 8; /* the completion queue may not be the shorter one */
    on_setup = setup_with_small_queues;
    on_enter = enter_in_a_bad_mood;
}

static inline void end_faults(void) { faults.rate = 0; }

#endif

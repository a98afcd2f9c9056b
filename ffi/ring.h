/*
 * One io_uring: set-up, submission, completion.
 *
 * Why it exists: the fd monitor needs a dozen lines of liburing, in a form that falls back on any refusal and that two
 * extension modules can link. Promise: only this file pair maps ring memory, and only the thread that owns the ring calls the
 * functions that touch it (SINGLE_ISSUER makes the kernel refuse the others with -EEXIST).
 *
 * Errors are returned as -errno; nothing here keeps state outside the ul_ring.
 */
#ifndef UL_RING_H
#define UL_RING_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/socket.h>
#include <sys/types.h>

#include "uring_abi.h"

enum { UL_BUFFERS_MAX = 1024 }; /* a power of two; with its places, 16 KiB of locked memory */

typedef struct ul_ring_counts {
    uint64_t enters;    /* io_uring_enter system calls */
    uint64_t sqes;      /* submission entries the kernel took */
    uint64_t cqes;      /* completion entries read */
    uint64_t overflows; /* times the kernel said that its completion queue had run over */
} ul_ring_counts;

typedef struct ul_ring {
    int fd;               /* -1 when the number is not ours any more */
    pid_t pid;            /* the process that mapped it: MADV_DONTFORK keeps the mapping out of its children */
    uint32_t setup_flags; /* the ladder step that worked */
    uint32_t features;
    uint32_t sq_entries, cq_entries;
    uint32_t enter_flags;

    uint32_t *sq_head, *sq_ktail, *sq_flags;
    uint32_t sq_mask, sq_tail; /* sq_tail runs ahead of *sq_ktail until the next enter publishes it */
    struct ul_sqe *sqes;

    uint32_t *cq_head, *cq_ktail;
    uint32_t cq_mask;
    struct ul_cqe *cqes;

    void *rings_map, *sqes_map;
    size_t rings_size_bytes, sqes_size_bytes;

    struct ul_buffer_place *buffer_ring; /* NULL: none is registered */
    uint16_t buffer_ring_tail;
    bool has_eventfd;
    ul_ring_counts *counts; /* of the present user; never NULL while the ring is in use */
} ul_ring;

/* Makes a ring and proves that it works. Tries the flags of kernel 6.6, then those of 6.1; -EINVAL after that means an older
 * kernel. Returns 0, or -errno with *step naming the refused step ("io_uring_setup", "io_uring features", "mmap of the
 * io_uring", "io_uring self-test"). */
int ul_ring_open(ul_ring *ring, uint32_t sq_entries, uint32_t cq_entries, ul_ring_counts *counts, const char **step);

/* Unmaps and closes; in a forked child it only closes. Any thread may call it once no other thread is inside ul_ring_enter.
 * The kernel cancels what is in flight and lets go of its files within milliseconds, since the mapping and the descriptor are
 * the ring's only references. */
void ul_ring_close(ul_ring *ring);

/* A zeroed entry to fill, or NULL when the queue is full (then ul_ring_enter makes room). */
struct ul_sqe *ul_ring_get_sqe(ul_ring *ring);

/* Entries queued and not yet taken by the kernel. */
uint32_t ul_ring_unsubmitted(const ul_ring *ring);

/* Submits what is queued and waits for min_complete completions, at most timeout_ns (negative: no limit). min_complete 0
 * returns at once but still runs deferred work. Returns the number of entries taken or -errno. A signal may hide behind a
 * positive result, so the caller must look at the clock and the queue, not at -EINTR. */
int ul_ring_enter(ul_ring *ring, uint32_t min_complete, int64_t timeout_ns);

/* True when an enter could bring completions or some are there already. Reads shared memory only. */
bool ul_ring_has_work(const ul_ring *ring);
bool ul_ring_overflowed(const ul_ring *ring);

/* The oldest completion or NULL; ul_ring_seen() gives its place back. */
const struct ul_cqe *ul_ring_peek(const ul_ring *ring);
void ul_ring_seen(ul_ring *ring);

/* The eventfd that the kernel signals at each completion, deferred ones too; -1 takes it away. */
int ul_ring_set_eventfd(ul_ring *ring, int eventfd);

/* Gives the kernel an empty ring of buffers to choose from, and takes it away again once no receive is in flight. */
int ul_ring_register_buffers(ul_ring *ring);
int ul_ring_unregister_buffers(ul_ring *ring);
/* One buffer for the kernel to fill; at most UL_BUFFERS_MAX at a time. Writes shared memory only. */
void ul_ring_give_buffer(ul_ring *ring, void *buffer, uint32_t size_bytes, uint16_t number);

/* Fills in a poll, one-shot or multishot. poll_events are poll(2) bits. */
void ul_prep_poll_add(struct ul_sqe *sqe, int fd, uint32_t poll_events, bool multishot, uint64_t user_data);
/* Fills in a multishot receive into the ring's buffers. */
void ul_prep_receive(struct ul_sqe *sqe, int fd, uint64_t user_data);
/* Fills in a send: no signal, and no waiting for all of it, so that one which has not ended has sent nothing. */
void ul_prep_send(struct ul_sqe *sqe, int fd, const struct msghdr *message, uint64_t user_data);
/* Fills in a timeout at a CLOCK_MONOTONIC time, or the change of one to another time. *when is read when the kernel takes it.
 * The completion of the change carries user_data 0. */
void ul_prep_timeout(struct ul_sqe *sqe, const struct ul_timespec *when, uint64_t user_data);
void ul_prep_timeout_update(struct ul_sqe *sqe, const struct ul_timespec *when, uint64_t target_user_data);
/* Fills in the cancellation of a request. Its own completion carries user_data 0. */
void ul_prep_cancel(struct ul_sqe *sqe, uint64_t target_user_data);

#endif

/*
 * Waiting on io_uring: one-shot POLL_ADD, re-armed lazily; its removal; changes and wait in one enter.
 *
 * Why it exists: QEMU's fdmon-io_uring idea for asyncio. Promise: a turn costs one io_uring_enter however many watches
 * changed, and none at all when nothing can have happened.
 *
 * Words: sqe/cqe, submission and completion queue entry; request, what the kernel has to do and has not ended; armed, a watch
 * with a request. Receives and sends are in stream_io_uring.c.
 *
 * Some facts about polling through io_uring, and what they mean here:
 *
 * - Multishot poll reports edges only, and its LEVEL flag is refused. asyncio promises levels, so polls are one-shot. A fired
 *   one is queued again at once but submitted with the next wait, after the callbacks ran: re-arming on a descriptor that is
 *   still ready completes immediately, which is the level. Tests:
 *   test_a_reader_that_takes_one_byte_is_reported_for_every_byte.
 * - A pending poll holds the open file, not the number. After close() the peer would see no end of file and a listening socket
 *   would go on accepting. So removing an armed watch enters at once and returns when the poll's own cqe is there. A watch
 *   that has just fired is not armed: closing a connection from its own callback costs nothing. A receive is always armed. Tests:
 *   test_peer_sees_end_of_file_after_remove_reader_and_close.
 * - The poll outlives the number, so user_data is {generation, index} and never the fd. A request is free only after its cqe.
 * - POLLRDHUP completes every poll, asked for or not. To a writer whose peer has ended its side that is a poll that fires for
 *   ever with nothing to report. Such a watch is armed multishot, which fires on edges only, until something that was asked
 *   for comes. Test: test_waiting_to_write_to_a_peer_that_has_half_closed_costs_no_cpu.
 * - POLL_REMOVE answers -EALREADY to a poll that has been woken and not looked at yet; if the wake-up brings nothing, that
 *   poll lives on and holds its file. ASYNC_CANCEL marks it, so that it ends in any case: QEMU's verb is carried out by that
 *   request. Test: test_a_wake_up_without_readiness_does_not_keep_a_removed_watch_in_the_kernel.
 * - A poll whose submitting thread has exited ends with -ECANCELED; the watch is simply armed again.
 * - A closed descriptor answers -EBADF at once and for ever: such a watch is reported once and parked.
 * - The ring obeys one thread. A turn in another thread (-EEXIST) builds a new ring there and arms everything again. What the
 *   old one has completed is read first, which needs no call; what it has not completed has consumed nothing.
 * - Dropping the ring (munmap, close) needs no enter, hence no owner: the way out for every call from a wrong thread.
 */
#define _GNU_SOURCE
#include "fdmon_io_uring.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum {
    SQ_ENTRIES = 256, /* with the completion queue about 84 KiB of locked memory */
    CQ_ENTRIES = 4096,
    REQUESTS_MIN = 64,
    TRANSIENT_ERRORS_MAX = 16,
    REAP_ROUNDS_MAX = 1000,
    UL_HANGUP = 128, /* of a request's events, beside UL_WRITE: the end of the stream, which the receive may miss */
};

static int grow_requests(ul_fdmon *mon) {
    uint32_t cap = mon->requests_cap ? 2 * mon->requests_cap : REQUESTS_MIN;
    ul_request *requests = realloc(mon->requests, cap * sizeof *requests);
    if (!requests)
        return -ENOMEM;
    for (uint32_t i = mon->requests_cap; i < cap; i++) {
        requests[i] = (ul_request){.next_free = mon->requests_free};
        mon->requests_free = i + 1;
    }
    mon->requests = requests;
    mon->requests_cap = cap;
    return 0;
}

uint64_t ul_request_user_data(const ul_fdmon *mon, uint32_t id) {
    return (uint64_t)mon->requests[id - 1].generation << 32 | id;
}

static void free_request(ul_fdmon *mon, uint32_t id) {
    ul_request *request = &mon->requests[id - 1];
    mon->requests_dying -= request->state == UL_DYING;
    request->state = UL_FREE;
    request->generation++;
    request->next_free = mon->requests_free;
    mon->requests_free = id;
    mon->requests_in_flight--;
}

static void doom_request(ul_fdmon *mon, uint32_t id) {
    mon->requests_dying += mon->requests[id - 1].state == UL_ARMED;
    mon->requests[id - 1].state = UL_DYING;
}

static void forget_requests(ul_fdmon *mon) {
    for (uint32_t id = 1; id <= mon->requests_cap; id++) {
        const ul_request request = mon->requests[id - 1];
        if (request.state == UL_FREE)
            continue;
        free_request(mon, id);
        if (request.kind == UL_SENDS)
            ul_stream_sent(mon, request.fd, -ECANCELED);
    }
    for (size_t fd = 0; fd < mon->watches_cap; fd++)
        mon->watches[fd].request = mon->watches[fd].receive = 0;
    mon->timeout = 0;
    mon->armed_ns = UL_NEVER;
}

void ul_want_armed(ul_fdmon *mon, int fd) {
    ul_watch *watch = &mon->watches[fd];
    if (watch->on_pending)
        return;
    watch->on_pending = true;
    ul_queue_put(&mon->pending, (ul_item){.fd = fd});
}

static void want_all_armed(ul_fdmon *mon) {
    for (size_t fd = 0; fd < mon->watches_cap; fd++)
        if (mon->watches[fd].events)
            ul_want_armed(mon, (int)fd);
}

static void read_queue(ul_fdmon *mon);

static void drop_ring(ul_fdmon *mon) {
    if (!mon->ring)
        return;
    if (mon->ring->pid == getpid()) /* else its memory stayed with the parent, and so does what it has brought */
        read_queue(mon);
    ul_ring_free(mon->ring);
    mon->ring = NULL;
    mon->uncancelled = false;
    forget_requests(mon);
}

void ul_ring_free(ul_ring *ring) {
    if (ring)
        ul_ring_close(ring);
    free(ring);
}

void ul_fdmon_io_uring_after_fork(ul_fdmon *mon) {
    if (!mon->ring)
        return;
    drop_ring(mon);
    want_all_armed(mon);
}

static int open_ring(ul_fdmon *mon, ul_ring *spare) {
    int ret = 0;
    ul_ring *ring = spare;
    if (ring) {
        ring->counts = &mon->counts;
        ret = ul_ring_enter(ring, 0, 0);
    }
    if (ret < 0) { /* io_uring was taken away between two loops; the set-up will say so */
        ul_ring_free(ring);
        ring = NULL;
    }
    if (!ring) {
        const char *step = "malloc";
        ring = calloc(1, sizeof *ring);
        ret = ring ? ul_ring_open(ring, SQ_ENTRIES, CQ_ENTRIES, &mon->counts, &step) : -ENOMEM;
        if (ret < 0) {
            mon->step = step;
            free(ring);
            return ret;
        }
    }
    mon->ring = ring;
    mon->step = "io_uring_enter";
    mon->ring_owner = pthread_self();
    mon->info.ring_setup_flags = ring->setup_flags;
    mon->info.ring_features = ring->features;
    mon->info.sq_entries = ring->sq_entries;
    mon->info.cq_entries = ring->cq_entries;
    mon->errors_in_a_row = 0;
    want_all_armed(mon);
    return 0;
}

/* UL_ONCE: the kernel must hold the file no more when this is reported. A one-shot poll has ended; a multishot one is ended
 * before the turn does. Test: a_last_report_on_a_half_closed_peer_leaves_no_poll_behind. */
static void leave_to_report(ul_fdmon *mon, ul_watch *watch) {
    if (!watch->request)
        return;
    doom_request(mon, watch->request);
    watch->request = 0;
    mon->uncancelled = true;
}

/* What is polled for, with UL_HANGUP beside a receive. A poll for reading waits for the end of a receive that is to end: that
 * may have been woken and still take what the poll would find. Test: a_poll_for_reading_waits_until_the_receive_has_ended. */
static uint32_t events_to_poll(const ul_fdmon *mon, const ul_watch *watch) {
    uint32_t events = ul_wants_poll(mon, watch) ? ul_polled_events(mon, watch) : 0;
    if (!watch->receive)
        return events;
    return events & UL_READ ? 0 : events | UL_HANGUP;
}

static void polled(ul_fdmon *mon, int fd, uint8_t polled_for, const struct ul_cqe *cqe) {
    ul_watch *watch = &mon->watches[fd];
    bool passing = cqe->res == -ECANCELED || cqe->res == -ENOMEM || cqe->res == -EAGAIN || cqe->res == -EINTR;
    if (cqe->res < 0 && !passing) {
        if (polled_for != UL_HANGUP) /* else the receive has the same error */
            ul_fdmon_park(mon, fd);
        return;
    }
    bool asked_for = cqe->res > 0 && ul_fdmon_collect(mon, fd, (uint32_t)cqe->res);
    bool hung_up = cqe->res > 0 && polled_for & UL_HANGUP && cqe->res & (POLLRDHUP | POLLHUP | POLLERR);
    if (hung_up)
        watch->no_receive |= !watch->ended;
    else if (cqe->res > 0 && polled_for == ul_polled_events(mon, watch))
        watch->edge = !asked_for;
    if (asked_for && watch->events & UL_ONCE)
        leave_to_report(mon, watch);
    else if (asked_for || hung_up || !(cqe->flags & UL_CQE_F_MORE))
        ul_want_armed(mon, fd);
}

/* The host was woken by the completion itself. */
static void timeout_ended(ul_fdmon *mon, int32_t result) {
    bool passing = result == -ECANCELED || result == -ENOMEM || result == -EAGAIN || result == -EINTR;
    if (result == -ETIME && mon->wake_ns <= mon->armed_ns)
        mon->wake_ns = UL_NEVER;
    else if (result != -ETIME && !passing)
        mon->timeout_refused = result < 0 ? result : -EIO;
    mon->timeout = 0;
    mon->armed_ns = UL_NEVER;
}

static void complete(ul_fdmon *mon, const struct ul_cqe *cqe) {
    uint32_t id = (uint32_t)cqe->user_data;
    if (id == 0 || id > mon->requests_cap || ul_request_user_data(mon, id) != cqe->user_data)
        return; /* the answer to a cancellation */
    const ul_request request = mon->requests[id - 1];
    if (request.kind == UL_TIMEOUTS) {
        free_request(mon, id);
        timeout_ended(mon, cqe->res);
        return;
    }
    if (!(cqe->flags & UL_CQE_F_MORE)) {
        ul_watch *watch = &mon->watches[request.fd];
        free_request(mon, id);
        watch->request = watch->request == id ? 0 : watch->request;
        watch->receive = watch->receive == id ? 0 : watch->receive;
    }
    if (request.kind == UL_RECEIVES)
        ul_stream_received(mon, &request, cqe);
    else if (request.kind == UL_SENDS)
        ul_stream_sent(mon, request.fd, cqe->res);
    else if (request.state == UL_ARMED)
        polled(mon, request.fd, request.events, cqe);
}

/* What an enter's error means. Returns 0 when the caller may look at the queue and go on, else the error. */
static int judge(ul_fdmon *mon, int ret) {
    if (ret >= 0 || ret == -EINTR || ret == -ETIME) {
        mon->errors_in_a_row = 0;
        return 0;
    }
    /* No memory for a request, or (old kernels) completions first: passing states, unless they stay. */
    if ((ret == -EAGAIN || ret == -EBUSY || ret == -ENOMEM) && ++mon->errors_in_a_row <= TRANSIENT_ERRORS_MAX)
        return 0;
    return ret;
}

static void read_queue(ul_fdmon *mon) {
    const struct ul_cqe *cqe;
    while ((cqe = ul_ring_peek(mon->ring))) {
        complete(mon, cqe);
        ul_ring_seen(mon->ring);
    }
}

/* Reads the queue, and what the kernel had to keep back because the queue was full. */
static int drain(ul_fdmon *mon) {
    int err = 0;
    read_queue(mon);
    for (int i = 0; err == 0 && i < REAP_ROUNDS_MAX && ul_ring_overflowed(mon->ring); i++) {
        __atomic_add_fetch(&mon->counts.overflows, 1, __ATOMIC_RELAXED);
        err = judge(mon, ul_ring_enter(mon->ring, 0, 0));
        read_queue(mon);
    }
    return err;
}

/* An enter that does not wait: flushes the queue, runs deferred work, reads what is there. */
static int enter_and_drain(ul_fdmon *mon) {
    int err = judge(mon, ul_ring_enter(mon->ring, 0, 0));
    if (err == 0)
        err = drain(mon);
    return err;
}

static struct ul_sqe *get_sqe(ul_fdmon *mon, int *err) {
    struct ul_sqe *sqe = ul_ring_get_sqe(mon->ring);
    for (int i = 0; !sqe && i < REAP_ROUNDS_MAX; i++) {
        *err = enter_and_drain(mon);
        if (*err < 0)
            return NULL;
        sqe = ul_ring_get_sqe(mon->ring);
    }
    if (!sqe)
        *err = -EBUSY;
    return sqe;
}

static int cancel(ul_fdmon *mon, uint32_t id) {
    int err = 0;
    struct ul_sqe *sqe = get_sqe(mon, &err);
    if (!sqe)
        return err;
    if (mon->requests[id - 1].state == UL_DYING) /* else it completed while we made room, and this entry does nothing */
        ul_prep_cancel(sqe, ul_request_user_data(mon, id));
    return 0;
}

static int cancel_dying(ul_fdmon *mon) {
    int err = 0;
    for (uint32_t id = 1; err == 0 && id <= mon->requests_cap; id++)
        if (mon->requests[id - 1].state == UL_DYING)
            err = cancel(mon, id);
    return err;
}

struct ul_sqe *ul_request_new(ul_fdmon *mon, int fd, uint32_t *id, int *err) {
    *err = 0;
    if (!mon->requests_free) /* cancelled ones have not ended yet */
        *err = enter_and_drain(mon);
    if (*err == 0 && !mon->requests_free)
        *err = -EBUSY;
    struct ul_sqe *sqe = *err == 0 ? get_sqe(mon, err) : NULL;
    if (!sqe)
        return NULL;
    *id = mon->requests_free;
    ul_request *request = &mon->requests[*id - 1];
    mon->requests_free = request->next_free;
    mon->requests_in_flight++;
    *request = (ul_request){.fd = fd, .generation = request->generation, .state = UL_ARMED};
    return sqe;
}

int ul_request_cancel(ul_fdmon *mon, uint32_t id) {
    doom_request(mon, id);
    return cancel(mon, id);
}

static bool is_as_wanted(const ul_watch *watch, uint8_t events, const ul_request *request) {
    return request->state == UL_ARMED && request->events == events && request->multishot == watch->edge;
}

/* Gives the kernel what one pending watch needs: nothing, a poll, the end of the old poll, or one in exchange for the other. */
static int arm_poll(ul_fdmon *mon, int fd) {
    int err = 0;
    ul_watch *watch = &mon->watches[fd];
    uint32_t old = watch->request, id;
    uint8_t events = (uint8_t)events_to_poll(mon, watch);
    if (old && events && is_as_wanted(watch, events, &mon->requests[old - 1]))
        return 0;
    if (old) {
        watch->request = 0;
        if ((err = ul_request_cancel(mon, old)) < 0)
            return err;
    }
    struct ul_sqe *sqe = events ? ul_request_new(mon, fd, &id, &err) : NULL;
    if (!sqe)
        return err;
    mon->requests[id - 1].events = events;
    mon->requests[id - 1].multishot = watch->edge;
    watch->request = id;
    ul_prep_poll_add(sqe, fd, ul_poll_mask(events) | (events & UL_HANGUP ? POLLRDHUP : 0), watch->edge,
                     ul_request_user_data(mon, id));
    return 0;
}

static int arm(ul_fdmon *mon, int fd) {
    const ul_watch *watch = &mon->watches[fd];
    int err = watch->events & UL_RECV || watch->receive ? ul_stream_arm(mon, fd) : 0;
    if (err == 0)
        err = arm_poll(mon, fd);
    return err == 0 && watch->send ? ul_stream_arm_send(mon, fd) : err;
}

static int arm_pending(ul_fdmon *mon) {
    /* Counted first: making room in the queue may collect completions, whose watches want to be armed again after the
     * callbacks, not now. */
    for (uint32_t n = mon->pending.count; n > 0; n--) {
        int fd = ul_queue_pop(&mon->pending).fd;
        mon->watches[fd].on_pending = false;
        int err = arm(mon, fd);
        if (err < 0) {
            ul_want_armed(mon, fd);
            return err;
        }
    }
    return 0;
}

static bool wants_timeout(const ul_fdmon *mon) { return mon->wake_ns < mon->armed_ns; }

/* When the host is to be woken. An earlier time stays: it costs one wake-up, and timers are moved all the time. The change comes
 * too late for a timeout that has just fired: then that one's completion wakes the host. */
static int arm_timeout(ul_fdmon *mon) {
    int err = mon->timeout_refused;
    uint32_t id;
    if (err < 0) {
        mon->step = "timeout of the io_uring";
        return err;
    }
    struct ul_sqe *sqe = mon->timeout ? get_sqe(mon, &err) : NULL;
    if (err < 0)
        return err;
    mon->timeout_at = (struct ul_timespec){mon->wake_ns / 1000000000, mon->wake_ns % 1000000000};
    if (mon->timeout) { /* else it fired while we made room: that entry, if there is one, does nothing */
        ul_prep_timeout_update(sqe, &mon->timeout_at, ul_request_user_data(mon, mon->timeout));
    } else {
        if (!(sqe = ul_request_new(mon, -1, &id, &err)))
            return err;
        mon->requests[id - 1].kind = UL_TIMEOUTS;
        mon->timeout = id;
        ul_prep_timeout(sqe, &mon->timeout_at, ul_request_user_data(mon, id));
    }
    mon->armed_ns = mon->wake_ns;
    return 0;
}

static bool is_owner(const ul_fdmon *mon) { return mon->ring && pthread_equal(mon->ring_owner, pthread_self()); }

/* In a forked child, a library's at-fork handler may come here before ours has dropped the ring. */
static bool may_enter(const ul_fdmon *mon) { return is_owner(mon) && mon->ring->pid == getpid(); }

static void drop_and_rearm(ul_fdmon *mon) {
    drop_ring(mon);
    want_all_armed(mon);
}

/* Returns when the cqe of every cancelled request is there: only then has the kernel let go of their files. */
static int reap_dying(ul_fdmon *mon) {
    int err = 0;
    for (int i = 0; err == 0 && mon->requests_dying; i++) {
        if (mon->uncancelled) {
            mon->uncancelled = false;
            err = cancel_dying(mon);
        }
        if (err == 0)
            err = i < REAP_ROUNDS_MAX ? enter_and_drain(mon) : -EBUSY;
    }
    return err;
}

void ul_requests_end(ul_fdmon *mon, const uint32_t *ids, int count) {
    for (int i = 0; i < count; i++)
        if (ids[i])
            doom_request(mon, ids[i]);
    if (may_enter(mon)) {
        int err = 0;
        for (int i = 0; i < count && err == 0; i++)
            err = ids[i] ? cancel(mon, ids[i]) : 0;
        if (err < 0 || reap_dying(mon) < 0)
            drop_and_rearm(mon);
    } else if (mon->waiting) {
        mon->uncancelled = true; /* the owner is in the kernel with the ring: it sees to this when its wait ends */
    } else {
        drop_and_rearm(mon);
    }
}

/* Ends what the kernel has to do for a watch: its receive and, unless that stays, its poll. */
static void disarm(ul_fdmon *mon, int fd, bool poll_stays) {
    const uint32_t ids[] = {mon->watches[fd].receive, poll_stays ? 0 : mon->watches[fd].request};
    if (ids[0] || ids[1])
        ul_requests_end(mon, ids, 2);
}

/* Three for each watch, the old and the new poll while a mask changes, and a receive; one for each send, and the host's timeout:
 * a turn allocates nothing. */
int ul_requests_reserve(ul_fdmon *mon, size_t watches, size_t sends) {
    int err = 0;
    while (err == 0 && mon->requests_cap < 3 * watches + sends + 1)
        err = grow_requests(mon);
    return err;
}

static int io_uring_update(ul_fdmon *mon, int fd, uint32_t old_events) {
    (void)old_events;
    if (!mon->watches[fd].events) {
        disarm(mon, fd, false);
        return 0;
    }
    int err = ul_fd_pollable(fd);
    if (err == 0)
        err = ul_requests_reserve(mon, mon->watches_live + 1, mon->sends_made);
    if (err < 0)
        return err;
    if (!(mon->watches[fd].events & UL_RECV))
        disarm(mon, fd, true); /* now, so that what it has brought comes before what the caller reads himself */
    ul_want_armed(mon, fd);
    return 0;
}

/* What must be so before this thread may enter: a ring of its own, the host's eventfd, its time, every change in the queue. */
static int prepare(ul_fdmon *mon) {
    int err = 0;
    if (!is_owner(mon)) {
        drop_ring(mon);
        err = open_ring(mon, NULL);
    }
    if (err == 0 && mon->eventfd >= 0 && !mon->ring->has_eventfd) {
        mon->step = "io_uring_register";
        err = ul_ring_set_eventfd(mon->ring, mon->eventfd);
    }
    if (err < 0)
        return err;
    mon->step = "io_uring_enter";
    if (wants_timeout(mon))
        err = arm_timeout(mon);
    return err < 0 ? err : arm_pending(mon);
}

static int enter_unlocked(ul_fdmon *mon, int64_t timeout_ns) {
    ul_ring *ring = mon->ring;
    mon->waiting = true;
    pthread_mutex_unlock(&mon->lock);
    int ret = ul_ring_enter(ring, 1, timeout_ns);
    pthread_mutex_lock(&mon->lock);
    mon->waiting = false;
    return ret;
}

static int wait_in_this_thread(ul_fdmon *mon, int64_t timeout_ns) {
    int err = prepare(mon);
    if (err < 0)
        return err;
    /* Waiting for one completion with timeout 0 costs 20 us (a timer and a schedule); not waiting at all, 0.2 us. */
    if (timeout_ns == 0 || ul_ring_peek(mon->ring) || mon->ready_live > 0) {
        bool idle = ul_ring_unsubmitted(mon->ring) == 0 && !ul_ring_has_work(mon->ring);
        err = idle ? 0 : enter_and_drain(mon);
    } else {
        err = judge(mon, enter_unlocked(mon, timeout_ns));
        err = err == 0 ? drain(mon) : err;
    }
    return err == 0 && mon->uncancelled ? reap_dying(mon) : err;
}

static int io_uring_wait(ul_fdmon *mon, int64_t timeout_ns) {
    int err = wait_in_this_thread(mon, timeout_ns);
    if (err == -EEXIST) { /* pthread_self() of a thread that ended may be given out again; the kernel knows better */
        drop_and_rearm(mon);
        err = wait_in_this_thread(mon, timeout_ns);
    }
    return err;
}

static bool io_uring_need_wait(ul_fdmon *mon) {
    bool changes = mon->pending.count || wants_timeout(mon);
    if (!mon->ring || changes)
        return changes || mon->watches_live > 0;
    return ul_ring_unsubmitted(mon->ring) > 0 || ul_ring_has_work(mon->ring) || (mon->eventfd >= 0 && !mon->ring->has_eventfd);
}

static void io_uring_close(ul_fdmon *mon) {
    drop_ring(mon);
    while (mon->pending.count) {
        int fd = ul_queue_pop(&mon->pending).fd;
        mon->watches[fd].on_pending = false;
        if (mon->watches[fd].send && mon->watches[fd].send->state == UL_QUEUED)
            ul_stream_sent(mon, fd, -ECANCELED);
    }
}

ul_ring *ul_fdmon_io_uring_release(ul_fdmon *mon) {
    if (!may_enter(mon))
        return NULL;
    for (uint32_t id = 1; id <= mon->requests_cap; id++)
        if (mon->requests[id - 1].state == UL_ARMED)
            doom_request(mon, id);
    if (cancel_dying(mon) < 0 || reap_dying(mon) < 0 || ul_ring_set_eventfd(mon->ring, -1) < 0 ||
        ul_ring_unregister_buffers(mon->ring) < 0)
        return NULL;
    ul_ring *ring = mon->ring;
    mon->ring = NULL;
    return ring;
}

static const FDMonOps io_uring_ops = {
    .kind = UL_IO_URING,
    .name = "io_uring",
    .streams = true,
    .update = io_uring_update,
    .wait = io_uring_wait,
    .need_wait = io_uring_need_wait,
    .dispatch = ul_fdmon_dispatch_ready,
    .close = io_uring_close,
};

int ul_fdmon_io_uring_setup(ul_fdmon *mon, ul_ring *spare) {
    int err = open_ring(mon, spare);
    if (err == 0)
        mon->ops = &io_uring_ops;
    return err;
}

/*
 * Receiving and sending on io_uring: multishot receives into a ring of buffers, sends that leave with the turn's enter.
 *
 * Why it exists: for small messages on many connections, a receive that needs no call of its own and a send that shares the
 * turn's save two system calls of three. Promise: no byte is lost or doubled, whatever takes the ring away; the kernel writes
 * into this file's memory only, and reads the caller's only until fdmon.h says that it is his again.
 *
 * Some facts about streams on io_uring, and what they mean here:
 *
 * - A multishot receive ends without F_MORE for many reasons: no buffer (-ENOBUFS), a full completion queue, an error, the end
 *   of the stream. Nothing restarts it but a new request; that is queued for the next turn, as a poll is. Only the last two
 *   are the caller's business.
 * - A cancelled receive may have taken bytes from the socket already; so may one that a foreign thread wanted ended while the
 *   owner was waiting. They are handed over in any case, in their order, unless the caller has said ul_fdmon_forget(). Tests:
 *   data_that_a_removed_watch_has_brought_is_reported_and_the_rest_stays_in_the_socket,
 *   a_removal_by_another_thread_loses_no_byte_and_a_forgotten_stream_is_silent.
 * - A multishot receive can miss the end of a stream. Woken, it reads until nothing is left and waits for the next wake-up; a
 *   reset, or the close of a Unix socket, that came before or together with the data has had its own. (Linux 6.18: after 32
 *   buffers at once. Kernels before 2026: always.) So a poll for POLLRDHUP waits beside each receive; when it fires first,
 *   UL_RECV means UL_READ for that watch: recv() looks for itself. Test: an_end_that_wakes_no_receive_is_found.
 * - An error that a receive has fetched is gone from the socket. So a cancelled receive's error is handed over too.
 * - A buffer ring is a first-in first-out queue and walks through all its memory. It begins with what the second-level cache
 *   holds and grows when -ENOBUFS shows that this is not enough; kernels before 6.5 also end a cancelled receive with that.
 *   A buffer lies on a multiple of its size: copying to page offsets 1 to 31 is five to ten times slower on some AMD
 *   processors. Test: more_data_than_buffers_arrives_all_the_same.
 * - The ring of places is unregistered when a quiet ring becomes a spare: most loops do not stream, its memory is locked, and
 *   the buffers belong to the monitor, because data waits in them when the ring is gone. A new ring gets every buffer that
 *   nobody holds.
 * - After the ring is closed no request of it runs: what the kernel still had to do for it is cancelled by a kernel thread,
 *   which has no access to this memory.
 * - A send without MSG_WAITALL ends as soon as one byte was taken. So one that has not ended has sent nothing, and may be sent
 *   again by other means. Two at once on one socket may change places: never more than one. Test:
 *   a_downgrade_gives_every_send_back.
 * - A completion is written to shared memory before an enter returns. Dropping the ring reads it first, from any thread.
 */
#define _GNU_SOURCE
#include "fdmon_io_uring.h"

#include <errno.h>
#include <sys/mman.h>

enum {
    BUFFERS_FIRST = 128, /* 256 KiB */
};

struct ul_buffers {
    char memory[UL_BUFFERS_MAX][UL_BUFFER_BYTES]; /* page-aligned; what the kernel never got costs nothing */
    uint64_t grown_in_turn;
    uint32_t count, handed_count;
    uint16_t handed[UL_BUFFERS_MAX];
    bool held[UL_BUFFERS_MAX]; /* collected or handed over */
};

/* ---- buffers ---- */

static ul_buffers *new_buffers(void) {
    ul_buffers *buffers = mmap(NULL, sizeof *buffers, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (buffers == MAP_FAILED)
        return NULL;
    madvise(buffers, sizeof *buffers, MADV_NOHUGEPAGE); /* or the first byte costs 2 MiB */
    buffers->count = BUFFERS_FIRST;
    return buffers;
}

void ul_buffers_free(ul_buffers *buffers) {
    if (buffers)
        munmap(buffers, sizeof *buffers);
}

static void give(ul_fdmon *mon, uint32_t number) {
    ul_ring_give_buffer(mon->ring, mon->buffers->memory[number], UL_BUFFER_BYTES, (uint16_t)number);
}

void ul_buffers_give_back(ul_fdmon *mon, uint16_t number) {
    mon->buffers->held[number] = false;
    if (mon->ring && mon->ring->buffer_ring)
        give(mon, number);
}

const void *ul_buffers_hand_over(ul_fdmon *mon, uint16_t number) {
    mon->buffers->handed[mon->buffers->handed_count++] = number;
    return mon->buffers->memory[number];
}

void ul_buffers_take_back(ul_fdmon *mon) {
    for (uint32_t i = 0; mon->buffers && i < mon->buffers->handed_count; i++)
        ul_buffers_give_back(mon, mon->buffers->handed[i]);
    if (mon->buffers)
        mon->buffers->handed_count = 0;
}

/* The buffer of a completion, which is ours from now on; UL_NO_BUFFER when there is none. */
static int32_t hold_buffer(ul_buffers *buffers, const struct ul_cqe *cqe) {
    uint32_t number = cqe->flags >> UL_CQE_BUFFER_SHIFT;
    if (!(cqe->flags & UL_CQE_F_BUFFER) || number >= buffers->count || buffers->held[number])
        return UL_NO_BUFFER;
    buffers->held[number] = true;
    return (int32_t)number;
}

/* At most once in a turn: a thousand receives that all find nothing are one reason, not ten. */
static void grow(ul_fdmon *mon) {
    ul_buffers *buffers = mon->buffers;
    if (buffers->count == UL_BUFFERS_MAX || buffers->grown_in_turn == mon->turns)
        return;
    buffers->grown_in_turn = mon->turns;
    for (uint32_t end = 2 * buffers->count; buffers->count < end; buffers->count++)
        give(mon, buffers->count);
}

/* ---- receiving ---- */

static int register_buffers(ul_fdmon *mon) {
    if (!mon->buffers && !(mon->buffers = new_buffers()))
        return -ENOMEM;
    int err = ul_ring_register_buffers(mon->ring);
    for (uint32_t i = 0; err == 0 && i < mon->buffers->count; i++)
        if (!mon->buffers->held[i])
            give(mon, i);
    return err;
}

/* Finds out, for the first watch that wants to receive, whether the kernel does so. */
static int prepare(ul_fdmon *mon) {
    if (mon->ring->buffer_ring || mon->no_receive)
        return 0;
    int err = register_buffers(mon);
    if (err == -EEXIST) /* the ring belongs to another thread */
        return err;
    mon->no_receive = err < 0; /* UL_RECV means UL_READ from now on */
    return 0;
}

int ul_stream_arm(ul_fdmon *mon, int fd) {
    int err = prepare(mon);
    if (err < 0)
        return err;
    ul_watch *watch = &mon->watches[fd];
    uint32_t old = watch->receive, id;
    bool wanted = watch->events & UL_RECV && !(ul_polled_events(mon, watch) & UL_READ) && !watch->ended && !watch->parked;
    if (old) /* what takes the place of one that is to end comes when it has ended */
        return wanted ? 0 : ul_request_cancel(mon, old);
    struct ul_sqe *sqe = wanted ? ul_request_new(mon, fd, &id, &err) : NULL;
    if (!sqe)
        return err;
    mon->requests[id - 1].kind = UL_RECEIVES;
    watch->receive = id;
    mon->ready_live -= watch->revents == UL_READ; /* its bytes will be data */
    watch->revents &= UL_WRITE;
    ul_prep_receive(sqe, fd, ul_request_user_data(mon, id));
    return 0;
}

static void receive_ended(ul_fdmon *mon, const ul_request *request, int32_t result) {
    ul_watch *watch = &mon->watches[request->fd];
    bool armed = request->state == UL_ARMED;
    switch (result) {
    case -ENOBUFS:
        if (armed)
            grow(mon);
        break;
    case -EAGAIN: /* the kernel does not wait, or it cannot receive from this file, or it does not know how */
    case -ENOTSOCK:
    case -EOPNOTSUPP:
    case -EINVAL:
        watch->no_receive |= armed;
        break;
    case -ECANCELED:
    case -EINTR:
    case -ENOMEM:
        break;
    default: /* the end of the stream, or its error */
        watch->ended = true;
        ul_fdmon_collect_data(mon, request->fd, result, UL_NO_BUFFER);
    }
}

void ul_stream_received(ul_fdmon *mon, const ul_request *request, const struct ul_cqe *cqe) {
    int32_t buffer = hold_buffer(mon->buffers, cqe), result = cqe->res;
    if (buffer != UL_NO_BUFFER && (result <= 0 || request->forgotten))
        ul_buffers_give_back(mon, (uint16_t)buffer);
    if (!(cqe->flags & UL_CQE_F_MORE) || buffer == UL_NO_BUFFER)
        ul_want_armed(mon, request->fd); /* again, or what takes its place */
    if (request->forgotten)
        return;
    if (result > 0 && buffer != UL_NO_BUFFER)
        ul_fdmon_collect_data(mon, request->fd, result < UL_BUFFER_BYTES ? result : UL_BUFFER_BYTES, buffer);
    else
        receive_ended(mon, request, result > 0 ? -EIO : result);
}

/* ---- sending ---- */

int ul_stream_arm_send(ul_fdmon *mon, int fd) {
    int err = 0;
    ul_send *send = mon->watches[fd].send;
    struct ul_sqe *sqe = send->state == UL_QUEUED ? ul_request_new(mon, fd, &send->request, &err) : NULL;
    if (!sqe)
        return err;
    mon->requests[send->request - 1].kind = UL_SENDS;
    send->state = UL_SENDING;
    mon->sends_queued--;
    ul_prep_send(sqe, fd, &send->message, ul_request_user_data(mon, send->request));
    return 0;
}

void ul_stream_sent(ul_fdmon *mon, int fd, int32_t result) {
    ul_send *send = mon->watches[fd].send;
    /* What this kernel or this socket does not know was not sent either: send() will tell. */
    bool nothing = result == -ECANCELED || result == -EINTR || result == -EOPNOTSUPP || result == -EINVAL;
    mon->sends_queued -= send->state == UL_QUEUED;
    send->state = UL_ENDED;
    send->result = nothing ? -EAGAIN : result;
    ul_fdmon_collect_sent(mon, fd, send->result);
}

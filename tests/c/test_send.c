/* link: -Wl,--wrap=syscall,--wrap=malloc */
/*
 * ul_fdmon_send(): a send that leaves with the turn.
 *
 * Why it exists: the kernel reads the caller's bytes while the caller does something else. Promise: what is reported as sent
 * was sent, once; what is not was not; and after a report, a cancellation or a loss of the ring the bytes are the caller's.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdlib.h>
#include <sys/wait.h>

#include "fake_kernel.h"
#include "stream.h"

void *__real_malloc(size_t size);
void *__wrap_malloc(size_t size);

static int mallocs;

void *__wrap_malloc(size_t size) {
    mallocs++;
    return __real_malloc(size);
}

static unsigned char bytes[1 << 20]; /* byte_of(0) ... */

static void fill_bytes(void) {
    for (size_t i = 0; i < sizeof bytes; i++)
        bytes[i] = byte_of(i);
}

static int send_bytes(ul_fdmon *mon, int fd, size_t first, size_t size) {
    return ul_fdmon_send(mon, fd, &(struct iovec){bytes + first, size}, 1);
}

/* What the peer of a stream has got so far is what was sent, and nothing else. */
static void check_got(int peer, uint64_t size) {
    read_in(peer, SIZE_MAX);
    CHECK(intakes[peer].bytes == size && intakes[peer].wrong == 0);
}

static int32_t result_of_send(ul_fdmon *mon, int fd) {
    int before = intakes[fd].sents;
    GATHER_UNTIL(mon, intakes[fd].sents > before);
    CHECK(intakes[fd].sents == before + 1);
    return intakes[fd].sent;
}

static size_t filled;

/* A send that waits, behind so many zeroes. */
static ul_fdmon *blocked_monitor(enum ul_kind kind, struct pair pair) {
    ul_fdmon *mon = open_monitor(kind);
    ssize_t n;
    for (filled = 0; (n = write(pair.ours, (char[4096]){0}, 4096)) > 0;)
        filled += (size_t)n;
    CHECK(send_bytes(mon, pair.ours, 0, 1000) == 0);
    CHECK(gather(mon, 0, 64) == 0);
    CHECK(mon->watches[pair.ours].send->state == UL_SENDING);
    return mon;
}

static void a_send_leaves_with_the_next_turn_and_is_reported(enum ul_kind kind) {
    fill_bytes();
    ul_fdmon *mon = open_monitor(kind);
    struct pair pair = open_stream();
    uint64_t enters = statistics_of(mon).enters, sent = 0;
    for (int i = 0; i < 5; i++) {
        CHECK(send_bytes(mon, pair.ours, sent, 1000) == 0);
        CHECK(ul_fdmon_need_wait(mon));
        check_got(pair.peer, sent);
        CHECK(statistics_of(mon).enters == enters + (uint64_t)i);
        CHECK(gather(mon, -1, 64) == 1);
        CHECK(intakes[pair.ours].sents == i + 1 && intakes[pair.ours].sent == 1000);
        check_got(pair.peer, sent += 1000);
    }
    CHECK(!ul_fdmon_need_wait(mon));
    close_monitor(mon);
    close_pair(pair);
}

static void many_pieces_are_one_send(enum ul_kind kind) {
    fill_bytes();
    ul_fdmon *mon = open_monitor(kind);
    struct pair pair = open_stream();
    size_t sent = 0;
    for (int count = 1; count <= UL_PIECES_MAX; count++) {
        struct iovec pieces[UL_PIECES_MAX];
        size_t first = sent;
        for (int i = 0; i < count; i++) {
            pieces[i] = (struct iovec){bytes + sent, (size_t)i % 7};
            sent += (size_t)i % 7;
        }
        CHECK(ul_fdmon_send(mon, pair.ours, pieces, count) == 0);
        memset(pieces, 0, sizeof pieces);
        CHECK(result_of_send(mon, pair.ours) == (int32_t)(sent - first));
        check_got(pair.peer, sent);
    }
    struct iovec piece = {bytes, 1};
    CHECK(ul_fdmon_send(mon, pair.ours, &piece, 0) == -EINVAL);
    CHECK(ul_fdmon_send(mon, pair.ours, &piece, -1) == -EINVAL);
    CHECK(ul_fdmon_send(mon, pair.ours, &piece, UL_PIECES_MAX + 1) == -EINVAL);
    CHECK(ul_fdmon_send(mon, -1, &piece, 1) == -EBADF);
    CHECK(ul_fdmon_send(mon, 1000000, &piece, 1) == -EBADF);
    close_monitor(mon);
    close_pair(pair);
}

static void a_second_send_waits_for_the_report_of_the_first(enum ul_kind kind) {
    fill_bytes();
    ul_fdmon *mon = open_monitor(kind);
    struct pair pair = open_stream();
    CHECK(send_bytes(mon, pair.ours, 0, 10) == 0);
    CHECK(send_bytes(mon, pair.ours, 10, 10) == -EALREADY);
    CHECK(ul_fdmon_turn(mon, 0, NULL, 0) == 0); /* sent, not reported */
    CHECK(send_bytes(mon, pair.ours, 10, 10) == -EALREADY);
    CHECK(result_of_send(mon, pair.ours) == 10);
    CHECK(send_bytes(mon, pair.ours, 10, 10) == 0);
    CHECK(result_of_send(mon, pair.ours) == 10);
    check_got(pair.peer, 20);
    close_monitor(mon);
    close_pair(pair);
}

static void a_short_send_says_how_much(enum ul_kind kind) {
    fill_bytes();
    ul_fdmon *mon = open_monitor(kind);
    struct pair pair = open_tcp_stream();
    size_t sent = 0;
    int shorts = 0, small = 8192;
    CHECK(setsockopt(pair.ours, SOL_SOCKET, SO_SNDBUF, &small, sizeof small) == 0);
    while (sent < sizeof bytes) {
        struct iovec pieces[2] = {{bytes + sent, (sizeof bytes - sent) / 2}, {NULL, 0}};
        pieces[1] = (struct iovec){bytes + sent + pieces[0].iov_len, sizeof bytes - sent - pieces[0].iov_len};
        CHECK(ul_fdmon_send(mon, pair.ours, pieces, 2) == 0);
        int before = intakes[pair.ours].sents;
        for (int64_t until = now_ns() + SOON; intakes[pair.ours].sents == before && now_ns() < until;) {
            gather(mon, 1 * MS, 64);
            read_in(pair.peer, 20000);
        }
        if (!CHECK(intakes[pair.ours].sents == before + 1 && intakes[pair.ours].sent > 0))
            break;
        shorts += (size_t)intakes[pair.ours].sent < sizeof bytes - sent;
        sent += (size_t)intakes[pair.ours].sent;
    }
    CHECK(shorts > 0);
    for (int64_t until = now_ns() + SOON; intakes[pair.peer].bytes < sent && now_ns() < until;)
        read_in(pair.peer, SIZE_MAX);
    check_got(pair.peer, sizeof bytes);
    close_monitor(mon);
    close_pair(pair);
}

static void a_send_to_a_peer_that_is_gone_is_an_error_and_no_signal(enum ul_kind kind) {
    fill_bytes();
    ul_fdmon *mon = open_monitor(kind);
    struct pair pair = open_stream();
    close(pair.peer);
    for (int count = 1; count <= 2; count++) {
        struct iovec pieces[2] = {{bytes, 10}, {bytes + 10, 10}};
        CHECK(ul_fdmon_send(mon, pair.ours, pieces, count) == 0);
        CHECK(result_of_send(mon, pair.ours) == -EPIPE);
    }
    close(pair.ours);
    CHECK(send_bytes(mon, pair.ours, 0, 10) == 0);
    CHECK(result_of_send(mon, pair.ours) == -EBADF);
    close_monitor(mon);
}

static void where_it_cannot_be_sent_the_caller_is_told(enum ul_kind kind) {
    ul_fdmon *mon = open_monitor(kind);
    struct pair pair = open_stream();
    if (kind != UL_IO_URING)
        CHECK(send_bytes(mon, pair.ours, 0, 10) == -EOPNOTSUPP);
    CHECK(ul_fdmon_cancel_send(mon, pair.ours) == -ENOENT);
    CHECK(ul_fdmon_forget(mon, pair.ours) == 0);
    CHECK(send_bytes(mon, pair.ours, 0, 10) == (kind == UL_IO_URING ? 0 : -EOPNOTSUPP));
    ul_ring *spare;
    CHECK(ul_fdmon_close(mon, &spare) == 0);
    CHECK(send_bytes(mon, pair.ours, 0, 10) == -EBADF);
    CHECK(ul_fdmon_cancel_send(mon, pair.ours) == -EBADF);
    CHECK(ul_fdmon_forget(mon, pair.ours) == 0);
    ul_fdmon_free(mon);
    ul_ring_free(spare);
    close_pair(pair);
}

/* ---- cancelling ---- */

static void a_cancelled_send_tells_what_was_sent_and_is_not_reported(enum ul_kind kind) {
    fill_bytes();
    ul_fdmon *mon = open_monitor(kind);
    struct pair pair = open_stream();
    uint64_t enters = statistics_of(mon).enters;
    CHECK(send_bytes(mon, pair.ours, 0, 10) == 0);
    CHECK(ul_fdmon_cancel_send(mon, pair.ours) == -EAGAIN); /* never submitted */
    CHECK(ul_fdmon_cancel_send(mon, pair.ours) == -ENOENT);
    CHECK(statistics_of(mon).enters == enters);
    CHECK(gather(mon, 0, 64) == 0);
    check_got(pair.peer, 0);

    CHECK(send_bytes(mon, pair.ours, 0, 10) == 0);
    CHECK(ul_fdmon_turn(mon, 0, NULL, 0) == 0); /* sent */
    CHECK(ul_fdmon_cancel_send(mon, pair.ours) == 10);
    CHECK(gather(mon, 0, 64) == 0 && mon->ready_live == 0);
    check_got(pair.peer, 10);
    CHECK(send_bytes(mon, pair.ours, 10, 10) == 0);
    CHECK(result_of_send(mon, pair.ours) == 10);
    CHECK(!mon->watches[pair.ours].send);
    close_monitor(mon);
    close_pair(pair);
}

static void a_cancelled_send_that_waited_has_sent_nothing(enum ul_kind kind) {
    fill_bytes();
    struct pair pair = open_stream();
    ul_fdmon *mon = blocked_monitor(kind, pair);
    for (int i = 0; i < 3; i++) {
        CHECK(ul_fdmon_cancel_send(mon, pair.ours) == -EAGAIN);
        CHECK(mon->requests_in_flight == 0 && gather(mon, 0, 64) == 0);
        CHECK(send_bytes(mon, pair.ours, 0, 1000) == 0);
        CHECK(gather(mon, 0, 64) == 0);
    }
    empty(pair.peer);
    CHECK(result_of_send(mon, pair.ours) == 1000);
    check_got(pair.peer, 1000);
    close_monitor(mon);
    close_pair(pair);
}

static void forgetting_ends_a_send_and_the_peer_sees_it(enum ul_kind kind) {
    fill_bytes();
    struct pair pair = open_stream();
    ul_fdmon *mon = blocked_monitor(kind, pair);
    CHECK(ul_fdmon_update(mon, pair.ours, UL_READ | UL_RECV) == 0);
    gather(mon, 0, 64);
    CHECK(ul_fdmon_forget(mon, pair.ours) == 0);
    CHECK(mon->requests_in_flight == 0 && statistics_of(mon).watches == 0);
    close(pair.ours);
    empty(pair.peer);
    CHECK(sees_end_of_file(pair.peer, 0));
    CHECK(gather(mon, 0, 64) == 0);
    close_monitor(mon);
    close(pair.peer);
}

static void a_send_needs_no_watch_and_outlives_its_removal(enum ul_kind kind) {
    fill_bytes();
    struct pair pair = open_stream();
    ul_fdmon *mon = blocked_monitor(kind, pair);
    CHECK(statistics_of(mon).watches == 0);
    CHECK(ul_fdmon_update(mon, pair.ours, UL_READ | UL_RECV) == 0);
    gather(mon, 0, 64);
    CHECK(ul_fdmon_update(mon, pair.ours, 0) == 0);
    empty(pair.peer);
    CHECK(result_of_send(mon, pair.ours) == 1000);
    check_got(pair.peer, 1000);
    close_monitor(mon);
    close_pair(pair);
}

/* ---- the ring is lost ---- */

static long enter_is_denied(const struct enter_call *call) {
    (void)call;
    return -EPERM;
}

static void a_downgrade_gives_every_send_back(enum ul_kind kind) {
    fill_bytes();
    believe_the_kernel();
    struct pair blocked = open_stream(), queued = open_stream(), sent = open_stream();
    ul_fdmon *mon = blocked_monitor(kind, blocked);
    CHECK(send_bytes(mon, sent.ours, 0, 10) == 0);
    CHECK(ul_fdmon_turn(mon, 0, NULL, 0) == 0);
    CHECK(send_bytes(mon, queued.ours, 0, 10) == 0);
    on_enter = enter_is_denied;
    for (int turns = 0; turns < 3; turns++)
        gather(mon, 0, 2);
    CHECK(monitor_is(mon, "epoll"));
    CHECK(intakes[blocked.ours].sents == 1 && intakes[blocked.ours].sent == -EAGAIN);
    CHECK(intakes[queued.ours].sents == 1 && intakes[queued.ours].sent == -EAGAIN);
    CHECK(intakes[sent.ours].sents == 1 && intakes[sent.ours].sent == 10);
    CHECK(send_bytes(mon, queued.ours, 0, 10) == -EOPNOTSUPP);
    empty(blocked.peer);
    usleep(20000);
    check_got(blocked.peer, 0);
    check_got(queued.peer, 0);
    check_got(sent.peer, 10);
    close_monitor(mon);
    close_pair(blocked);
    close_pair(queued);
    close_pair(sent);
    believe_the_kernel();
}

static void *turn_in_thread(void *argument) {
    ul_fdmon *mon = argument;
    for (int turns = 0; turns < 3; turns++)
        gather(mon, 1 * MS, 64);
    return NULL;
}

static void a_move_to_another_thread_gives_back_what_waited_and_sends_what_was_queued(enum ul_kind kind) {
    fill_bytes();
    struct pair blocked = open_stream(), queued = open_stream();
    ul_fdmon *mon = blocked_monitor(kind, blocked);
    pthread_t thread;
    CHECK(send_bytes(mon, queued.ours, 0, 10) == 0);
    CHECK(pthread_create(&thread, NULL, turn_in_thread, mon) == 0);
    pthread_join(thread, NULL);
    CHECK(intakes[blocked.ours].sents == 1 && intakes[blocked.ours].sent == -EAGAIN);
    CHECK(intakes[queued.ours].sents == 1 && intakes[queued.ours].sent == 10);
    empty(blocked.peer);
    usleep(20000);
    check_got(blocked.peer, 0);
    check_got(queued.peer, 10);
    close_monitor(mon);
    close_pair(blocked);
    close_pair(queued);
}

static long setup_is_denied(unsigned entries, struct ul_params *params) {
    (void)entries;
    (void)params;
    return -EPERM;
}

static void a_queued_send_comes_back_when_the_other_thread_gets_no_ring(enum ul_kind kind) {
    fill_bytes();
    believe_the_kernel();
    ul_fdmon *mon = open_monitor(kind);
    struct pair pair = open_stream();
    pthread_t thread;
    CHECK(send_bytes(mon, pair.ours, 0, 10) == 0);
    on_setup = setup_is_denied;
    CHECK(pthread_create(&thread, NULL, turn_in_thread, mon) == 0);
    pthread_join(thread, NULL);
    CHECK(monitor_is(mon, "epoll") && intakes[pair.ours].sents == 1 && intakes[pair.ours].sent == -EAGAIN);
    check_got(pair.peer, 0);
    close_monitor(mon);
    close_pair(pair);
    believe_the_kernel();
}

static void *cancel_in_thread(void *argument) {
    ul_fdmon *mon = ((void **)argument)[0];
    const struct pair *pair = ((void **)argument)[1];
    bool while_waiting = ((void **)argument)[2];
    for (bool waiting = !while_waiting; !waiting;) {
        pthread_mutex_lock(&mon->lock);
        waiting = mon->waiting;
        pthread_mutex_unlock(&mon->lock);
    }
    CHECK(ul_fdmon_cancel_send(mon, pair->ours) == (while_waiting ? -EBUSY : -EAGAIN));
    if (while_waiting) {
        CHECK(ul_fdmon_forget(mon, pair->ours) == -EBUSY);
        for (char zeroes[4096]; filled > 0;) { /* and not the bytes that are sent as soon as there is room */
            ssize_t n = read(pair->peer, zeroes, filled < sizeof zeroes ? filled : sizeof zeroes);
            filled -= n > 0 ? (size_t)n : filled;
        }
    }
    return NULL;
}

static void another_thread_may_cancel_unless_the_owner_waits(enum ul_kind kind) {
    fill_bytes();
    for (int while_waiting = 0; while_waiting < 2; while_waiting++) {
        struct pair pair = open_stream();
        ul_fdmon *mon = blocked_monitor(kind, pair);
        pthread_t thread;
        CHECK(pthread_create(&thread, NULL, cancel_in_thread, (void *[]){mon, &pair, while_waiting ? mon : NULL}) == 0);
        if (while_waiting)
            CHECK(result_of_send(mon, pair.ours) == 1000);
        pthread_join(thread, NULL);
        if (!while_waiting)
            empty(pair.peer);
        CHECK(is_quiet(mon, 2 * MS));
        check_got(pair.peer, while_waiting ? 1000 : 0);
        close_monitor(mon);
        close_pair(pair);
    }
}

static void a_child_has_sent_nothing_and_its_parent_goes_on(enum ul_kind kind) {
    fill_bytes();
    struct pair pair = open_stream();
    ul_fdmon *mon = blocked_monitor(kind, pair);
    pid_t child = fork();
    if (child == 0) {
        ul_fdmon_after_fork_in_child(mon);
        CHECK(result_of_send(mon, pair.ours) == -EAGAIN);
        struct pair own = open_stream();
        CHECK(send_bytes(mon, own.ours, 0, 10) == 0);
        CHECK(result_of_send(mon, own.ours) == 10);
        check_got(own.peer, 10);
        close_monitor(mon);
        _exit(checks_failed ? 1 : 0);
    }
    int status = 0;
    CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0);
    CHECK(gather(mon, 0, 64) == 0);
    empty(pair.peer);
    CHECK(result_of_send(mon, pair.ours) == 1000);
    check_got(pair.peer, 1000);
    close_monitor(mon);
    close_pair(pair);
}

static void closing_the_monitor_ends_every_send(enum ul_kind kind) {
    fill_bytes();
    struct pair blocked = open_stream(), queued = open_stream();
    ul_fdmon *mon = blocked_monitor(kind, blocked);
    CHECK(send_bytes(mon, queued.ours, 0, 10) == 0);
    ul_ring *spare = close_and_keep_ring(mon);
    CHECK(spare != NULL);
    empty(blocked.peer);
    close(blocked.ours);
    close(queued.ours);
    CHECK(sees_end_of_file(blocked.peer, 0) && sees_end_of_file(queued.peer, 0));
    ul_ring_free(spare);
    close(blocked.peer);
    close(queued.peer);
}

/* ---- beside everything else ---- */

static void a_send_leaves_although_earlier_events_fill_the_turn(enum ul_kind kind) {
    enum { MANY = 50 };
    fill_bytes();
    ul_fdmon *mon = open_monitor(kind);
    struct pair pairs[MANY], answered = open_stream();
    for (int i = 0; i < MANY; i++) {
        pairs[i] = open_stream();
        CHECK(ul_fdmon_update(mon, pairs[i].ours, UL_READ | UL_RECV) == 0);
        feed(pairs[i].peer, 100);
    }
    CHECK(ul_fdmon_turn(mon, 1 * MS, NULL, 0) == 0 && mon->ready_live > 10);
    CHECK(send_bytes(mon, answered.ours, 0, 10) == 0);
    CHECK(gather(mon, 0, 1) == 1);
    check_got(answered.peer, 10);
    CHECK(result_of_send(mon, answered.ours) == 10);
    for (int i = 0; i < MANY; i++)
        check_complete(mon, pairs[i]);
    close_monitor(mon);
    for (int i = 0; i < MANY; i++)
        close_pair(pairs[i]);
    close_pair(answered);
}

static void a_thousand_echoes_allocate_nothing_and_cost_one_enter_for_all_connections(enum ul_kind kind) {
    enum { MANY = 10, ROUNDS = 100 };
    fill_bytes();
    ul_fdmon *mon = open_monitor(kind);
    struct pair pairs[MANY];
    for (int i = 0; i < MANY; i++) {
        pairs[i] = open_stream();
        CHECK(ul_fdmon_update(mon, pairs[i].ours, UL_READ | UL_RECV) == 0);
    }
    uint64_t enters = 0;
    for (int round = 0; round < ROUNDS + 5; round++) {
        if (round == 5) {
            mallocs = 0;
            enters = statistics_of(mon).enters;
        }
        for (int i = 0; i < MANY; i++)
            feed(pairs[i].peer, 1000);
        for (int i = 0; i < MANY; i++)
            check_complete(mon, pairs[i]);
        for (int i = 0; i < MANY; i++)
            CHECK(send_bytes(mon, pairs[i].ours, (size_t)round * 1000, 1000) == 0);
        for (int i = 0; i < MANY; i++)
            GATHER_UNTIL(mon, intakes[pairs[i].ours].sents == round + 1);
        for (int i = 0; i < MANY; i++)
            check_got(pairs[i].peer, ((uint64_t)round + 1) * 1000);
    }
    CHECK(mallocs == 0);
    CHECK(statistics_of(mon).enters - enters <= 2 * ROUNDS);
    close_monitor(mon);
    for (int i = 0; i < MANY; i++)
        close_pair(pairs[i]);
}

TESTS(TEST(a_send_leaves_with_the_next_turn_and_is_reported, ON_IO_URING), TEST(many_pieces_are_one_send, ON_IO_URING),
      TEST(a_second_send_waits_for_the_report_of_the_first, ON_IO_URING), TEST(a_short_send_says_how_much, ON_IO_URING),
      TEST(a_send_to_a_peer_that_is_gone_is_an_error_and_no_signal, ON_IO_URING),
      TEST(where_it_cannot_be_sent_the_caller_is_told, ON_ALL),
      TEST(a_cancelled_send_tells_what_was_sent_and_is_not_reported, ON_IO_URING),
      TEST(a_cancelled_send_that_waited_has_sent_nothing, ON_IO_URING),
      TEST(forgetting_ends_a_send_and_the_peer_sees_it, ON_IO_URING),
      TEST(a_send_needs_no_watch_and_outlives_its_removal, ON_IO_URING), TEST(a_downgrade_gives_every_send_back, ON_IO_URING),
      TEST(a_move_to_another_thread_gives_back_what_waited_and_sends_what_was_queued, ON_IO_URING),
      TEST(a_queued_send_comes_back_when_the_other_thread_gets_no_ring, ON_IO_URING),
      TEST(another_thread_may_cancel_unless_the_owner_waits, ON_IO_URING),
      TEST(a_child_has_sent_nothing_and_its_parent_goes_on, ON_IO_URING),
      TEST(closing_the_monitor_ends_every_send, ON_IO_URING),
      TEST(a_send_leaves_although_earlier_events_fill_the_turn, ON_IO_URING),
      TEST(a_thousand_echoes_allocate_nothing_and_cost_one_enter_for_all_connections, ON_IO_URING))

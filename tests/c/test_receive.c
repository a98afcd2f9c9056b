/* link: -Wl,--wrap=syscall,--wrap=mmap */
/*
 * UL_RECV: data instead of readiness.
 *
 * Why it exists: bytes that a receive has taken are in nobody's socket any more. Promise: on every monitor, and through every
 * way of losing or ending a receive, the bytes of a stream arrive once and in order.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <sys/mman.h>
#include <sys/wait.h>

#include "fake_kernel.h"
#include "stream.h"

void *__real_mmap(void *addr, size_t length, int prot, int flags, int fd, off_t offset);
void *__wrap_mmap(void *addr, size_t length, int prot, int flags, int fd, off_t offset);

static bool mmap_fails;

void *__wrap_mmap(void *addr, size_t length, int prot, int flags, int fd, off_t offset) {
    if (!mmap_fails)
        return __real_mmap(addr, length, prot, flags, fd, offset);
    errno = ENOMEM;
    return MAP_FAILED;
}

static int receive(ul_fdmon *mon, int fd) { return ul_fdmon_update(mon, fd, UL_READ | UL_RECV); }

/* Whether nobody holds the other end, also when bytes were left in it unread. */
static bool is_hung_up(int fd) {
    struct pollfd hung_up = {.fd = fd};
    return poll(&hung_up, 1, 0) == 1 && (hung_up.revents & POLLHUP);
}

/* A monitor that has received a byte from each of these and waits for more. */
static ul_fdmon *receiving_monitor(enum ul_kind kind, const struct pair *pairs, int count) {
    ul_fdmon *mon = open_monitor(kind);
    for (int i = 0; i < count; i++) {
        CHECK(receive(mon, pairs[i].ours) == 0);
        CHECK(feed(pairs[i].peer, 1) == 1);
    }
    for (int i = 0; i < count; i++)
        check_complete(mon, pairs[i]);
    return mon;
}

static void what_is_written_is_reported_as_data(enum ul_kind kind) {
    ul_fdmon *mon = open_monitor(kind);
    struct pair pair = open_pair();
    ul_event out[4];
    CHECK(receive(mon, pair.ours) == 0);
    CHECK(is_quiet(mon, 2 * MS));
    for (int i = 0; i < 3; i++) {
        CHECK(write(pair.peer, "hello", 5) == 5);
        CHECK(next_events(mon, out, 4, SOON) == 1);
        CHECK(out[0].fd == pair.ours && out[0].events == UL_DATA && out[0].result == 5);
        CHECK(out[0].data && memcmp(out[0].data, "hello", 5) == 0);
        CHECK(((uintptr_t)out[0].data & 2047) == 0);
    }
    CHECK(is_quiet(mon, 2 * MS));
    CHECK(recv(pair.ours, out, 1, MSG_DONTWAIT) < 0 && errno == EAGAIN);
    close_monitor(mon);
    close_pair(pair);
}

static void where_it_cannot_be_received_readiness_is_reported(enum ul_kind kind) {
    ul_fdmon *mon = open_monitor(kind);
    struct pair pair = open_pair();
    ul_event out[4];
    CHECK(receive(mon, pair.ours) == 0);
    put(pair.peer);
    for (int i = 0; i < 3; i++) {
        CHECK(next_events(mon, out, 4, SOON) == 1 && out[0].events == UL_READ);
        CHECK(out[0].result == 0 && !out[0].data);
    }
    close_monitor(mon);
    close_pair(pair);
}

static void many_streams_of_all_sizes_arrive_in_order(enum ul_kind kind) {
    enum { MANY = 50, EACH = 300000 };
    ul_fdmon *mon = open_monitor(kind);
    struct pair pairs[MANY];
    unsigned random = 1;
    for (int i = 0; i < MANY; i++) {
        pairs[i] = i % 10 ? open_stream() : open_tcp_stream();
        CHECK(receive(mon, pairs[i].ours) == 0);
    }
    for (bool fed_all = false; !fed_all;) {
        fed_all = true;
        for (int i = 0; i < MANY; i++) {
            random = random * 1103515245 + 12345;
            size_t size = (random >> 8) % (random & 0x400000 ? 200 : 70000) + 1;
            if (fed[pairs[i].peer] < EACH)
                feed(pairs[i].peer, size);
            fed_all &= fed[pairs[i].peer] >= EACH;
        }
        gather(mon, 0, 1 + (int)(random >> 4) % 64);
    }
    for (int i = 0; i < MANY; i++)
        check_complete(mon, pairs[i]);
    CHECK(is_quiet(mon, 2 * MS));
    CHECK(statistics_of(mon).downgrades == 0);
    close_monitor(mon);
    for (int i = 0; i < MANY; i++)
        close_pair(pairs[i]);
}

static void the_end_of_a_stream_comes_once_and_after_its_data(enum ul_kind kind) {
    ul_fdmon *mon = open_monitor(kind);
    struct pair pair = open_stream();
    CHECK(receive(mon, pair.ours) == 0);
    feed(pair.peer, 10000);
    CHECK(shutdown(pair.peer, SHUT_WR) == 0);
    check_complete(mon, pair);
    GATHER_UNTIL(mon, intakes[pair.ours].ends == 1);
    CHECK(intakes[pair.ours].bytes == 10000 && intakes[pair.ours].end == 0);
    CHECK(is_quiet(mon, 5 * MS));
    if (kind == UL_IO_URING) { /* until it is taken away and asked for anew, beside writing or not */
        CHECK(ul_fdmon_update(mon, pair.ours, UL_READ | UL_WRITE | UL_RECV) == 0);
        CHECK(events_of(mon, pair.ours, SOON) == UL_WRITE);
        CHECK(receive(mon, pair.ours) == 0);
        gather(mon, 0, 64);
        CHECK(is_quiet(mon, 2 * MS) && intakes[pair.ours].ends == 1);
    }
    CHECK(ul_fdmon_update(mon, pair.ours, 0) == 0);
    CHECK(receive(mon, pair.ours) == 0);
    GATHER_UNTIL(mon, intakes[pair.ours].ends == 2);
    close_monitor(mon);
    close_pair(pair);
}

static void an_end_that_waits_for_room_is_not_repeated(enum ul_kind kind) {
    ul_fdmon *mon = open_monitor(kind);
    struct pair pair = open_stream();
    CHECK(shutdown(pair.peer, SHUT_WR) == 0);
    for (int i = 0; i < 20; i++) {
        CHECK(receive(mon, pair.ours) == 0);
        CHECK(ul_fdmon_turn(mon, 0, NULL, 0) == 0);
        CHECK(ul_fdmon_update(mon, pair.ours, 0) == 0);
    }
    CHECK(mon->collected.count == 1);
    CHECK(receive(mon, pair.ours) == 0);
    CHECK(gather(mon, 0, 64) == 1 && intakes[pair.ours].ends == 1);
    CHECK(is_quiet(mon, 1 * MS));
    close_monitor(mon);
    close_pair(pair);
}

static void a_reset_is_reported_as_an_error(enum ul_kind kind) {
    ul_fdmon *mon = open_monitor(kind);
    struct pair pair = open_tcp_stream();
    struct linger linger = {1, 0};
    CHECK(receive(mon, pair.ours) == 0);
    feed(pair.peer, 100);
    check_complete(mon, pair);
    CHECK(setsockopt(pair.peer, SOL_SOCKET, SO_LINGER, &linger, sizeof linger) == 0);
    close(pair.peer);
    GATHER_UNTIL(mon, intakes[pair.ours].ends);
    CHECK(intakes[pair.ours].end == -ECONNRESET);
    CHECK(is_quiet(mon, 5 * MS));
    close_monitor(mon);
    close(pair.ours);
}

static void writing_is_watched_beside_receiving(enum ul_kind kind) {
    ul_fdmon *mon = open_monitor(kind);
    struct pair pair = open_stream();
    CHECK(ul_fdmon_update(mon, pair.ours, UL_READ | UL_WRITE | UL_RECV) == 0);
    GATHER_UNTIL(mon, intakes[pair.ours].write_events >= 3);
    feed(pair.peer, 5000);
    check_complete(mon, pair);
    fill(pair.ours);
    gather(mon, 0, 64);
    CHECK(is_quiet(mon, 2 * MS));
    feed(pair.peer, 5000);
    check_complete(mon, pair);
    empty(pair.peer);
    CHECK(events_of(mon, pair.ours, SOON) == UL_WRITE);
    CHECK(receive(mon, pair.ours) == 0);
    gather(mon, 0, 64);
    CHECK(is_quiet(mon, 2 * MS));
    feed(pair.peer, 5000);
    check_complete(mon, pair);
    CHECK(mon->requests_dying == 0 && mon->requests_in_flight <= 2);
    CHECK(kind != UL_IO_URING || intakes[pair.ours].read_events == 0);
    close_monitor(mon);
    close_pair(pair);
}

static void a_hang_up_seen_by_the_writer_is_not_readiness_to_read(enum ul_kind kind) {
    ul_fdmon *mon = open_monitor(kind);
    struct pair pair = open_stream();
    fill(pair.ours);
    CHECK(ul_fdmon_update(mon, pair.ours, UL_READ | UL_WRITE | UL_RECV) == 0);
    CHECK(is_quiet(mon, 1 * MS));
    close(pair.peer);
    GATHER_UNTIL(mon, intakes[pair.ours].ends == 1 && intakes[pair.ours].write_events > 0);
    CHECK(intakes[pair.ours].read_events == 0);
    close_monitor(mon);
    close(pair.ours);
}

/* ---- what was brought is handed over, whatever becomes of the watch ---- */

static void data_that_a_removed_watch_has_brought_is_reported_and_the_rest_stays_in_the_socket(enum ul_kind kind) {
    for (uint32_t events = 0; events <= UL_READ; events += UL_READ) {
        struct pair pair = open_stream();
        ul_fdmon *mon = receiving_monitor(kind, &pair, 1);
        feed(pair.peer, 10000);
        CHECK(ul_fdmon_turn(mon, 0, NULL, 0) == 0); /* collected, not handed over */
        feed(pair.peer, 10000);                     /* has woken the receive: the kernel's, or the socket's still */
        intakes[pair.ours].leave_it = true;
        CHECK(ul_fdmon_update(mon, pair.ours, events) == 0);
        uint64_t enters = statistics_of(mon).enters;
        CHECK(mon->watches[pair.ours].receive == 0);
        feed(pair.peer, 10000);
        while (gather_dispatched(mon) > 0)
            ;
        CHECK(statistics_of(mon).enters == enters);
        CHECK(intakes[pair.ours].bytes >= 10001 && intakes[pair.ours].wrong == 0 && intakes[pair.ours].read_events == 0);
        CHECK(read_in(pair.ours, SIZE_MAX) && intakes[pair.ours].bytes == 30001 && intakes[pair.ours].wrong == 0);
        gather(mon, 0, 64);
        CHECK(intakes[pair.ours].bytes == 30001);
        CHECK(receive(mon, pair.ours) == 0); /* and back */
        feed(pair.peer, 10000);
        check_complete(mon, pair);
        CHECK(mon->watches[pair.ours].receive != 0);
        close_monitor(mon);
        close_pair(pair);
    }
}

static void data_comes_before_the_readiness_that_takes_its_place(enum ul_kind kind) {
    for (int way = 0; way < 2; way++) {
        struct pair pair = open_stream();
        ul_fdmon *mon = receiving_monitor(kind, &pair, 1);
        feed(pair.peer, 10000);
        ul_fdmon_turn(mon, 0, NULL, 0);
        feed(pair.peer, 10000);
        if (way == 0)
            CHECK(ul_fdmon_update(mon, pair.ours, UL_READ) == 0);
        else
            let_it_receive(mon, false);
        feed(pair.peer, 10000);
        check_complete(mon, pair); /* take_event() reads as soon as it is told to */
        CHECK(intakes[pair.ours].data_events > 1 && intakes[pair.ours].read_events > 0);
        close_monitor(mon);
        close_pair(pair);
    }
}

/* A turn without room collects; whatever the watch was before, its bytes come in order. */
static void readiness_that_was_collected_before_data_does_not_come_before_it(enum ul_kind kind) {
    static const uint32_t ways[] = {UL_READ, UL_READ | UL_RECV, UL_READ | UL_WRITE | UL_RECV, UL_READ | UL_WRITE};
    for (int i = 0; i < 4 * 4 * 4 * 4; i++) {
        ul_fdmon *mon = open_monitor(kind);
        struct pair pair = open_stream();
        for (int k = i, steps = 0; steps < 4; k /= 4, steps++) {
            CHECK(ul_fdmon_update(mon, pair.ours, ways[k % 4]) == 0);
            feed(pair.peer, 100);
            CHECK(ul_fdmon_turn(mon, 0, NULL, 0) == 0);
        }
        check_complete(mon, pair);
        CHECK(gather_dispatched(mon) == 0);
        close_monitor(mon);
        close_pair(pair);
    }
}

static void readiness_that_was_collected_is_data_once_a_receive_is_armed(enum ul_kind kind) {
    ul_fdmon *mon = open_monitor(kind);
    struct pair pair = open_stream();
    let_it_receive(mon, false);
    CHECK(receive(mon, pair.ours) == 0);
    feed(pair.peer, 100);
    CHECK(ul_fdmon_turn(mon, 0, NULL, 0) == 0 && mon->ready_live == 1);
    let_it_receive(mon, true);
    check_complete(mon, pair);
    CHECK(intakes[pair.ours].read_events == 0);
    close_monitor(mon);
    close_pair(pair);
}

/* Else it would find what the receive, woken before it was cancelled, is about to take. */
static void a_poll_for_reading_waits_until_the_receive_has_ended(enum ul_kind kind) {
    enum { MANY = 40 };
    struct pair pairs[MANY];
    for (int i = 0; i < MANY; i++)
        pairs[i] = open_stream();
    ul_fdmon *mon = receiving_monitor(kind, pairs, MANY);
    for (int i = 0; i < MANY; i++)
        feed(pairs[i].peer, 100);
    uint64_t sqes = statistics_of(mon).sqes;
    let_it_receive(mon, false);
    gather(mon, 0, 64);
    CHECK(statistics_of(mon).sqes ==
          sqes + 2 * MANY); /* the cancellations of receives and of polls for the end, nothing else */
    for (int i = 0; i < MANY; i++)
        check_complete(mon, pairs[i]);
    close_monitor(mon);
    for (int i = 0; i < MANY; i++)
        close_pair(pairs[i]);
}

static void streams_can_be_switched_off_and_on_while_data_flows(enum ul_kind kind) {
    enum { MANY = 10 };
    struct pair pairs[MANY];
    for (int i = 0; i < MANY; i++)
        pairs[i] = open_stream();
    ul_fdmon *mon = receiving_monitor(kind, pairs, MANY);
    for (int round = 0; round < 40; round++) {
        for (int i = 0; i < MANY; i++)
            feed(pairs[i].peer, 3000);
        if (round % 4 == 1)
            let_it_receive(mon, round % 8 == 1 ? false : true);
        gather(mon, 0, round % 3 ? 64 : 2);
    }
    for (int i = 0; i < MANY; i++)
        check_complete(mon, pairs[i]);
    CHECK(intakes[pairs[0].ours].data_events > 0 && intakes[pairs[0].ours].read_events > 0);
    let_it_receive(mon, false);
    gather(mon, 0, 64);
    int data_events = intakes[pairs[0].ours].data_events;
    feed(pairs[0].peer, 3000);
    check_complete(mon, pairs[0]);
    CHECK(intakes[pairs[0].ours].data_events == data_events);
    close_monitor(mon);
    for (int i = 0; i < MANY; i++)
        close_pair(pairs[i]);
}

static void what_is_forgotten_is_not_reported_for_the_next_file_of_that_number(enum ul_kind kind) {
    struct pair old = open_stream(), other = open_stream();
    ul_fdmon *mon = receiving_monitor(kind, (struct pair[]){old, other}, 2);
    int number = old.ours;
    for (int i = 0; i < 1500; i++) { /* more often than there are buffers */
        feed(old.peer, 5000);
        feed(other.peer, 100);
        ul_fdmon_turn(mon, 0, NULL, 0);
        feed(old.peer, 5000);
        CHECK(ul_fdmon_forget(mon, number) == 0);
        CHECK(statistics_of(mon).watches == 1);
        close_pair(old);
        old = open_stream();
        CHECK(old.ours == number);
        CHECK(receive(mon, number) == 0);
        feed(old.peer, 2 * (size_t)i + 1);
        check_complete(mon, old);
    }
    check_complete(mon, other);
    CHECK(ul_fdmon_forget(mon, number) == 0 && ul_fdmon_forget(mon, number) == 0);
    CHECK(ul_fdmon_forget(mon, -1) == 0 && ul_fdmon_forget(mon, 1000000) == 0);
    close(old.ours);
    CHECK(sees_end_of_file(old.peer, 0));
    close(old.peer);
    close_monitor(mon);
    CHECK(kind != UL_IO_URING || intakes[number].data_events > 0);
    close_pair(other);
}

/* More than a receive takes at once is there before it begins, and so is the end: nothing more will wake it. */
static void an_end_that_wakes_no_receive_is_found(enum ul_kind kind) {
    for (int way = 0; way < 3; way++) {
        ul_fdmon *mon = open_monitor(kind);
        struct pair pair = way == 2 ? open_tcp_stream() : open_stream();
        struct linger at_once = {.l_onoff = 1};
        feed(pair.peer, 70750);
        CHECK(way != 1 || shutdown(pair.peer, SHUT_WR) == 0);
        CHECK(way != 2 || setsockopt(pair.peer, SOL_SOCKET, SO_LINGER, &at_once, sizeof at_once) == 0);
        CHECK(way == 1 || close(pair.peer) == 0);
        CHECK(receive(mon, pair.ours) == 0);
        GATHER_UNTIL(mon, intakes[pair.ours].ends == 1);
        CHECK((way == 2 || intakes[pair.ours].bytes == 70750) && intakes[pair.ours].wrong == 0);
        CHECK(is_quiet(mon, 3 * MS));
        close_monitor(mon);
        close(pair.ours);
        CHECK(way != 1 || close(pair.peer) == 0);
    }
}

static void the_peer_sees_end_of_file_after_removal_and_close(enum ul_kind kind) {
    struct pair pair = open_stream();
    ul_fdmon *mon = receiving_monitor(kind, &pair, 1);
    CHECK(ul_fdmon_update(mon, pair.ours, 0) == 0);
    close(pair.ours);
    CHECK(sees_end_of_file(pair.peer, 0));
    CHECK(mon->requests_in_flight == 0);
    close_monitor(mon);
    close(pair.peer);
}

static void a_closed_descriptor_is_an_error_once(enum ul_kind kind) {
    ul_fdmon *mon = open_monitor(kind);
    struct pair pair = open_stream();
    CHECK(receive(mon, pair.ours) == 0);
    close_pair(pair);
    GATHER_UNTIL(mon, intakes[pair.ours].ends == 1);
    CHECK(intakes[pair.ours].end == -EBADF);
    CHECK(is_quiet(mon, 3 * MS));
    close_monitor(mon);
}

static void what_is_no_socket_is_watched_instead(enum ul_kind kind) {
    ul_fdmon *mon = open_monitor(kind);
    int fds[2];
    CHECK(pipe2(fds, O_NONBLOCK | O_CLOEXEC) == 0);
    CHECK(receive(mon, fds[0]) == 0);
    CHECK(is_quiet(mon, 1 * MS));
    put(fds[1]);
    CHECK(events_of(mon, fds[0], SOON) == UL_READ);
    CHECK(events_of(mon, fds[0], SOON) == UL_READ);
    take(fds[0]);
    gather(mon, 0, 64);
    CHECK(is_quiet(mon, 2 * MS));
    close_monitor(mon);
    close(fds[0]);
    close(fds[1]);
}

/* ---- buffers ---- */

static void more_data_than_buffers_arrives_all_the_same(enum ul_kind kind) {
    enum { MANY = 60 };
    static const int out_max[] = {64, 3};
    for (int round = 0; round < 2; round++) {
        struct pair pairs[MANY];
        for (int i = 0; i < MANY; i++)
            pairs[i] = open_stream();
        ul_fdmon *mon = receiving_monitor(kind, pairs, MANY);
        for (int i = 0; i < MANY; i++)
            CHECK(feed(pairs[i].peer, 100000) == 100000);
        int64_t until = now_ns() + SOON;
        for (int i = 0; i < MANY; i++)
            while (intakes[pairs[i].ours].bytes < fed[pairs[i].peer] && now_ns() < until)
                gather(mon, 1 * MS, out_max[round]);
        for (int i = 0; i < MANY; i++)
            check_complete(mon, pairs[i]);
        CHECK(is_quiet(mon, 2 * MS));
        for (int i = 0; i < MANY; i++)
            feed(pairs[i].peer, 1);
        for (int i = 0; i < MANY; i++)
            check_complete(mon, pairs[i]);
        close_monitor(mon);
        for (int i = 0; i < MANY; i++)
            close_pair(pairs[i]);
    }
}

static void a_kernel_that_found_no_buffer_gets_more(enum ul_kind kind) {
    enum { MANY = 200, FIRST = 128 };
    struct pair pairs[MANY];
    ul_event out[MANY];
    ul_fdmon *mon = open_monitor(kind);
    for (int round = 0; round < 2; round++) {
        for (int i = 0; i < MANY; i++) { /* armed and received by the same enter */
            pairs[i] = open_stream();
            feed(pairs[i].peer, 1);
            CHECK(receive(mon, pairs[i].ours) == 0);
        }
        CHECK(ul_fdmon_turn(mon, 0, out, MANY) == (round == 0 ? FIRST : MANY));
        for (int i = 0; i < MANY; i++) {
            CHECK(ul_fdmon_forget(mon, pairs[i].ours) == 0);
            close_pair(pairs[i]);
        }
    }
    close_monitor(mon);
}

static void data_stays_as_it_is_until_the_next_turn(enum ul_kind kind) {
    enum { MANY = 40 };
    struct pair pairs[MANY];
    for (int i = 0; i < MANY; i++)
        pairs[i] = open_stream();
    ul_fdmon *mon = receiving_monitor(kind, pairs, MANY);
    ul_event first[64], more[64];
    for (int i = 0; i < MANY; i++)
        feed(pairs[i].peer, 2000);
    int n = next_events(mon, first, 64, SOON);
    CHECK(n > 0);
    for (int i = 0; i < MANY; i++)
        feed(pairs[i].peer, 6000);
    for (int i = 0; i < MANY; i++) /* each removal enters, reaps and collects what the others receive */
        CHECK(ul_fdmon_update(mon, pairs[i].ours, 0) == 0);
    while (ul_fdmon_dispatch(mon, more, 64) > 0)
        ;
    for (int i = 0; i < n; i++) {
        const unsigned char *bytes = first[i].data;
        for (int k = 0; k < first[i].result; k++)
            intakes[first[i].fd].wrong += bytes[k] != byte_of((uint64_t)(1 + k));
        CHECK(first[i].events == UL_DATA && intakes[first[i].fd].wrong == 0);
    }
    close_monitor(mon);
    for (int i = 0; i < MANY; i++)
        close_pair(pairs[i]);
}

static long register_is_refused_with;
static long register_is_refused(void) { return register_is_refused_with; }

static void a_ring_that_may_not_have_buffers_reports_readiness(enum ul_kind kind) {
    static const int errnos[] = {ENOMEM, EINVAL, EPERM};
    for (int i = 0; i <= 3; i++) {
        believe_the_kernel();
        ul_fdmon *mon = open_monitor(kind);
        struct pair pairs[2] = {open_stream(), open_stream()};
        register_is_refused_with = i < 3 ? -errnos[i] : 0;
        on_register = i < 3 ? register_is_refused : NULL;
        mmap_fails = i == 3;
        for (int k = 0; k < 2; k++) {
            CHECK(receive(mon, pairs[k].ours) == 0);
            feed(pairs[k].peer, 5000);
            check_complete(mon, pairs[k]);
            CHECK(intakes[pairs[k].ours].read_events > 0 && intakes[pairs[k].ours].data_events == 0);
        }
        CHECK(register_calls <= 1 && monitor_is(mon, "io_uring"));
        mmap_fails = false;
        close_monitor(mon);
        close_pair(pairs[0]);
        close_pair(pairs[1]);
    }
    believe_the_kernel();
}

static void a_spare_ring_receives_for_its_next_monitor(enum ul_kind kind) {
    ul_ring *spare = NULL;
    for (int i = 0; i < 5; i++) {
        ul_fdmon *mon;
        ul_setup_info info;
        struct pair pair = open_stream();
        CHECK(ul_fdmon_new(kind, spare, &mon, &info) == 0);
        CHECK(receive(mon, pair.ours) == 0);
        feed(pair.peer, 5000);
        check_complete(mon, pair);
        CHECK(intakes[pair.ours].data_events > 0);
        feed(pair.peer, 5000); /* completed, and never asked for */
        spare = close_and_keep_ring(mon);
        CHECK(spare && !spare->buffer_ring);
        close(pair.ours);
        CHECK(is_hung_up(pair.peer));
        close(pair.peer);
    }
    ul_ring_free(spare);
}

/* ---- the ring is lost ---- */

struct states {
    struct pair pending, armed, fired, collected, ended, removed;
};

/* A stream in each state; of each, bytes have come in and bytes are on their way. */
static struct states open_states(ul_fdmon *mon) {
    struct states s = {open_stream(), open_stream(), open_stream(), open_stream(), open_stream(), open_stream()};
    const struct pair armed[] = {s.armed, s.fired, s.collected, s.ended, s.removed};
    for (int i = 0; i < 5; i++) {
        CHECK(receive(mon, armed[i].ours) == 0);
        feed(armed[i].peer, 3000);
        check_complete(mon, armed[i]);
    }
    feed(s.collected.peer, 5000);
    feed(s.removed.peer, 5000);
    shutdown(s.ended.peer, SHUT_WR);
    CHECK(ul_fdmon_turn(mon, 0, NULL, 0) == 0);
    CHECK(ul_fdmon_update(mon, s.removed.ours, 0) == 0);
    feed(s.removed.peer, 5000);
    feed(s.collected.peer, 5000);
    feed(s.fired.peer, 5000);
    CHECK(receive(mon, s.pending.ours) == 0);
    feed(s.pending.peer, 5000);
    return s;
}

static void check_that_no_byte_is_lost(ul_fdmon *mon, struct states *s) {
    feed(s->armed.peer, 5000);
    check_complete(mon, s->pending);
    check_complete(mon, s->armed);
    check_complete(mon, s->fired);
    check_complete(mon, s->collected);
    GATHER_UNTIL(mon, intakes[s->ended.ours].ends == 1);
    CHECK(intakes[s->ended.ours].bytes == 3000);
    CHECK(intakes[s->removed.ours].wrong == 0);
    CHECK(receive(mon, s->removed.ours) == 0);
    check_complete(mon, s->removed);
    CHECK(is_quiet(mon, 3 * MS));
    CHECK(intakes[s->ended.ours].ends == 1);
}

static void close_states(struct states *s) {
    close_pair(s->pending);
    close_pair(s->armed);
    close_pair(s->fired);
    close_pair(s->collected);
    close_pair(s->ended);
    close_pair(s->removed);
}

static long enter_is_denied(const struct enter_call *call) {
    (void)call;
    return -EPERM;
}

static long epoll_is_denied(void) { return -EFAULT; }

static void a_downgrade_loses_no_byte(enum ul_kind kind) {
    for (int to_poll = 0; to_poll < 2; to_poll++) {
        believe_the_kernel();
        ul_fdmon *mon = open_monitor(kind);
        struct states states = open_states(mon);
        on_enter = enter_is_denied;
        on_epoll_pwait2 = to_poll || kind == UL_EPOLL ? epoll_is_denied : NULL;
        check_that_no_byte_is_lost(mon, &states);
        CHECK(monitor_is(mon, on_epoll_pwait2 ? "poll" : "epoll"));
        close_monitor(mon);
        close_states(&states);
    }
    believe_the_kernel();
}

static long enter_works_and_fails(const struct enter_call *call) {
    real_enter(call);
    return -EBADR; /* "completions were lost": but not those that are there */
}

static void an_enter_that_fails_after_it_has_received_loses_no_byte(enum ul_kind kind) {
    believe_the_kernel();
    struct pair pair = open_stream();
    ul_fdmon *mon = receiving_monitor(kind, &pair, 1);
    feed(pair.peer, 5000);
    on_enter = enter_works_and_fails;
    check_complete(mon, pair);
    CHECK(monitor_is(mon, "epoll") && intakes[pair.ours].data_events > 1);
    close_monitor(mon);
    close_pair(pair);
    believe_the_kernel();
}

static void *check_in_thread(void *argument) {
    check_that_no_byte_is_lost(((void **)argument)[0], ((void **)argument)[1]);
    return NULL;
}

static void a_move_to_another_thread_loses_no_byte(enum ul_kind kind) {
    ul_fdmon *mon = open_monitor(kind);
    struct states states = open_states(mon);
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, check_in_thread, (void *[]){mon, &states}) == 0);
    pthread_join(thread, NULL);
    CHECK(statistics_of(mon).downgrades == 0);
    feed(states.armed.peer, 5000); /* and back, from a thread that has ended */
    check_complete(mon, states.armed);
    close_monitor(mon);
    close_states(&states);
}

static void *open_in_thread(void *argument) {
    *(struct states *)((void **)argument)[1] = open_states(((void **)argument)[0]);
    return NULL;
}

/* The kernel ends the requests of a thread that ends, and may complete some of them on the way. */
static void an_owner_that_ended_leaves_every_byte(enum ul_kind kind) {
    for (int i = 0; i < 10; i++) {
        ul_fdmon *mon = open_monitor(kind);
        struct states states;
        pthread_t thread;
        CHECK(pthread_create(&thread, NULL, open_in_thread, (void *[]){mon, &states}) == 0);
        pthread_join(thread, NULL);
        check_that_no_byte_is_lost(mon, &states);
        close_monitor(mon);
        close_states(&states);
    }
}

static void *wait_in_thread(void *argument) {
    CHECK(is_quiet(argument, 1 * MS));
    return NULL;
}

static void *receive_in_thread(void *argument) {
    struct pair pair = open_stream();
    CHECK(receive(argument, pair.ours) == 0);
    feed(pair.peer, 100);
    check_complete(argument, pair);
    CHECK(intakes[pair.ours].data_events == 1);
    CHECK(ul_fdmon_forget(argument, pair.ours) == 0);
    close_pair(pair);
    return NULL;
}

/* pthread_self() is given out again: the kernel's refusal to register is about the thread, not about buffers. */
static void a_thread_that_looks_like_the_owner_before_it_receives(enum ul_kind kind) {
    ul_fdmon *mon = open_monitor(kind);
    struct pair pair = open_stream();
    pthread_t threads[2];
    CHECK(ul_fdmon_update(mon, pair.ours, UL_READ) == 0);
    CHECK(pthread_create(&threads[0], NULL, wait_in_thread, mon) == 0);
    pthread_join(threads[0], NULL);
    CHECK(pthread_create(&threads[1], NULL, receive_in_thread, mon) == 0);
    CHECK(pthread_equal(threads[0], threads[1]));
    pthread_join(threads[1], NULL);
    close_monitor(mon);
    close_pair(pair);
}

static void wait_for_the_owner(ul_fdmon *mon) {
    for (bool waiting = false; !waiting;) {
        pthread_mutex_lock(&mon->lock);
        waiting = mon->waiting;
        pthread_mutex_unlock(&mon->lock);
    }
}

static void *remove_in_thread(void *argument) {
    ul_fdmon *mon = ((void **)argument)[0];
    wait_for_the_owner(mon);
    const struct pair *pair = ((void **)argument)[1];
    bool forgets = ((void **)argument)[2];
    CHECK((forgets ? ul_fdmon_forget(mon, pair->ours) : ul_fdmon_update(mon, pair->ours, 0)) == 0);
    feed(pair->peer, 5000); /* the owner, who waits, receives it: it has not heard of the removal */
    return NULL;
}

static void a_removal_by_another_thread_loses_no_byte_and_a_forgotten_stream_is_silent(enum ul_kind kind) {
    for (int forgets = 0; forgets < 2; forgets++) {
        struct pair pair = open_stream(), other = open_stream();
        ul_fdmon *mon = receiving_monitor(kind, (struct pair[]){pair, other}, 2);
        pthread_t thread;
        CHECK(pthread_create(&thread, NULL, remove_in_thread, (void *[]){mon, &pair, forgets ? mon : NULL}) == 0);
        for (int turns = 0; turns < 5; turns++)
            gather(mon, 20 * MS, 64);
        pthread_join(thread, NULL);
        gather(mon, 1 * MS, 64);
        feed(pair.peer, 5000);
        gather(mon, 1 * MS, 64);
        CHECK(intakes[pair.ours].wrong == 0);
        if (forgets)
            CHECK(intakes[pair.ours].bytes == 1);
        else
            CHECK(read_in(pair.ours, SIZE_MAX) && intakes[pair.ours].bytes == 10001 && intakes[pair.ours].wrong == 0);
        check_complete(mon, other);
        CHECK(mon->requests_dying == 0);
        close(pair.ours);
        CHECK(is_hung_up(pair.peer));
        close_monitor(mon);
        close(pair.peer);
        close_pair(other);
    }
}

static void *forget_in_thread(void *argument) {
    ul_fdmon *mon = ((void **)argument)[0];
    const struct pair *pair = ((void **)argument)[1];
    wait_for_the_owner(mon);
    CHECK(ul_fdmon_forget(mon, pair->ours) == 0);
    feed(pair->peer, 100000);
    return NULL;
}

static void what_a_forgotten_stream_still_brings_takes_no_buffer_away(enum ul_kind kind) {
    struct pair other = open_stream();
    ul_fdmon *mon = receiving_monitor(kind, &other, 1);
    for (int i = 0; i < 100; i++) {
        struct pair pair = open_stream();
        pthread_t thread;
        CHECK(receive(mon, pair.ours) == 0);
        gather(mon, 0, 64);
        CHECK(pthread_create(&thread, NULL, forget_in_thread, (void *[]){mon, &pair}) == 0);
        CHECK(gather(mon, SOON, 64) == 0 && intakes[pair.ours].bytes == 0);
        pthread_join(thread, NULL);
        close_pair(pair);
    }
    feed(other.peer, 100000);
    check_complete(mon, other);
    close_monitor(mon);
    close_pair(other);
}

static void a_child_reads_what_it_gets_and_the_parent_what_it_got(enum ul_kind kind) {
    struct pair pairs[2] = {open_stream(), open_stream()};
    ul_fdmon *mon = receiving_monitor(kind, pairs, 2);
    feed(pairs[0].peer, 5000);
    feed(pairs[1].peer, 5000);
    ul_fdmon_turn(mon, 0, NULL, 0);
    pid_t child = fork();
    if (child == 0) {
        ul_fdmon_after_fork_in_child(mon);
        struct pair own = open_stream();
        CHECK(receive(mon, own.ours) == 0);
        feed(own.peer, 5000);
        check_complete(mon, own);
        CHECK(intakes[pairs[0].ours].bytes <= 5001 && intakes[pairs[0].ours].wrong == 0);
        close_monitor(mon);
        _exit(checks_failed ? 1 : 0);
    }
    int status = 0;
    CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0);
    if (kind == UL_IO_URING) {
        check_complete(mon, pairs[0]);
        feed(pairs[1].peer, 5000);
        check_complete(mon, pairs[1]);
    }
    close_monitor(mon);
    close_pair(pairs[0]);
    close_pair(pairs[1]);
}

static void closing_the_monitor_lets_go_of_every_file(enum ul_kind kind) {
    struct pair pairs[2] = {open_stream(), open_stream()};
    ul_fdmon *mon = receiving_monitor(kind, pairs, 2);
    feed(pairs[1].peer, 5000);
    ul_fdmon_turn(mon, 0, NULL, 0);
    feed(pairs[1].peer, 5000);
    close_monitor(mon);
    for (int i = 0; i < 2; i++) {
        close(pairs[i].ours);
        CHECK(is_hung_up(pairs[i].peer));
        close(pairs[i].peer);
    }
}

/* ---- cost ---- */

static void a_thousand_messages_cost_a_thousandth_of_a_request_each(enum ul_kind kind) {
    enum { MANY = 10, ROUNDS = 100 };
    struct pair pairs[MANY];
    for (int i = 0; i < MANY; i++)
        pairs[i] = open_stream();
    ul_fdmon *mon = receiving_monitor(kind, pairs, MANY);
    ul_statistics before = statistics_of(mon);
    for (int round = 0; round < ROUNDS; round++) {
        for (int i = 0; i < MANY; i++)
            feed(pairs[i].peer, 1000);
        for (int i = 0; i < MANY; i++)
            check_complete(mon, pairs[i]);
    }
    ul_statistics after = statistics_of(mon);
    CHECK(after.sqes == before.sqes);
    CHECK(after.enters - before.enters <= 2 * ROUNDS);
    uint64_t enters = after.enters;
    for (int i = 0; i < 10; i++)
        CHECK(gather(mon, 0, 64) == 0); /* nothing queued, nothing there */
    CHECK(statistics_of(mon).enters == enters);
    close_monitor(mon);
    for (int i = 0; i < MANY; i++)
        close_pair(pairs[i]);
}

TESTS(TEST(what_is_written_is_reported_as_data, ON_IO_URING),
      TEST(where_it_cannot_be_received_readiness_is_reported, ON_EPOLL | ON_POLL),
      TEST(many_streams_of_all_sizes_arrive_in_order, ON_ALL), TEST(the_end_of_a_stream_comes_once_and_after_its_data, ON_ALL),
      TEST(an_end_that_waits_for_room_is_not_repeated, ON_IO_URING), TEST(a_reset_is_reported_as_an_error, ON_IO_URING),
      TEST(writing_is_watched_beside_receiving, ON_ALL),
      TEST(a_hang_up_seen_by_the_writer_is_not_readiness_to_read, ON_IO_URING),
      TEST(data_that_a_removed_watch_has_brought_is_reported_and_the_rest_stays_in_the_socket, ON_IO_URING),
      TEST(data_comes_before_the_readiness_that_takes_its_place, ON_IO_URING),
      TEST(readiness_that_was_collected_before_data_does_not_come_before_it, ON_ALL),
      TEST(readiness_that_was_collected_is_data_once_a_receive_is_armed, ON_IO_URING),
      TEST(a_poll_for_reading_waits_until_the_receive_has_ended, ON_IO_URING),
      TEST(streams_can_be_switched_off_and_on_while_data_flows, ON_IO_URING),
      TEST(what_is_forgotten_is_not_reported_for_the_next_file_of_that_number, ON_ALL),
      TEST(an_end_that_wakes_no_receive_is_found, ON_ALL), TEST(the_peer_sees_end_of_file_after_removal_and_close, ON_ALL),
      TEST(a_closed_descriptor_is_an_error_once, ON_IO_URING), TEST(what_is_no_socket_is_watched_instead, ON_ALL),
      TEST(more_data_than_buffers_arrives_all_the_same, ON_ALL), TEST(a_kernel_that_found_no_buffer_gets_more, ON_IO_URING),
      TEST(data_stays_as_it_is_until_the_next_turn, ON_IO_URING),
      TEST(a_ring_that_may_not_have_buffers_reports_readiness, ON_IO_URING),
      TEST(a_spare_ring_receives_for_its_next_monitor, ON_IO_URING), TEST(a_downgrade_loses_no_byte, ON_IO_URING | ON_EPOLL),
      TEST(an_enter_that_fails_after_it_has_received_loses_no_byte, ON_IO_URING),
      TEST(a_thread_that_looks_like_the_owner_before_it_receives, ON_IO_URING),
      TEST(a_move_to_another_thread_loses_no_byte, ON_ALL), TEST(an_owner_that_ended_leaves_every_byte, ON_ALL),
      TEST(a_removal_by_another_thread_loses_no_byte_and_a_forgotten_stream_is_silent, ON_IO_URING),
      TEST(what_a_forgotten_stream_still_brings_takes_no_buffer_away, ON_IO_URING),
      TEST(a_child_reads_what_it_gets_and_the_parent_what_it_got, ON_ALL),
      TEST(closing_the_monitor_lets_go_of_every_file, ON_ALL),
      TEST(a_thousand_messages_cost_a_thousandth_of_a_request_each, ON_IO_URING))

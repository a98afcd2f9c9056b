/* link: -Wl,--wrap=syscall */
/*
 * An echo server under every fault at once.
 *
 * Why it exists: each fault alone is tested where its answer is; what they do together nobody can list. Promise: whatever the
 * seed, each byte comes back once and in order; a seed that fails is printed, and UL_SEED=n build/c/test_faults runs it again,
 * exactly. UL_SEEDS=n runs so many.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdlib.h>

#include "faults.h"
#include "stream.h"

enum { CONNECTIONS = 8, STEPS = 400, FED_MAX = 150000 };

static unsigned char bytes[FED_MAX + 100000]; /* byte_of(0) ...: what is received and what is answered, at once */

struct connection {
    struct pair pair;
    uint64_t sent; /* of what was received, as far as is known */
    bool sending;
};

static struct connection connections[CONNECTIONS];
static ul_fdmon *mon;
static uint64_t trace; /* a sum of all that was reported */

static struct connection *connection_of(int fd) {
    for (int i = 0; i < CONNECTIONS; i++)
        if (connections[i].pair.ours == fd)
            return &connections[i];
    return NULL;
}

static void send_directly(struct connection *c) {
    uint64_t size = intakes[c->pair.ours].bytes - c->sent;
    ssize_t n = size ? send(c->pair.ours, bytes + c->sent, size, MSG_DONTWAIT | MSG_NOSIGNAL) : 0;
    CHECK(n >= 0 || errno == EAGAIN);
    c->sent += n > 0 ? (uint64_t)n : 0;
}

static void send_ended(struct connection *c, int32_t result) {
    CHECK(c->sending && (result >= 0 || result == -EAGAIN));
    c->sending = false;
    c->sent += result > 0 ? (uint64_t)result : 0;
    CHECK(c->sent <= intakes[c->pair.ours].bytes);
    if (result == -EAGAIN && chance(50))
        send_directly(c);
}

static void answer(struct connection *c) {
    struct iovec pieces[4];
    uint64_t left = intakes[c->pair.ours].bytes - c->sent, at = c->sent;
    int count = 0;
    if (c->sending || left == 0)
        return;
    while (count < 1 + (int)random_below(4) && left > 0) {
        uint32_t size = 1 + random_below((uint32_t)(left < 30000 ? left : 30000));
        pieces[count++] = (struct iovec){bytes + at, size};
        at += size;
        left -= size;
    }
    int ret = ul_fdmon_send(mon, c->pair.ours, pieces, count);
    c->sending = ret == 0;
    if (ret == -EOPNOTSUPP)
        send_directly(c);
    else
        CHECK(ret == 0);
}

static void take_reported(const ul_event *events, int n) {
    for (int i = 0; i < n; i++) {
        struct connection *c = connection_of(events[i].fd);
        trace = trace * 31 + (uint64_t)events[i].fd * 7 + events[i].events * 3 + (uint64_t)(int64_t)events[i].result;
        if (!CHECK(c))
            continue;
        struct intake *intake = &intakes[c->pair.ours];
        if (events[i].events == UL_SENT)
            send_ended(c, events[i].result);
        else if (events[i].events == UL_DATA && CHECK(events[i].result > 0))
            take_in(c->pair.ours, events[i].data, (size_t)events[i].result);
        else if (events[i].events & UL_READ && !(events[i].events & UL_DATA))
            read_in(c->pair.ours, 1 + random_below(20000));
        CHECK(intake->wrong == 0);
    }
}

static void turn(int out_max) {
    ul_event out[64];
    int n = ul_fdmon_turn(mon, 0, out, out_max);
    if (CHECK(n >= 0))
        take_reported(out, n & ~UL_DOWNGRADED);
}

static void dispatch_all(void) {
    ul_event out[64];
    for (int n; (n = ul_fdmon_dispatch(mon, out, 64)) > 0;)
        take_reported(out, n);
}

static void *turn_in_thread(void *argument) {
    turn(64);
    return argument;
}

static void turn_elsewhere(void) {
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, turn_in_thread, NULL) == 0);
    pthread_join(thread, NULL);
}

static void cancel(struct connection *c) {
    int ret = ul_fdmon_cancel_send(mon, c->pair.ours);
    if (c->sending)
        send_ended(c, ret);
    else
        CHECK(ret == -ENOENT);
}

/* The connection goes, with whatever is under way, and another one gets its number. */
static void replace(struct connection *c) {
    int number = c->pair.ours;
    CHECK(ul_fdmon_forget(mon, number) == 0);
    close_pair(c->pair);
    *c = (struct connection){.pair = open_stream()};
    if (c->pair.peer == number) /* a ring that is gone has left smaller ones */
        c->pair = (struct pair){c->pair.peer, c->pair.ours};
    if (c->pair.ours == number)
        return;
    CHECK(dup3(c->pair.ours, number, O_CLOEXEC) == number);
    close(c->pair.ours);
    c->pair.ours = number;
    intakes[number] = (struct intake){0};
    fed[number] = 0;
}

static void watch(struct connection *c) {
    static const uint32_t ways[] = {
        UL_READ | UL_RECV, UL_READ | UL_RECV, UL_READ | UL_RECV | UL_WRITE, UL_READ, UL_READ | UL_WRITE | UL_ONCE, 0};
    CHECK(ul_fdmon_update(mon, c->pair.ours, ways[random_below(6)]) == 0);
    if (chance(30)) { /* what was brought, and then what is left */
        dispatch_all();
        if (mon->watches[c->pair.ours].receive == 0 && !(mon->watches[c->pair.ours].events & UL_RECV))
            read_in(c->pair.ours, 1 + random_below(3000));
    }
}

/* A host's; the times are years ahead, so that a seed stays a run. */
static void prepare(void) {
    ul_host_fd fds[CONNECTIONS + 2];
    uint64_t version;
    CHECK(ul_fdmon_host_fds(mon, fds, CONNECTIONS + 2, &version) > 0);
    CHECK(ul_fdmon_prepare(mon, chance(20) ? -1 : INT64_MAX / 2 - random_below(1000000)) >= 0);
}

static void step(void) {
    struct connection *c = &connections[random_below(CONNECTIONS)];
    uint32_t what = random_below(100);
    if (what < 30 && fed[c->pair.peer] < FED_MAX)
        feed(c->pair.peer, 1 + random_below(chance(20) ? 30000 : 500));
    else if (what < 45)
        read_in(c->pair.peer, 1 + random_below(30000));
    else if (what < 70)
        turn((int)random_below(chance(20) ? 3 : 64));
    else if (what < 85)
        answer(c);
    else if (what < 89)
        cancel(c);
    else if (what < 96)
        watch(c);
    else if (what < 97 && chance(50))
        dispatch_all();
    else if (what < 97)
        prepare();
    else if (what < 98)
        let_it_receive(mon, chance(80));
    else if (what < 99)
        replace(c);
    else if (chance(50))
        turn_elsewhere();
    else if (chance(5))
        faults.denied = -EPERM, faults.counts[DENIED]++;
    CHECK(intakes[c->pair.peer].wrong == 0 && intakes[c->pair.ours].wrong == 0);
}

static bool is_complete(const struct connection *c) {
    uint64_t all = fed[c->pair.peer];
    return intakes[c->pair.ours].bytes == all && c->sent == all && intakes[c->pair.peer].bytes == all;
}

/* The mood passes: everything arrives, and nothing more. */
static void finish(void) {
    end_faults();
    for (int i = 0; i < CONNECTIONS; i++)
        CHECK(ul_fdmon_update(mon, connections[i].pair.ours, UL_READ | UL_RECV) == 0);
    bool complete = false;
    for (int turns = 0; turns < 20000 && !complete; turns++) {
        turn(64);
        complete = true;
        for (int i = 0; i < CONNECTIONS; i++) {
            answer(&connections[i]);
            read_in(connections[i].pair.peer, SIZE_MAX);
            complete &= is_complete(&connections[i]);
        }
    }
    for (int i = 0; i < CONNECTIONS; i++)
        CHECK(is_complete(&connections[i]) && intakes[connections[i].pair.peer].wrong == 0 && !connections[i].sending);
    turn(64);
    CHECK(is_quiet(mon, 1 * MS));
    if (mon->hosted) {
        prepare();
        CHECK(ul_fdmon_prepare(mon, -1) == 0);
    }
}

static bool run_seed(enum ul_kind kind, uint64_t seed) {
    int failed_before = checks_failed;
    begin_faults(seed);
    trace = 0;
    mon = open_monitor(kind);
    faults.mon = mon;
    for (int i = 0; i < CONNECTIONS; i++) {
        connections[i] = (struct connection){.pair = open_stream()};
        CHECK(ul_fdmon_update(mon, connections[i].pair.ours, UL_READ | UL_RECV) == 0);
    }
    for (int i = 0; i < STEPS && checks_failed == failed_before; i++)
        step();
    finish();
    close_monitor(mon);
    for (int i = 0; i < CONNECTIONS; i++)
        close_pair(connections[i].pair);
    believe_the_kernel();
    faults.mon = NULL;
    if (checks_failed != failed_before)
        fprintf(stderr, "seed %llu failed: run UL_SEED=%llu build/c/test_faults\n", (unsigned long long)seed,
                (unsigned long long)seed);
    return checks_failed == failed_before;
}

static uint64_t number_from(const char *name, uint64_t otherwise) {
    const char *text = getenv(name);
    return text ? strtoull(text, NULL, 10) : otherwise;
}

static void an_echo_server_answers_every_byte_whatever_the_seed(enum ul_kind kind) {
    for (size_t i = 0; i < sizeof bytes; i++)
        bytes[i] = byte_of(i);
    uint64_t only = number_from("UL_SEED", 0), last = only ? only : number_from("UL_SEEDS", kind == UL_IO_URING ? 300 : 30);
    alarm(only || getenv("UL_SEEDS") ? 0 : 60);
    for (uint64_t seed = only ? only : 1; seed <= last && run_seed(kind, seed); seed++)
        ;
    if (kind != UL_IO_URING || only)
        return;
    for (int fault = LOST_MORE; fault <= DENIED; fault++)
        CHECK(faults.counts[fault] > 0); /* each kind of fault has struck */
}

static void the_same_seed_is_the_same_run(enum ul_kind kind) {
    for (uint64_t seed = 1; seed <= 20; seed++) {
        run_seed(kind, seed);
        uint64_t first = trace;
        run_seed(kind, seed);
        CHECK(trace == first);
    }
}

TESTS(TEST(an_echo_server_answers_every_byte_whatever_the_seed, ON_ALL), TEST(the_same_seed_is_the_same_run, ON_ALL))

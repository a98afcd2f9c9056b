/* link: -Wl,--wrap=malloc,--wrap=calloc,--wrap=realloc */
/*
 * No memory: a call fails with -ENOMEM and nothing else happens.
 *
 * Why it exists: every allocation can fail, and the state after it is the one nobody sees. Promise: each allocation of a scenario
 * fails once, alone and together with all that follow; afterwards every watch that was accepted is reported, on the same monitor.
 */
#define _GNU_SOURCE
#include <stdlib.h>

#include "support.h"

void *__real_malloc(size_t size);
void *__wrap_malloc(size_t size);
void *__real_calloc(size_t count, size_t size);
void *__wrap_calloc(size_t count, size_t size);
void *__real_realloc(void *old, size_t size);
void *__wrap_realloc(void *old, size_t size);

static int allocations_left = -1; /* until they fail; negative: they never do */
static int failures_left, failed_allocations;

static bool fails(void) {
    if (allocations_left < 0 || allocations_left-- > 0)
        return false;
    allocations_left = failures_left-- > 1 ? 0 : -1;
    failed_allocations++;
    errno = ENOMEM;
    return true;
}

void *__wrap_malloc(size_t size) { return fails() ? NULL : __real_malloc(size); }
void *__wrap_calloc(size_t count, size_t size) { return fails() ? NULL : __real_calloc(count, size); }
void *__wrap_realloc(void *old, size_t size) { return fails() ? NULL : __real_realloc(old, size); }

static void fail_from(int allocation, int times) {
    allocations_left = allocation;
    failures_left = times;
    failed_allocations = 0;
}

static void fail_no_more(void) { allocations_left = -1; }

enum { WATCHES = 300, FOR_EVER = 1000000 };

static int fds[WATCHES];
static bool accepted[WATCHES];
static ul_event out[2 * WATCHES];

static void open_descriptors_of(int file) {
    for (int i = 0; i < WATCHES; i++)
        fds[i] = dup_cloexec(file);
}

static void close_all(void) {
    for (int i = 0; i < WATCHES; i++)
        close(fds[i]);
}

/* Every accepted watch is reported, none that was refused, and the monitor is the one it was. */
static void check_the_accepted(ul_fdmon *mon, const char *name) {
    int reports[4 * WATCHES] = {0};
    uint64_t count = 0;
    for (int i = 0; i < WATCHES; i++)
        count += accepted[i];
    CHECK(statistics_of(mon).watches == count);
    for (int turns = 0; turns < 3; turns++) {
        int n = next_events(mon, out, 2 * WATCHES, count ? 200 * MS : 1);
        CHECK(n == (int)count);
        for (int i = 0; i < n; i++)
            reports[out[i].fd]++;
    }
    for (int i = 0; i < WATCHES; i++)
        CHECK((reports[fds[i]] > 0) == accepted[i]);
    CHECK(monitor_is(mon, name) && statistics_of(mon).downgrades == 0);
}

static const char *name_of(enum ul_kind kind) { return kind == UL_IO_URING ? "io_uring" : kind == UL_EPOLL ? "epoll" : "poll"; }

static void a_monitor_that_cannot_be_made_leaves_nothing_behind(enum ul_kind kind) {
    for (int allocation = 0, failed = 1; failed; allocation++) {
        ul_fdmon *mon = NULL;
        ul_setup_info info;
        fail_from(allocation, FOR_EVER);
        int ret = ul_fdmon_new(kind, NULL, &mon, &info);
        fail_no_more();
        failed = failed_allocations;
        CHECK(ret == (failed ? -ENOMEM : 0));
        CHECK((mon != NULL) == (ret == 0));
        if (ret == 0)
            close_monitor(mon);
    }
}

static void a_spare_ring_is_freed_when_its_next_monitor_cannot_be_made(enum ul_kind kind) {
    ul_fdmon *mon = open_monitor(kind);
    ul_setup_info info;
    ul_ring *spare = close_and_keep_ring(mon);
    CHECK(spare != NULL);
    fail_from(0, 1);
    CHECK(ul_fdmon_new(kind, spare, &mon, &info) == -ENOMEM);
    fail_no_more();
}

static void a_ring_without_memory_falls_back(enum ul_kind kind) {
    ul_fdmon *mon = NULL;
    ul_setup_info info;
    fail_from(1, 1); /* the monitor itself is allocated, its ring is not */
    CHECK(ul_fdmon_new(UL_AUTO, NULL, &mon, &info) == 0);
    fail_no_more();
    CHECK(strcmp(info.name, name_of(kind)) == 0 && info.refused_errno == ENOMEM && info.refused_step);
    close_monitor(mon);
}

static void a_watch_that_finds_no_memory_is_refused_and_the_others_stay(enum ul_kind kind) {
    int ready = eventfd(1, EFD_CLOEXEC | EFD_NONBLOCK);
    open_descriptors_of(ready);
    for (int always = 0; always <= 1; always++) {
        for (int allocation = 0, failed = 1; failed; allocation++) {
            ul_fdmon *mon = open_monitor(kind);
            fail_from(allocation, always ? FOR_EVER : 1);
            for (int i = 0; i < WATCHES; i++) {
                int ret = ul_fdmon_update(mon, fds[i], UL_READ);
                CHECK(ret == 0 || (ret == -ENOMEM && failed_allocations));
                accepted[i] = ret == 0;
            }
            fail_no_more();
            failed = failed_allocations;
            check_the_accepted(mon, name_of(kind));
            for (int i = 0; i < WATCHES; i++) { /* the refused ones can be had now */
                CHECK(accepted[i] || ul_fdmon_update(mon, fds[i], UL_READ) == 0);
                accepted[i] = true;
            }
            check_the_accepted(mon, name_of(kind));
            close_monitor(mon);
        }
    }
    close_all();
    close(ready);
}

static void removing_needs_no_memory(enum ul_kind kind) {
    struct pair pair = open_pair();
    ul_fdmon *mon = open_monitor(kind);
    open_descriptors_of(pair.ours);
    for (int i = 0; i < WATCHES; i++)
        CHECK(ul_fdmon_update(mon, fds[i], UL_READ) == 0);
    CHECK(ul_fdmon_turn(mon, 0, out, 1) == 0);
    fail_from(0, FOR_EVER);
    for (int i = 0; i < WATCHES; i++)
        CHECK(ul_fdmon_update(mon, fds[i], 0) == 0);
    CHECK(ul_fdmon_update(mon, 100000, 0) == 0); /* never watched: nothing to remove */
    fail_no_more();
    CHECK(statistics_of(mon).watches == 0);
    close_all();
    close(pair.ours);
    CHECK(sees_end_of_file(pair.peer, 0));
    close_monitor(mon);
    close(pair.peer);
}

static void a_turn_that_finds_no_memory_says_so_and_the_next_one_works(enum ul_kind kind) {
    int ready = eventfd(1, EFD_CLOEXEC | EFD_NONBLOCK);
    open_descriptors_of(ready);
    for (int always = 0; always <= 1; always++) {
        for (int allocation = 0, failed = 1; failed; allocation++) {
            ul_fdmon *mon = open_monitor(kind);
            for (int i = 0; i < WATCHES; i++)
                accepted[i] = ul_fdmon_update(mon, fds[i], UL_READ) == 0;
            fail_from(allocation, always ? FOR_EVER : 1);
            for (int turns = 0; turns < 3; turns++) {
                int n = ul_fdmon_turn(mon, 1 * MS, out, 2 * WATCHES);
                CHECK((n >= 0 && !(n & UL_DOWNGRADED)) || (n == -ENOMEM && failed_allocations));
            }
            fail_no_more();
            failed = failed_allocations;
            check_the_accepted(mon, name_of(kind));
            close_monitor(mon);
        }
    }
    close_all();
    close(ready);
}

static void receiving_that_finds_no_memory_becomes_readiness(enum ul_kind kind) {
    for (int always = 0; always <= 1; always++) {
        for (int allocation = 0, failed = 1; failed; allocation++) {
            ul_fdmon *mon = open_monitor(kind);
            struct pair pair = open_pair();
            put(pair.peer);
            CHECK(ul_fdmon_update(mon, pair.ours, UL_READ) == 0);
            CHECK(next_events(mon, out, 8, SOON) == 1);
            fail_from(allocation, always ? FOR_EVER : 1);
            CHECK(ul_fdmon_update(mon, pair.ours, UL_READ | UL_RECV) == 0);
            int n = next_events(mon, out, 8, SOON);
            CHECK(n == 1 && out[0].events == (failed_allocations ? UL_READ : UL_DATA));
            CHECK(failed_allocations || *(const char *)out[0].data == 'x');
            fail_no_more();
            failed = failed_allocations;
            CHECK(monitor_is(mon, name_of(kind)) && statistics_of(mon).downgrades == 0);
            close_monitor(mon);
            close_pair(pair);
        }
    }
}

static void a_send_that_finds_no_memory_is_refused(enum ul_kind kind) {
    ul_fdmon *mon = open_monitor(kind);
    struct pair pairs[100];
    for (int i = 0; i < 100; i++) {
        pairs[i] = open_pair();
        fail_from(0, FOR_EVER);
        int ret = ul_fdmon_send(mon, pairs[i].ours, &(struct iovec){"x", 1}, 1);
        fail_no_more();
        CHECK(ret == -ENOMEM && failed_allocations == 1);
        for (int allocation = 0; ret < 0; allocation++) {
            fail_from(allocation, 1);
            ret = ul_fdmon_send(mon, pairs[i].ours, &(struct iovec){"x", 1}, 1);
            fail_no_more();
            CHECK(ret == 0 || ret == -ENOMEM);
        }
    }
    for (int sent = 0, turns = 0; sent < 100 && turns < 100; turns++)
        sent += ul_fdmon_turn(mon, 0, out, 2 * WATCHES);
    for (int i = 0; i < 100; i++) {
        take(pairs[i].peer);
        close_pair(pairs[i]);
    }
    close_monitor(mon);
}

static void closing_needs_no_memory(enum ul_kind kind) {
    struct pair pair = open_pair();
    ul_fdmon *mon = open_monitor(kind);
    CHECK(ul_fdmon_update(mon, pair.ours, UL_READ) == 0);
    CHECK(ul_fdmon_turn(mon, 0, out, 1) == 0);
    fail_from(0, FOR_EVER);
    close_monitor(mon);
    fail_no_more();
    close(pair.ours);
    CHECK(sees_end_of_file(pair.peer, 0));
    close(pair.peer);
}

TESTS(TEST(a_monitor_that_cannot_be_made_leaves_nothing_behind, ON_ALL),
      TEST(a_spare_ring_is_freed_when_its_next_monitor_cannot_be_made, ON_IO_URING),
      TEST(a_ring_without_memory_falls_back, ON_EPOLL),
      TEST(a_watch_that_finds_no_memory_is_refused_and_the_others_stay, ON_ALL), TEST(removing_needs_no_memory, ON_ALL),
      TEST(a_turn_that_finds_no_memory_says_so_and_the_next_one_works, ON_ALL),
      TEST(receiving_that_finds_no_memory_becomes_readiness, ON_IO_URING),
      TEST(a_send_that_finds_no_memory_is_refused, ON_IO_URING), TEST(closing_needs_no_memory, ON_ALL))

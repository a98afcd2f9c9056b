/* link: -Wl,--wrap=syscall,--wrap=mmap,--wrap=madvise,--wrap=epoll_create1 */
/*
 * Setting up: the ladder, refusals, liars, and the fall to epoll and poll.
 *
 * Why it exists: most production machines refuse io_uring, each in its own way. Promise: every refusal ends in a monitor that
 * works (or, when io_uring was demanded, in an error) and names the step and the errno.
 */
#define _GNU_SOURCE
#include <sys/mman.h>

#include "fake_kernel.h"

void *__real_mmap(void *address, size_t size, int protection, int flags, int fd, off_t offset);
void *__wrap_mmap(void *address, size_t size, int protection, int flags, int fd, off_t offset);
int __real_madvise(void *address, size_t size, int advice);
int __wrap_madvise(void *address, size_t size, int advice);
int __real_epoll_create1(int flags);
int __wrap_epoll_create1(int flags);

static int mmap_fails_at, mmap_calls, madvise_errno, epoll_create1_errno;

void *__wrap_mmap(void *address, size_t size, int protection, int flags, int fd, off_t offset) {
    if (++mmap_calls == mmap_fails_at) {
        errno = ENOMEM;
        return MAP_FAILED;
    }
    return __real_mmap(address, size, protection, flags, fd, offset);
}

int __wrap_madvise(void *address, size_t size, int advice) {
    if (!madvise_errno)
        return __real_madvise(address, size, advice);
    errno = madvise_errno;
    return -1;
}

int __wrap_epoll_create1(int flags) {
    if (!epoll_create1_errno)
        return __real_epoll_create1(flags);
    errno = epoll_create1_errno;
    return -1;
}

static long refusal; /* what on_setup answers ... */
static int refusals; /* ... this many times */
static uint32_t flags_seen[16], entries_seen[16], cq_entries_seen[16];

static long refuse_setup(unsigned entries, struct ul_params *params) {
    int call = setup_calls - 1;
    if (call < 16) {
        flags_seen[call] = params->flags;
        entries_seen[call] = entries;
        cq_entries_seen[call] = params->cq_entries;
    }
    return call < refusals ? refusal : real_setup(entries, params);
}

static void refuse(int err, int times) {
    believe_the_kernel();
    refusal = -err;
    refusals = times;
    on_setup = refuse_setup;
}

static void check_that_it_works(ul_fdmon *mon) {
    struct pair pair = open_pair();
    CHECK(ul_fdmon_update(mon, pair.ours, UL_READ) == 0);
    CHECK(is_quiet(mon, 1 * MS));
    put(pair.peer);
    CHECK(events_of(mon, pair.ours, SOON) == UL_READ);
    take(pair.ours);
    CHECK(is_quiet(mon, 1 * MS));
    CHECK(ul_fdmon_update(mon, pair.ours, 0) == 0);
    close_pair(pair);
}

/* An automatic monitor must fall back to this one and say why; a demanded ring must be refused for the same reason. */
static void check_fallback(const char *name, const char *step, int err) {
    ul_fdmon *mon = NULL;
    ul_setup_info info;
    int calls_before = setup_calls;
    CHECK(ul_fdmon_new(UL_AUTO, NULL, &mon, &info) == 0);
    CHECK(strcmp(info.name, name) == 0);
    CHECK(info.refused_step && strcmp(info.refused_step, step) == 0);
    CHECK(info.refused_errno == err);
    CHECK(info.sq_entries == 0 && info.ring_features == 0);
    int calls = setup_calls - calls_before;
    check_that_it_works(mon);
    CHECK(setup_calls - calls_before == calls);
    CHECK(statistics_of(mon).downgrades == 0);
    close_monitor(mon);

    setup_calls = mmap_calls = 0;
    mon = NULL;
    CHECK(ul_fdmon_new(UL_IO_URING, NULL, &mon, &info) == -err);
    CHECK(mon == NULL && info.refused_errno == err && info.refused_step && strcmp(info.refused_step, step) == 0);
}

/* ---- the ladder ---- */

static void a_kernel_before_6_6_gets_the_second_set_of_flags(enum ul_kind kind) {
    refuse(EINVAL, 1);
    ul_fdmon *mon = open_monitor(kind);
    CHECK(setup_calls == 2);
    CHECK((flags_seen[0] & UL_SETUP_NO_SQARRAY) && !(flags_seen[1] & UL_SETUP_NO_SQARRAY));
    CHECK((flags_seen[0] ^ flags_seen[1]) == UL_SETUP_NO_SQARRAY);
    CHECK((flags_seen[1] & UL_SETUP_SINGLE_ISSUER) && (flags_seen[1] & UL_SETUP_DEFER_TASKRUN));
    CHECK(info_of(mon).ring_setup_flags == flags_seen[1] && info_of(mon).refused_step == NULL);
    check_that_it_works(mon);
    close_monitor(mon);
    believe_the_kernel();
}

static void a_kernel_before_6_1_is_left_for_epoll_after_two_tries(enum ul_kind kind) {
    (void)kind;
    refuse(EINVAL, 1000);
    check_fallback("epoll", "io_uring_setup", EINVAL);
    CHECK(setup_calls == 2);
    believe_the_kernel();
}

static void an_interrupted_set_up_is_tried_again(enum ul_kind kind) {
    static const int passing[] = {EAGAIN, EINTR};
    for (int i = 0; i < 2; i++) {
        refuse(passing[i], 1);
        ul_fdmon *mon = open_monitor(kind);
        CHECK(setup_calls == 2 && flags_seen[0] == flags_seen[1]);
        check_that_it_works(mon);
        close_monitor(mon);
        refuse(passing[i], 1000);
        check_fallback("epoll", "io_uring_setup", passing[i]);
        CHECK(setup_calls == 2);
    }
    believe_the_kernel();
}

static void every_other_errno_means_epoll_at_once(enum ul_kind kind) {
    (void)kind;
    static const int errnos[] = {EPERM, ENOSYS, EACCES, EOPNOTSUPP, EMFILE, ENFILE, ENODEV, EFAULT, E2BIG, EIO, ENOSPC};
    for (size_t i = 0; i < sizeof errnos / sizeof errnos[0]; i++) {
        refuse(errnos[i], 1000);
        check_fallback("epoll", "io_uring_setup", errnos[i]);
        CHECK(setup_calls == 1);
    }
    believe_the_kernel();
}

static void short_memory_gets_a_smaller_ring(enum ul_kind kind) {
    for (int times = 1; times <= 4; times++) {
        refuse(ENOMEM, times);
        ul_fdmon *mon = open_monitor(kind);
        CHECK(setup_calls == times + 1 && monitor_is(mon, "io_uring"));
        CHECK(entries_seen[0] == 256 && cq_entries_seen[0] == 4096);
        CHECK(entries_seen[times] == 64 && cq_entries_seen[times] == 256);
        CHECK(info_of(mon).sq_entries == 64 && info_of(mon).cq_entries == 256);
        check_that_it_works(mon);
        close_monitor(mon);
    }
    believe_the_kernel();
}

static void no_memory_is_waited_for_fifty_milliseconds_at_most_and_never_remembered(enum ul_kind kind) {
    refuse(ENOMEM, 1000);
    ul_fdmon *mon;
    ul_setup_info info;
    int64_t start = now_ns();
    CHECK(ul_fdmon_new(UL_AUTO, NULL, &mon, &info) == 0);
    int64_t took = now_ns() - start;
    CHECK(took >= 10 * MS && took < 300 * MS); /* asked for: 31.5 ms; the rest is a busy machine's */
    CHECK(setup_calls <= 9);
    CHECK(strcmp(info.name, "epoll") == 0 && info.refused_errno == ENOMEM);
    check_that_it_works(mon);
    close_monitor(mon);
    refuse(ENOMEM, 1000);
    CHECK(ul_fdmon_new(UL_IO_URING, NULL, &mon, &info) == -ENOMEM);
    believe_the_kernel();
    mon = open_monitor(kind);
    CHECK(info_of(mon).cq_entries == 4096);
    close_monitor(mon);
}

static void a_thousand_watches_work_on_the_smallest_ring(enum ul_kind kind) {
    enum { MANY = 1000 };
    static ul_event out[2 * MANY];
    refuse(ENOMEM, 1);
    ul_fdmon *mon = open_monitor(kind);
    int ready = eventfd(1, EFD_CLOEXEC | EFD_NONBLOCK), fds[MANY];
    for (int i = 0; i < MANY; i++)
        CHECK(ul_fdmon_update(mon, fds[i] = dup_cloexec(ready), UL_READ) == 0);
    for (int i = 0; i < 3; i++)
        CHECK(next_events(mon, out, 2 * MANY, SOON) == MANY);
    for (int i = 0; i < MANY; i++)
        close(fds[i]);
    close_monitor(mon);
    close(ready);
    believe_the_kernel();
}

/* ---- kernels that lack something, and liars ---- */

static uint32_t missing_feature;

static long setup_without_feature(unsigned entries, struct ul_params *params) {
    long fd = real_setup(entries, params);
    params->features &= ~missing_feature;
    return fd;
}

static void a_missing_feature_is_a_refusal(enum ul_kind kind) {
    (void)kind;
    static const uint32_t needed[] = {UL_FEAT_SINGLE_MMAP, UL_FEAT_NODROP, UL_FEAT_SUBMIT_STABLE, UL_FEAT_EXT_ARG};
    for (size_t i = 0; i < sizeof needed / sizeof needed[0]; i++) {
        believe_the_kernel();
        missing_feature = needed[i];
        on_setup = setup_without_feature;
        check_fallback("epoll", "io_uring features", EOPNOTSUPP);
    }
    believe_the_kernel();
}

static void a_missing_optional_feature_is_not(enum ul_kind kind) {
    believe_the_kernel();
    missing_feature = UL_FEAT_NO_IOWAIT;
    on_setup = setup_without_feature;
    ul_fdmon *mon = open_monitor(kind);
    CHECK(mon->ring->enter_flags == 0);
    check_that_it_works(mon);
    close_monitor(mon);
    believe_the_kernel();
}

static void pretend(struct ul_params *params) {
    params->sq_entries = 256;
    params->cq_entries = 4096;
    params->features = ~0U;
    params->sq_off = (struct ul_sqring_offsets){.tail = 4, .ring_mask = 16, .flags = 36, .array = 65600};
    params->cq_off = (struct ul_cqring_offsets){.head = 8, .tail = 12, .ring_mask = 20, .overflow = 44, .cqes = 64};
}

static long setup_of_zeroes(unsigned entries, struct ul_params *params) {
    (void)entries;
    (void)params;
    return open("/dev/null", O_RDWR | O_CLOEXEC);
}

static long setup_that_cannot_be_mapped(unsigned entries, struct ul_params *params) {
    (void)entries;
    pretend(params);
    return open("/dev/null", O_RDWR | O_CLOEXEC);
}

static long setup_in_plain_memory(unsigned entries, struct ul_params *params) {
    (void)entries;
    pretend(params);
    int fd = memfd_create("not a ring", MFD_CLOEXEC);
    CHECK(ftruncate(fd, 0x10000000 + 65536) == 0);
    CHECK(pwrite(fd, &(uint32_t){255}, 4, 16) == 4 && pwrite(fd, &(uint32_t){4095}, 4, 20) == 4);
    return fd;
}

static long enter_and_claim_success(const struct enter_call *call) { return call->to_submit; }
static long enter_and_claim_nothing(const struct enter_call *call) {
    (void)call;
    return 0;
}
static long enter_and_time_out(const struct enter_call *call) {
    (void)call;
    return -ETIME;
}
static long enter_denied(const struct enter_call *call) {
    (void)call;
    return -ENOSYS;
}

static void a_dummy_descriptor_is_no_ring(enum ul_kind kind) {
    (void)kind;
    believe_the_kernel();
    on_setup = setup_of_zeroes;
    check_fallback("epoll", "io_uring features", EOPNOTSUPP);
    on_setup = setup_that_cannot_be_mapped;
    check_fallback("epoll", "mmap of the io_uring", ENODEV);
    believe_the_kernel();
}

static void an_enter_that_does_nothing_is_found_out_in_bounded_time(enum ul_kind kind) {
    (void)kind;
    static long (*const liars[])(const struct enter_call *) = {enter_and_claim_success, enter_and_claim_nothing,
                                                               enter_and_time_out};
    for (int in_memory = 0; in_memory <= 1; in_memory++) {
        for (size_t i = 0; i < sizeof liars / sizeof liars[0]; i++) {
            believe_the_kernel();
            on_setup = in_memory ? setup_in_plain_memory : NULL;
            on_enter = liars[i];
            int64_t start = now_ns();
            check_fallback("epoll", "io_uring self-test", EOPNOTSUPP);
            CHECK(now_ns() - start < SOON && enter_calls < 100);
        }
    }
    believe_the_kernel();
}

static void an_enter_that_is_denied_is_a_refusal_with_its_errno(enum ul_kind kind) {
    (void)kind;
    believe_the_kernel();
    on_enter = enter_denied;
    check_fallback("epoll", "io_uring self-test", ENOSYS);
    CHECK(enter_calls == 2);
    believe_the_kernel();
}

static ul_ring_counts counts;

/* Lets the first poll through and submits nothing after it, so that the cancellation never comes. */
static long enter_that_never_cancels(const struct enter_call *call) {
    struct enter_call altered = *call;
    if (call->to_submit > 1) {
        altered.to_submit = 0;
        altered.min_complete = 0;
        real_enter(&altered);
        return call->to_submit;
    }
    altered.to_submit = call->to_submit;
    altered.min_complete = 0;
    return real_enter(&altered);
}

static void a_ring_that_does_not_cancel_is_refused(enum ul_kind kind) {
    (void)kind;
    believe_the_kernel();
    on_enter = enter_that_never_cancels;
    ul_ring ring;
    const char *step;
    CHECK(ul_ring_open(&ring, 8, 64, &counts, &step) == -EOPNOTSUPP);
    CHECK(strcmp(step, "io_uring self-test") == 0 && ring.fd == -1);
    believe_the_kernel();
}

static void a_mapping_that_fails_is_a_refusal_that_leaks_nothing(enum ul_kind kind) {
    (void)kind;
    for (mmap_fails_at = 1; mmap_fails_at <= 2; mmap_fails_at++) {
        believe_the_kernel();
        mmap_calls = 0;
        check_fallback("epoll", "mmap of the io_uring", ENOMEM);
    }
    mmap_fails_at = 0;
    madvise_errno = EINVAL;
    check_fallback("epoll", "mmap of the io_uring", EINVAL);
    madvise_errno = 0;
}

/* ---- the floor ---- */

static void without_epoll_too_there_is_poll(enum ul_kind kind) {
    (void)kind;
    refuse(EPERM, 1000);
    epoll_create1_errno = EMFILE;
    check_fallback("poll", "io_uring_setup", EPERM);
    ul_fdmon *mon = NULL;
    ul_setup_info info;
    CHECK(ul_fdmon_new(UL_EPOLL, NULL, &mon, &info) == -EMFILE);
    CHECK(mon == NULL && strcmp(info.refused_step, "epoll_create1") == 0 && info.refused_errno == EMFILE);
    epoll_create1_errno = 0;
    believe_the_kernel();
}

static void regular_files_are_refused_even_when_epoll_cannot_be_asked(enum ul_kind kind) {
    epoll_create1_errno = 0;
    ul_fdmon *mon = open_monitor(kind);
    int file = memfd_create("regular", MFD_CLOEXEC), event = eventfd(0, EFD_CLOEXEC);
    epoll_create1_errno = EMFILE;
    CHECK(ul_fdmon_update(mon, file, UL_READ) == -EPERM);
    CHECK(ul_fdmon_update(mon, event, UL_READ) == 0);
    epoll_create1_errno = 0;
    close_monitor(mon);
    close(file);
    close(event);
}

static void epoll_and_poll_do_not_try_io_uring(enum ul_kind kind) {
    refuse(EPERM, 1000);
    ul_fdmon *mon = open_monitor(kind);
    CHECK(setup_calls == 0);
    check_that_it_works(mon);
    close_monitor(mon);
    believe_the_kernel();
}

/* ---- the spare ring ---- */

static void a_closed_monitors_ring_serves_the_next_one_with_nothing_in_flight(enum ul_kind kind) {
    believe_the_kernel();
    struct pair pairs[100];
    ul_ring *spare = NULL;
    ul_setup_info info;
    for (int i = 0; i < 100; i++)
        pairs[i] = open_pair();
    for (int round = 0; round < 5; round++) {
        ul_fdmon *mon;
        ul_event out[128];
        CHECK(ul_fdmon_new(kind, spare, &mon, &info) == 0);
        CHECK(mon->requests_in_flight == 0 && mon->ring != NULL && (!spare || mon->ring == spare));
        CHECK(statistics_of(mon).sqes == (round ? 0 : 3)); /* the self-test's, in the first round */
        CHECK(info.sq_entries == 256 && info.ring_features);
        for (int i = round; i < 100; i++)
            CHECK(ul_fdmon_update(mon, pairs[i].ours, UL_READ) == 0);
        CHECK(next_events(mon, out, 128, 1 * MS) == 0); /* nothing of the former monitor's */
        put(pairs[50].peer);
        CHECK(events_of(mon, pairs[50].ours, SOON) == UL_READ);
        take(pairs[50].ours);
        put(pairs[round].peer); /* in the middle of things, it is closed */
        CHECK(ul_fdmon_update(mon, pairs[99].ours, UL_READ | UL_WRITE) == 0);
        spare = close_and_keep_ring(mon);
        CHECK(spare != NULL);
        CHECK(ul_ring_unsubmitted(spare) == 0 && !ul_ring_has_work(spare));
        take(pairs[round].ours);
    }
    CHECK(setup_calls == 1);
    ul_ring_free(spare);
    for (int i = 0; i < 100; i++)
        close_pair(pairs[i]);
}

static void a_spare_ring_that_nobody_wants_is_freed(enum ul_kind kind) {
    believe_the_kernel();
    ul_fdmon *mon = open_monitor(UL_IO_URING);
    ul_setup_info info;
    ul_ring *spare = close_and_keep_ring(mon);
    CHECK(spare != NULL);
    CHECK(ul_fdmon_new(kind, spare, &mon, &info) == 0);
    close_monitor(mon); /* the runner counts descriptors, LeakSanitizer memory */
}

static void a_spare_ring_of_another_thread_is_replaced(enum ul_kind kind) {
    believe_the_kernel();
    ul_fdmon *mon = open_monitor(kind);
    struct pair pair = open_pair();
    CHECK(ul_fdmon_update(mon, pair.ours, UL_READ) == 0);
    mon->ring_owner = (pthread_t)1; /* as if it had been made elsewhere */
    put(pair.peer);
    CHECK(events_of(mon, pair.ours, SOON) == UL_READ);
    CHECK(setup_calls == 2 && statistics_of(mon).downgrades == 0);
    close_monitor(mon);
    close_pair(pair);
}

TESTS(TEST(a_kernel_before_6_6_gets_the_second_set_of_flags, ON_IO_URING),
      TEST(a_kernel_before_6_1_is_left_for_epoll_after_two_tries, ON_EPOLL),
      TEST(an_interrupted_set_up_is_tried_again, ON_IO_URING), TEST(every_other_errno_means_epoll_at_once, ON_EPOLL),
      TEST(short_memory_gets_a_smaller_ring, ON_IO_URING),
      TEST(no_memory_is_waited_for_fifty_milliseconds_at_most_and_never_remembered, ON_IO_URING),
      TEST(a_thousand_watches_work_on_the_smallest_ring, ON_IO_URING), TEST(a_missing_feature_is_a_refusal, ON_IO_URING),
      TEST(a_missing_optional_feature_is_not, ON_IO_URING), TEST(a_dummy_descriptor_is_no_ring, ON_EPOLL),
      TEST(an_enter_that_does_nothing_is_found_out_in_bounded_time, ON_IO_URING),
      TEST(an_enter_that_is_denied_is_a_refusal_with_its_errno, ON_IO_URING),
      TEST(a_ring_that_does_not_cancel_is_refused, ON_IO_URING),
      TEST(a_mapping_that_fails_is_a_refusal_that_leaks_nothing, ON_IO_URING), TEST(without_epoll_too_there_is_poll, ON_POLL),
      TEST(regular_files_are_refused_even_when_epoll_cannot_be_asked, ON_IO_URING | ON_POLL),
      TEST(epoll_and_poll_do_not_try_io_uring, ON_EPOLL | ON_POLL),
      TEST(a_closed_monitors_ring_serves_the_next_one_with_nothing_in_flight, ON_IO_URING),
      TEST(a_spare_ring_that_nobody_wants_is_freed, ON_EPOLL | ON_POLL),
      TEST(a_spare_ring_of_another_thread_is_replaced, ON_IO_URING))

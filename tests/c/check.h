/*
 * A test framework of one screen.
 *
 * Why it exists: the C core is tested without Python, so that ASan, UBSan and TSan see nothing but it. Promise: a failed CHECK
 * prints its place and its expression, a test that leaves a descriptor open fails, and one that hangs is ended by SIGALRM.
 *
 * A test is a function of the monitor under test, and its name is a sentence; TESTS lists it with the monitors it applies to.
 */
#ifndef CHECK_H
#define CHECK_H

#include <dirent.h>
#include <stdbool.h>
#include <stdio.h>
#include <unistd.h>

#include "fdmon.h"

enum {
    ON_IO_URING = 1 << UL_IO_URING,
    ON_EPOLL = 1 << UL_EPOLL,
    ON_POLL = 1 << UL_POLL,
    ON_ALL = ON_IO_URING | ON_EPOLL | ON_POLL
};

struct test {
    const char *name;
    void (*run)(enum ul_kind kind);
    unsigned monitors;
};
#define TEST(function, monitors) {#function, function, monitors}

static int checks_failed; /* of the running test; threads may add to it */

static inline bool check(bool holds, const char *expression, const char *file, int line) {
    if (!holds) {
        fprintf(stderr, "%s:%d: CHECK failed: %s\n", file, line, expression);
        __atomic_add_fetch(&checks_failed, 1, __ATOMIC_RELAXED);
    }
    return holds;
}
#define CHECK(expression) check((expression), #expression, __FILE__, __LINE__)

static inline int open_descriptors(void) {
    DIR *dir = opendir("/proc/self/fd");
    int n = 0;
    while (dir && readdir(dir))
        n++;
    if (dir)
        closedir(dir);
    return n;
}

static inline bool io_uring_works_here(void) {
    ul_fdmon *mon;
    ul_ring *spare;
    ul_setup_info info;
    if (ul_fdmon_new(UL_IO_URING, NULL, &mon, &info) < 0) {
        printf("%s: errno %d: the tests on io_uring are skipped\n", info.refused_step, info.refused_errno);
        return false;
    }
    ul_fdmon_close(mon, &spare);
    ul_fdmon_free(mon);
    ul_ring_free(spare);
    return true;
}

static inline bool run_test(const struct test *test, unsigned kind) {
    static const char *const names[] = {"auto", "io_uring", "epoll", "poll"};
    int before = open_descriptors();
    checks_failed = 0;
    test->run((enum ul_kind)kind);
    CHECK(open_descriptors() == before);
    if (checks_failed)
        fprintf(stderr, "FAILED: %s [%s]\n", test->name, names[kind]);
    return checks_failed == 0;
}

static inline int run_tests(const struct test *tests, size_t count) {
    int passed = 0, failed = 0, skipped = 0;
    bool ring = io_uring_works_here();
    for (size_t i = 0; i < count; i++) {
        for (unsigned kind = UL_IO_URING; kind <= UL_POLL; kind++) {
            if (!(tests[i].monitors & 1U << kind))
                continue;
            if (kind == UL_IO_URING && !ring) {
                skipped++;
                continue;
            }
            alarm(20);
            if (run_test(&tests[i], kind))
                passed++;
            else
                failed++;
        }
    }
    printf("%d passed, %d failed, %d skipped\n", passed, failed, skipped);
    return failed != 0;
}

#define TESTS(...)                                                                                                             \
    int main(void) {                                                                                                           \
        static const struct test tests[] = {__VA_ARGS__};                                                                      \
        return run_tests(tests, sizeof tests / sizeof tests[0]);                                                               \
    }

#endif
